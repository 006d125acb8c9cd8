"""Heads over the vocabulary: masked and causal language modelling.

What stands between a backbone and its vocabulary differs by family (BERT transforms the hidden states first, Gemma
caps the logits, ...). So the layers are those of Transformers' own `AutoModelForMaskedLM` or `AutoModelForCausalLM`,
without the backbone. The last of them, the product with the table of embeddings, belongs to no task: the table is the
backbone's input embeddings (or the one `lm_head` of the model, where the checkpoint does not tie the two), and the
model hands it to the head with every call.

Logits are computed where a token is predicted and nowhere else. With a vocabulary of 30,000 words and a small
encoder the full table of logits would cost more than the encoder.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .backbone import is_causal
from .heads import IGNORE_INDEX, TokenHead
from .native_head import NativeLayers, shallow_copy
from .pass_local import PassLocal
from .task import Task

__all__ = ["CausalLanguageHead", "LanguageHead", "LanguageLayers", "MaskedLanguageHead", "is_tied"]


def is_tied(config: PreTrainedConfig) -> bool:
    """Return whether a backbone's language models predict with the table of its input embeddings."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


class Vocabulary(nn.Module):
    """The product with a table of embeddings that is handed over, and a bias of its own where the family has one.

    The table comes with each pass in `given`, or stays for good in `table`, which only copies of this module have
    ([`LanguageLayers.over_table`]).
    """

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
        # In a tuple, or None: set as it is, the table would become a parameter of this module.
        self.table: tuple[Tensor] | None = None
        self.given = PassLocal()

    @property
    def weight(self) -> Tensor:
        """The table, which some families look at before they call this."""
        table = self.given.value if self.table is None else self.table[0]
        if table is None:
            raise AttributeError("weight")
        return table

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()

    def resize(self, size: int) -> None:
        """Make the bias fit a vocabulary of another size; new tokens have the bias 0."""
        if self.bias is not None:
            kept = self.bias.detach()[:size]
            self.bias = nn.Parameter(F.pad(kept, (0, size - len(kept))), self.bias.requires_grad)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits, `[..., V]`, of hidden states `[..., E]`."""
        return F.linear(hidden, self.weight, self.bias)


class LanguageLayers(NativeLayers):
    """Transformers' own language model for a backbone, without the backbone and without the table of embeddings."""

    def _prepare(self, model: PreTrainedModel) -> None:
        output: Any = model.get_output_embeddings()
        path = next(name for name, module in model.named_modules() if module is output)
        # A bias may be registered a second time, above the layer that has it; one of the two is enough.
        tied = model._tied_weights_keys if isinstance(model._tied_weights_keys, dict) else {}
        for one, other in tied.items():
            if one == f"{path}.bias" and other != one:
                holder, _, name = other.rpartition(".")
                setattr(model.get_submodule(holder), name, None)
        bias = getattr(output, "bias", None)
        holder, _, name = path.rpartition(".")
        setattr(model.get_submodule(holder), name, Vocabulary(bias))
        # The table lies elsewhere: nothing in here is tied any more.
        model._tied_weights_keys = None  # type: ignore[assignment]
        model.all_tied_weights_keys = {}
        self.vocabulary_path = path
        self.table_shape = tuple(output.weight.shape)  # [V, E]

    @property
    def vocabulary(self) -> Vocabulary:
        """The last layer."""
        return cast(Vocabulary, cast(Any, self.native).get_submodule(self.vocabulary_path))

    def resize(self, size: int) -> None:
        """Make what there is for each token fit a vocabulary of another size."""
        self.vocabulary.resize(size)

    def over_table(self, table: Tensor) -> PreTrainedModel:
        """Return a copy of Transformers' own model, with the same parameters, that predicts with a table `[V, E]`."""
        model = shallow_copy(cast(PreTrainedModel, self.native))
        holder: Any = model
        *outer, name = self.vocabulary_path.split(".")
        for part in outer:
            holder._modules[part] = shallow_copy(holder._modules[part])
            holder = holder._modules[part]
        vocabulary = shallow_copy(self.vocabulary)
        vocabulary.table = (table,)
        holder._modules[name] = vocabulary
        return model

    def with_table(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Return the logits, `[B, K, V]`, of hidden states `[B, K, H]`, with the table `[V, E]`."""
        with self.vocabulary.given.use(table):
            return self(hidden, None)


class LanguageHead(TokenHead):
    """Softmax over the vocabulary at chosen tokens; cross-entropy.

    Labels are `[rows, K]`, int64, ids of tokens, -100 for none; logits are `[rows, K, V]`, at the tokens that the
    model was told to look at, or at all tokens of the rows.
    """

    layers: LanguageLayers
    layers_type: ClassVar[type[LanguageLayers]] = LanguageLayers

    def __init__(
        self,
        task: Task,
        hidden_size: int,
        pooling: str = "mean",
        dropout: float = 0.1,
        backbone_config: PreTrainedConfig | None = None,
    ) -> None:
        """Build the layers of the backbone's family."""
        nn.Module.__init__(self)
        self.label_smoothing = task.label_smoothing
        assert backbone_config is not None
        self.check(task, backbone_config)
        self.layers = self.layers_type(task, backbone_config)

    @staticmethod
    def check(task: Task, backbone_config: PreTrainedConfig) -> None:
        """Raise ValueError where the objective makes no sense on the backbone."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        table: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the logits over the vocabulary.

        Args:
            hidden: `[rows, L, H]`.
            attention_mask: Not used: who predicts at padding does not look at the result.
            table: `[V, E]`, the embeddings of the vocabulary.
            positions: `[rows', K]`, which tokens to predict at: `row * L + token`; None for all.

        Returns:
            `[rows', K, V]`, or `[rows, L, V]` without positions.
        """
        if positions is not None:
            hidden = hidden.flatten(0, 1)[positions]
        return self.layers.with_table(hidden, table)

    @staticmethod
    def align(labels: Tensor) -> Tensor:
        """Return labels `[rows, L]` as this head reads them: at the place where the token is predicted."""
        return labels


def refuse_encoder_decoder(task: Task, backbone_config: PreTrainedConfig) -> None:
    """Raise ValueError for an encoder-decoder, whose encoder alone reads the rows of other tasks."""
    if backbone_config.is_encoder_decoder:
        raise ValueError(
            f"task {task.name!r}: {task.type} does not go with an encoder-decoder, which "
            f"{backbone_config.model_type!r} is; use seq2seq_lm"
        )


class MaskedLanguageHead(LanguageHead):
    """Tokens that were hidden from an encoder (Devlin et al. 2019)."""

    @staticmethod
    def check(task: Task, backbone_config: PreTrainedConfig) -> None:
        """Raise ValueError for a decoder, which has not read what comes after a hidden token."""
        refuse_encoder_decoder(task, backbone_config)
        if is_causal(backbone_config):
            raise ValueError(
                f"task {task.name!r}: masked_lm needs an encoder; {backbone_config.model_type!r} reads from left to "
                "right, use causal_lm"
            )


class CausalLanguageHead(LanguageHead):
    """The next token, from those before it."""

    @staticmethod
    def check(task: Task, backbone_config: PreTrainedConfig) -> None:
        """Raise ValueError for a bidirectional encoder, which sees the answer."""
        refuse_encoder_decoder(task, backbone_config)
        if not is_causal(backbone_config):
            raise ValueError(
                f"task {task.name!r}: causal_lm on {backbone_config.model_type!r}: a bidirectional encoder sees the "
                "next token, which is the answer, and would only learn to copy it; use masked_lm, or a causal decoder"
            )

    @staticmethod
    def align(labels: Tensor) -> Tensor:
        """Return labels `[rows, L]` one place to the left: each token is predicted at the one before it."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
