"""`pipeline("multi-task", model=...)`: raw text in, the answers of every task out, from one pass of the encoder.

Importing `hf_multitask` is enough for Transformers to know the name:

    >>> import hf_multitask  # doctest: +SKIP
    >>> from transformers import pipeline  # doctest: +SKIP
    >>> ask = pipeline("multi-task", model="runs/quickstart")  # doctest: +SKIP
    >>> ask("Maria liked the film.")  # doctest: +SKIP
    {'tone': {'label': 'positive', 'score': 0.98}, 'names': [{'label': 'person', 'text': 'Maria', 'start': 0, ...}]}
    >>> ask(["a text", "another"], tasks=["tone"], top_k=2)  # doctest: +SKIP

What comes in says what comes out:

| input | output |
|---|---|
| a text | one dictionary |
| a pair of texts: a tuple, or `{"text", "text_pair"}` | one dictionary |
| a row: a dictionary with the tasks' columns | one dictionary |
| a list of these, or of lists of words | a list of dictionaries, as long |
| a generator, a `Dataset` or another iterable of these | a generator of dictionaries, read batch by batch |

So one text that comes as words is a list in a list, `ask([["Maria", "liked", "it"]])`, and so is one conversation. What
each task answers with is in [`hf_multitask.prediction`]; how long texts are read with `stride`, and their windows put
together, in [`hf_multitask.prediction_windows`]. Tasks that read other input than what is given (a pair, choices) are
left out, unless they are asked for by name.

One pipeline may be called from many threads. They take turns at the tokenizer, and the model writes nothing down in a
pass; code that calls the same tokenizer by itself at the same time should call a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline

from ..prediction import Predictor

__all__ = ["OPTIONS", "MultiTaskPipeline"]

OPTIONS = ("tasks", "batch_size", "stride", "top_k", "generate_kwargs")
"""Options of a call; given to `pipeline(...)` they hold for every call that does not say otherwise."""


class MultiTaskPipeline(Pipeline):
    """What `pipeline("multi-task", ...)` makes.

    Args:
        model: A multi-task model (for `pipeline` also a folder or a Hub id).
        tokenizer: Its tokenizer (for `pipeline` not needed where the model is a folder or an id).
        max_length: Longest input in tokens (default: what the model was trained on).
        **kwargs: `device` and other arguments of Transformers' pipelines, and [`OPTIONS`].

    Raises:
        ValueError: The model is no multi-task model, the tokenizer is missing or not the model's, or an option is
            unknown.
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, model: Any, tokenizer: Any = None, *, max_length: int | None = None, **kwargs: Any) -> None:
        """Put the parts together, the model on the device."""
        self._predictor = Predictor(model, tokenizer, max_length)
        super().__init__(model, tokenizer, **kwargs)
        if self._batch_size is not None:
            self._forward_params["batch_size"] = self._batch_size

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer one text, a list or a stream of them; see the module for the forms.

        Args:
            inputs: What to read.
            *args: Nothing; there to fit Transformers' own.
            **kwargs: [`OPTIONS`]: `tasks`, names; `batch_size`, texts per pass of the encoder (default: 32); `stride`,
                tokens that the windows of a long text share; `top_k`, labels with scores per task;
                `generate_kwargs`, arguments of `generate`.

        Raises:
            ValueError: An option is unknown or out of range, a task is unknown, or an input is no text.
        """
        if args:
            raise ValueError(f"options go by name, got {args[0]!r}; write tasks=[...] or batch_size=...")
        _, options, _ = self._sanitize_parameters(**kwargs)
        options = {**self._forward_params, **options}
        self.call_count += 1
        if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):  # known by numbers alone
            inputs = map(inputs.__getitem__, range(len(cast(Any, inputs))))
        if isinstance(inputs, (str, tuple, Mapping)):
            return next(self._answers([inputs], options))
        if isinstance(inputs, (bytes, bytearray)) or not isinstance(inputs, Iterable):
            raise ValueError(
                f"input is {inputs!r}; it must be a text, a pair as a tuple, a row, or a list or iterable of these"
            )
        answers = self._answers(inputs, options)
        return list(answers) if isinstance(inputs, list) else answers

    def _answers(self, inputs: Iterable[Any], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with self.device_placement():
            yield from self._predictor(inputs, **options)

    # ---- what Transformers' pipelines are made of ----

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return options by the step that they belong to: all are about prediction."""
        if kwargs.pop("num_workers", None):
            raise ValueError("num_workers is not for this pipeline: texts are prepared by the tokenizer's own threads")
        for name in kwargs:
            if name not in OPTIONS:
                raise ValueError(f"the pipeline has no option {name!r}; it has {', '.join(OPTIONS)}")
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Return one input, for [`_forward`]; tokens are made there, for a whole batch."""
        return {"input": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        return next(self._answers([input_tensors["input"]], forward_parameters))

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        """Return answers as they are."""
        return model_outputs
