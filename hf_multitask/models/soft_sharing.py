"""Soft sharing: an encoder for each task, all from the same start, that are held together or exchange what they see."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .base import MultiTaskModel
from .configuration import MultiTaskConfig
from .cross_stitch import CrossStitchUnits, check_stitched, run_stitched
from .encoder_distance import (
    add_deviations,
    parameters_by_layer,
    relative_deviations,
    same_parameters,
    weighted_deviation,
)
from .layers import find_layers
from .scheme import SharingScheme

__all__ = ["SoftSharingConfig", "SoftSharingModel"]

DISTANCES = ("pairs", "mean")


class SoftSharingConfig(MultiTaskConfig):
    """Configuration of a [`SoftSharingModel`]; see [`MultiTaskConfig`] for the other fields.

    Args:
        penalty: What the squared distance of the encoders' parameters counts in the loss, 0 or more. None takes 0.01,
            and 0 with `cross_stitch`, where the encoders exchange what they see instead.
        layer_penalties: In place of `penalty`, a number for each layer; embeddings and what else lies outside the
            layers keep `penalty`.
        distance: `pairs` sums the squared distances over all pairs of encoders, `mean` those of the encoders from
            their mean, which are T times smaller with T tasks.
        cross_stitch: Whether every layer's outputs are mixed between the encoders.
        cross_stitch_init: Initial weight of an encoder's own output in a mixture, in [0, 1]; the others have equal
            shares of the rest.
    """

    model_type = "hf_multitask_soft_sharing"

    penalty: float | None = None
    layer_penalties: list | None = None
    distance: str = "pairs"
    cross_stitch: bool = False
    cross_stitch_init: float = 0.9

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the values."""
        super().__post_init__(**kwargs)
        if self.penalty is None:
            self.penalty = 0.0 if self.cross_stitch else 0.01
        _check_penalty("penalty", self.penalty)
        if self.layer_penalties is not None:
            self.layer_penalties = list(self.layer_penalties)
            for number, value in enumerate(self.layer_penalties):
                _check_penalty(f"layer_penalties[{number}]", value)
            layers = getattr(self.get_text_config(), "num_hidden_layers", None)
            if len(self.layer_penalties) != layers:
                raise ValueError(
                    f"layer_penalties has {len(self.layer_penalties)} numbers; the backbone has {layers} layers, "
                    "so give one number for each"
                )
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}")
        if not 0.0 <= self.cross_stitch_init <= 1.0:
            raise ValueError(f"cross_stitch_init must lie in [0, 1], got {self.cross_stitch_init!r}")


def _check_penalty(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")


class SoftSharingModel(MultiTaskModel):
    """An encoder and a head for each task; the encoders start equal and share by being pulled together.

    The loss has a penalty on the encoders' distance (Duong et al. 2015), in the default form

        penalty * sum over pairs i < j of ||theta_i - theta_j||^2

    A large penalty comes near to hard sharing, 0 trains single tasks. Parameters and the cost of serving grow with the
    number of tasks: T encoders, a pass each.

    With `cross_stitch=True` (Misra et al. 2016) every row passes through all encoders, whose outputs are mixed after
    each layer with trained weights. Each task reads its own encoder's last outputs, but all tasks train all encoders.
    Hidden states are then those of all encoders, `[rows, T, L, H]`; without cross-stitch units they are those of the
    encoder that ran last.

    Example:
        >>> from transformers import BertConfig
        >>> config = SoftSharingConfig(
        ...     backbone_config=BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ...     tasks=[{"name": "score", "type": "regression"}, {"name": "spread", "type": "regression"}],
        ... )
        >>> model = SoftSharingModel(config)
        >>> list(model.encoders), model.divergence()
        (['score', 'spread'], {'embeddings': 0.0, '0': 0.0})
    """

    config_class = SoftSharingConfig
    untrained_tasks_are_plain = False
    config: SoftSharingConfig
    encoders: nn.ModuleDict

    def __init__(self, config: SoftSharingConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the encoders, copies of one backbone, and the heads."""
        super().__init__(config, backbone)
        first = self.backbone
        del self.backbone
        layers = check_stitched(first) if config.cross_stitch else 0
        if config.layer_penalties is not None:
            find_layers(first)  # a backbone without them is refused before training
        # One configuration for all, so that what is set on the model's holds for each.
        copies = [copy.deepcopy(first, {id(first.config): first.config}) for _ in self.tasks[1:]]
        self.encoders = nn.ModuleDict(dict(zip((task.name for task in self.tasks), [first, *copies], strict=True)))
        if config.cross_stitch:
            self.stitches = CrossStitchUnits(layers, len(self.tasks), config.cross_stitch_init)
        self._compared()
        self.post_init()

    @property
    def one_task_per_pass(self) -> bool:
        """Whether a pass is one task's: it is, unless all encoders run in every pass."""
        return not self.config.cross_stitch

    @property
    def shares_rows(self) -> bool:
        """Whether tasks on the same rows need only one pass."""
        return self.config.cross_stitch

    def encoder(self, name: str) -> PreTrainedModel:
        """Return the encoder of a task."""
        self._head(name)
        return cast(PreTrainedModel, self.encoders[name])

    def _encoders(self) -> list[PreTrainedModel]:
        return [cast(PreTrainedModel, encoder) for encoder in self.encoders.values()]

    def task_modules(self, name: str) -> list[nn.Module]:
        """Return a task's head and, unless all tasks train it, its encoder."""
        return [self._head(name)] if self.config.cross_stitch else [self._head(name), self.encoder(name)]

    def merged_backbone(self) -> PreTrainedModel:
        """Return an encoder with the mean of all encoders' parameters.

        Raises:
            ValueError: The encoders read each other, by cross-stitch units.
        """
        self._refuse_stitched("its encoders cannot be averaged")
        first, *others = self._encoders()
        merged = copy.deepcopy(first)
        versions = [dict(encoder.named_parameters()) for encoder in (first, *others)]
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.copy_(torch.stack([own[name].double() for own in versions]).mean(0))
        return merged

    def reusable_backbone(self) -> PreTrainedModel:
        """Return a copy of the only encoder.

        Raises:
            ValueError: There are several.
        """
        if len(self.tasks) > 1:
            raise ValueError(
                f"from_backbone cannot choose among the encoders of {', '.join(self.encoders)}: give it one of them, "
                "model.encoder(name), or model.to_scheme('hard'), which averages them"
            )
        return self.merged_backbone()

    def start_task(self, name: str, before: SharingScheme) -> None:
        """Start the encoder of a task that was added as the mean of the other encoders."""
        self.encoder(name).load_state_dict(before.merged_backbone().state_dict())

    def task_backbone(self, name: str) -> PreTrainedModel:
        """Return a copy of a task's encoder."""
        self._refuse_stitched("no plain model does what it does for one task")
        return copy.deepcopy(self.encoder(name))

    def check_selection(self, names: Sequence[str]) -> None:
        """Raise ValueError where tasks read other tasks' encoders."""
        if len(names) < len(self.tasks):
            self._refuse_stitched("its tasks cannot be parted")

    def _refuse_stitched(self, what: str) -> None:
        if self.config.cross_stitch:
            raise ValueError(f"with cross_stitch=True every encoder reads all others, so {what}")

    # ---- running the encoders ----

    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the encoder of the pass's task or, with cross-stitch units, all of them.

        Returns:
            The backbone's output; with cross-stitch units its `last_hidden_state` is `[rows, T, L, H]`.
        """
        if self.config.cross_stitch:
            return self._encode_stitched(input_ids, attention_mask=attention_mask, **kwargs)
        if self.rows.value is None:
            raise ValueError("encode does not know whose rows these are; call the model, or one of its encoders")
        encoder = self.encoder(self.rows.value.slices[0][0])
        return self.run_backbone(encoder, input_ids, attention_mask=attention_mask, **kwargs)

    def _encode_stitched(self, input_ids: Tensor | None, **kwargs: Any) -> Any:
        encoders = self._encoders()
        config: Any = encoders[0].config
        asked = {
            key: kwargs.pop(key, getattr(config, key, False)) for key in ("output_hidden_states", "output_attentions")
        }
        if asked["output_attentions"]:
            raise ValueError("output_attentions=True does not work with cross_stitch=True; ask single encoders")
        count = len(encoders)
        main = cast(Tensor, kwargs.get("inputs_embeds") if input_ids is None else input_ids)
        rows = main.shape[0]
        inputs = {"input_ids": input_ids, **kwargs}
        inputs = {
            key: value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        if getattr(config, "use_cache", False):
            inputs["use_cache"] = False  # keys and values of T encoders do not go into one cache
        stand_in, seen = run_stitched(encoders, self.stitches, rows, bool(asked["output_hidden_states"]))
        output = self.run_backbone(stand_in, **inputs, output_hidden_states=False, output_attentions=False)
        output.last_hidden_state = self._by_row(output.last_hidden_state)
        if seen is not None:
            output["hidden_states"] = (*map(self._by_row, seen[:-1]), output.last_hidden_state)
        return output

    def _by_row(self, streams: Tensor) -> Tensor:
        """Return a view `[rows, T, L, H]` of the encoders' rows `[T * rows, L, H]`."""
        return streams.unflatten(0, (len(self.tasks), -1)).transpose(0, 1)

    def input_embeddings_of(self, name: str) -> nn.Module:
        """Return the input embeddings of a task's encoder."""
        return self.encoder(name).get_input_embeddings()

    @property
    def keeps_cache(self) -> bool:
        """False with cross-stitch units, which mix what all encoders read."""
        return not self.config.cross_stitch

    def _run_heads(self, own_rows: Any, every: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run the heads; each reads its own encoder's outputs."""
        if self.config.cross_stitch:
            numbers = {task.name: number for number, task in enumerate(self.tasks)}
            own_rows = {name: (hidden[:, numbers[name]], *rest) for name, (hidden, *rest) in own_rows.items()}
        return super()._run_heads(own_rows, every)

    def compile_backbone(self, **options: Any) -> None:
        """Compile every encoder in place; with cross-stitch units its layers, because it runs in pieces."""
        for encoder in self._encoders():
            parts = find_layers(encoder) if self.config.cross_stitch else [encoder]
            for part in parts:
                part.compile(**options)

    def idle_term(self, name: str) -> Tensor | None:
        """Return a 0 that depends on every parameter of a task's encoder: it reads one token."""
        if self.config.cross_stitch:
            return None  # the encoders run for the rows of any task
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        output = self.run_backbone(self.encoder(name), token, attention_mask=torch.ones_like(token))
        return 0.0 * output.last_hidden_state.float().sum()

    # ---- the distance between the encoders ----

    def penalty(self) -> Tensor | None:
        """Return the penalty on the distance between the encoders, a scalar; None where it counts nothing.

        Parameters that are frozen in every encoder do not count. One that is frozen in some still draws the others.

        Raises:
            ValueError: A parameter differs in shape between the encoders.
        """
        versions, weights = self._counted()
        return weighted_deviation(versions, weights) if versions else None

    def add_penalty_gradient(self, scale: float = 1.0) -> Tensor | None:
        """Add the penalty's gradient to the parameters' `.grad` in one pass over them, and return the penalty."""
        versions, weights = self._counted()
        return add_deviations(versions, weights, scale) if versions else None

    def _counted(self) -> tuple[list[list[nn.Parameter]], list[float]]:
        """Return the versions of each parameter that the penalty moves, and what their deviations count."""
        # The sum over pairs is T times that of the deviations from the mean.
        factor = len(self.tasks) if self.config.distance == "pairs" else 1
        counted = [
            (versions, factor * weight)
            for versions, weight in self._penalized()
            if any(parameter.requires_grad for parameter in versions)
        ]
        return [versions for versions, _ in counted], [weight for _, weight in counted]

    def idle_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield what a step without a task's rows must leave alone: not what the penalty moves."""
        moved = {id(parameter) for versions, _ in self._penalized() for parameter in versions}
        return (parameter for parameter in self.task_parameters(name) if id(parameter) not in moved)

    def divergence(self) -> dict[str, float]:
        """Return how far the encoders lie apart, by layer: `embeddings`, `0`, `1`, ... and `other` if there is any.

        It is the root mean square of the parameters' deviations from the encoders' mean, over that of the mean: 0 for
        equal encoders, 0.01 where they differ in the second digit.
        """
        compared = self._compared()
        layers = parameters_by_layer(self.encoder(self.tasks[0].name))
        groups = {layer: [compared[name] for name in names if name in compared] for layer, names in layers.items()}
        return relative_deviations({layer: group for layer, group in groups.items() if group})

    def training_logs(self) -> dict[str, float]:
        """Return the divergence of each layer."""
        return {f"divergence/{layer}": value for layer, value in self.divergence().items()}

    def _penalized(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the versions of each parameter whose distance counts, and what it counts."""
        compared = self._compared()
        rates = dict.fromkeys(compared, cast(float, self.config.penalty))
        if self.config.layer_penalties is not None:
            layers = parameters_by_layer(self.encoder(self.tasks[0].name))
            for number, rate in enumerate(self.config.layer_penalties):
                rates.update(dict.fromkeys(layers.get(str(number), ()), rate))
        if len(self.tasks) == 1:
            return []
        return [(versions, rates[name]) for name, versions in compared.items() if rates[name]]

    def _compared(self) -> dict[str, list[nn.Parameter]]:
        return same_parameters(cast(Any, self.encoders))

    # ---- PreTrainedModel's contracts ----

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the heads, and the mixing matrices."""
        if isinstance(module, CrossStitchUnits):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the first encoder's input embeddings; those of the others have the same shape."""
        return self.encoder(self.tasks[0].name).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embeddings of every encoder: the first gets `value`, the others copies of it."""
        for number, encoder in enumerate(self._encoders()):
            encoder.set_input_embeddings(copy.deepcopy(value) if number else value)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the input embeddings of every encoder; tokens that are new start with the same vectors in all."""
        tables: list[Any] = [encoder.get_input_embeddings() for encoder in self._encoders()]
        known = tables[0].weight.shape[0]
        for encoder in self._encoders():
            encoder.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        first, *others = tables = [encoder.get_input_embeddings() for encoder in self._encoders()]
        with torch.no_grad():
            for other in others:
                other.weight[known:] = first.weight[known:]
        return first
