"""Text and labels → model inputs.

A source ([`hf_multitask.data.sources.Source`]) is what some tasks read together. Its rows are tokenized once, travel
once and go through the encoder once, however many tasks read them. Prepared, it is a `datasets.Dataset` with the
columns `input_ids`, `token_type_ids` where they say something, and `labels_<task>` for each task. Preparing goes
through `Dataset.map`, so it is cached on disk by content and can use several processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.heads import IGNORE_INDEX
from ..models.task import Task, TaskType
from .labels import LabelEncoder, label_feature
from .sources import Source, label_key

__all__ = ["check_tokenizer", "longest_input", "prepare"]

_VERSION = 1  # part of the cache key: raise it when the prepared form changes


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> None:
    """Check that a tokenizer fits a model.

    Raises:
        ValueError: There is none, it has no pad token, or it has more tokens than the model has embeddings.
    """
    if tokenizer is None:
        raise ValueError("processing_class is missing: pass the backbone's tokenizer, it knows how to pad")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no pad token; set one before training, for example "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
    embeddings = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the backbone embeddings for {embeddings}: they do not belong "
            "together, or tokens were added; then call model.backbone.resize_token_embeddings(len(tokenizer))"
        )


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int | None = None) -> int:
    """Return the longest input in tokens: `max_length`, or what tokenizer and backbone allow.

    Raises:
        ValueError: `max_length` exceeds the backbone's positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None:
        if positions is not None and max_length > positions:
            raise ValueError(f"max_length={max_length} exceeds the backbone's {positions} positions")
        return max_length
    # Tokenizers without a limit of their own say 10^30.
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit is not None and limit < 10**9]
    return min(limits, default=512)


def prepare(
    dataset: Dataset,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    split: str = "train",
    num_proc: int | None = None,
    labels: bool | None = True,
) -> Dataset:
    """Return a source's rows as model inputs and encoded labels; the given dataset stays as it is.

    Args:
        dataset: Rows of text and labels, or already tokenized (a column `input_ids`).
        source: The tasks that read them.
        tokenizer: The backbone's tokenizer.
        max_length: Longest input in tokens, where the tasks set none; longer ones are truncated.
        split: Name of the split, for messages.
        num_proc: Number of processes.
        labels: Whether the label columns must be there; None takes those that are.

    Raises:
        TypeError: It is not a `datasets.Dataset`.
        ValueError: The dataset is empty, a column is missing, a text or a label is bad, or nothing of any row is
            left after truncation. The message names dataset, split, column and row.
    """
    where = f"dataset {source.dataset!r} ({split})"
    if isinstance(dataset, IterableDataset):
        raise TypeError(f"{where} is a streaming IterableDataset; load it with streaming=False")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{where} must be a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{where} has no rows")
    dataset = dataset.with_format(None)
    length = source.tasks[0].max_length or max_length
    try:
        encoder = (
            _TokenizedRows(dataset, source, labels)
            if "input_ids" in dataset.column_names
            else _TextRows(dataset, source, labels, tokenizer, length)
        )
        features = Features(
            {"input_ids": List(Value("int32"))}
            | ({"token_type_ids": List(Value("int8"))} if encoder.has_token_types else {})
            | {label_key(task.name): label_feature(task) for task in encoder.labelled}
        )
        prepared = dataset.map(
            encoder,
            with_indices=True,
            batched=True,
            remove_columns=dataset.column_names,
            features=features,
            num_proc=num_proc if len(dataset) >= 1000 else None,
            new_fingerprint=encoder.fingerprint(dataset),
            desc=f"Preparing {source.name} ({split})",
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _check_something_left(prepared, encoder, where, length)
    return prepared


def _check_something_left(prepared: Dataset, encoder: _Rows, where: str, length: int) -> None:
    lengths = pc.list_value_length(prepared.data.column("input_ids"))
    if pc.max(lengths).as_py() <= encoder.special_tokens:
        raise ValueError(f"{where}: no row has a token left at max_length={length} (or all texts are empty)")
    for task in encoder.labelled:
        if task.type is TaskType.TOKEN_CLASSIFICATION:
            labels = pc.list_flatten(prepared.data.column(label_key(task.name)))
            if not pc.any(pc.not_equal(labels, IGNORE_INDEX)).as_py():
                raise ValueError(f"{where}: task {task.name!r}: no row has a labelled word left at max_length={length}")


class _Rows:
    """Common part of the two kinds of rows: finds the label columns, encodes a batch of rows."""

    special_tokens = 0
    has_token_types = False

    def __init__(self, dataset: Dataset, source: Source, labels: bool | None) -> None:
        self.labelled: list[Task] = []
        self.encoders: dict[str, LabelEncoder] = {}
        for task in source.tasks:
            column = self.label_column(task, dataset, source)
            if column not in dataset.column_names:
                if labels:
                    raise ValueError(
                        f"task {task.name!r}: no column {column!r} for the labels; "
                        f"columns are {', '.join(dataset.column_names)}"
                    )
                continue
            if labels is not False:
                self.labelled.append(task)
                self.encoders[task.name] = self.make_encoder(task, column, dataset)

    def label_column(self, task: Task, dataset: Dataset, source: Source) -> str:
        return task.label_column

    def make_encoder(self, task: Task, column: str, dataset: Dataset) -> LabelEncoder:
        return LabelEncoder(task, column, dataset.features)

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        return [
            type(self).__name__,
            _VERSION,
            [(task.to_dict(), self.encoders[task.name].column) for task in self.labelled],
        ]

    def fingerprint(self, dataset: Dataset) -> str:
        """Return a cache key of content: pickling a tokenizer would hash the padding it was last called with."""
        return Hasher.hash([dataset._fingerprint, *self.key()])


class _TextRows(_Rows):
    """Rows of text."""

    def __init__(
        self,
        dataset: Dataset,
        source: Source,
        labels: bool | None,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
    ) -> None:
        self.columns = source.text_columns
        for column in self.columns:
            if column not in dataset.column_names:
                raise ValueError(
                    f"task {source.tasks[0].name!r}: no text column {column!r}; "
                    f"columns are {', '.join(dataset.column_names)}"
                )
        if tokenizer is None:
            raise ValueError("processing_class is missing: the rows hold text and need the backbone's tokenizer")
        self.words = isinstance(dataset.features[self.columns[0]], List)
        for column in self.columns:
            feature = dataset.features[column]
            value = feature.feature if isinstance(feature, List) else feature
            if not isinstance(value, Value) or value.dtype not in ("string", "large_string"):
                raise ValueError(
                    f"text column {column!r} has the type {feature}; it must hold strings or lists of words"
                )
            if isinstance(feature, List) != self.words:
                raise ValueError(f"text columns {self.columns}: one holds texts, the other lists of words")
        super().__init__(dataset, source, labels)
        for task in self.labelled:
            if task.type is TaskType.TOKEN_CLASSIFICATION and not self.words:
                raise ValueError(
                    f"task {task.name!r}: column {self.columns[0]!r} must hold lists of words, one per tag"
                )
        self.tokenizer = tokenizer
        self.max_length = max_length
        pair = len(self.columns) == 2
        self.special_tokens = tokenizer.num_special_tokens_to_add(pair=pair)
        if max_length <= self.special_tokens:
            raise ValueError(
                f"max_length={max_length} leaves no room: the tokenizer adds {self.special_tokens} special tokens"
            )
        # For single texts they are all 0, which is what a backbone takes without them.
        self.has_token_types = pair and "token_type_ids" in tokenizer.model_input_names

    def key(self) -> list[Any]:
        return [*super().key(), self.columns, self.max_length, _tokenizer_key(self.tokenizer)]

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        texts = [batch[column] for column in self.columns]
        for column, values in zip(self.columns, texts, strict=True):
            for row, value in zip(indices, values, strict=True):
                if value is None or (self.words and None in value):
                    raise ValueError(f"text None in row {row} of column {column!r}; filter such rows out")
        encoded = self.tokenizer(
            *texts,
            truncation=True,
            max_length=self.max_length,
            is_split_into_words=self.words,
            return_attention_mask=False,
            return_token_type_ids=self.has_token_types,
        )
        result = {"input_ids": encoded["input_ids"]}
        if self.has_token_types:
            result["token_type_ids"] = encoded["token_type_ids"]
        for task in self.labelled:
            encoder = self.encoders[task.name]
            labels = encoder.encode(batch[encoder.column], indices[0])
            if task.type is TaskType.TOKEN_CLASSIFICATION:
                for row, words, tags in zip(indices, texts[0], labels, strict=True):
                    if len(words) != len(tags):
                        raise ValueError(
                            f"task {task.name!r}: row {row} has {len(words)} words in column {self.columns[0]!r} and "
                            f"{len(tags)} labels in column {encoder.column!r}"
                        )
                labels = [first_subword_labels(encoded.word_ids(i), tags) for i, tags in enumerate(labels)]
            result[label_key(task.name)] = labels
        return result


class _TokenizedRows(_Rows):
    """Rows that were tokenized before; padding is taken out again."""

    def __init__(self, dataset: Dataset, source: Source, labels: bool | None) -> None:
        super().__init__(dataset, source, labels)
        self.has_token_types = "token_type_ids" in dataset.column_names

    def label_column(self, task: Task, dataset: Dataset, source: Source) -> str:
        candidates = [label_key(task.name), task.label_column]
        if len(source.tasks) == 1:
            candidates += ["labels", "label"]
        return next((c for c in candidates if c in dataset.column_names), task.label_column)

    def make_encoder(self, task: Task, column: str, dataset: Dataset) -> LabelEncoder:
        encoder = super().make_encoder(task, column, dataset)
        if task.type is TaskType.TOKEN_CLASSIFICATION:
            encoder._ids[IGNORE_INDEX] = IGNORE_INDEX
        return encoder

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        masks = batch.get("attention_mask") or [[1] * len(ids) for ids in batch["input_ids"]]

        def unpadded(values: list[list[int]]) -> list[list[int]]:
            return [[v for v, m in zip(row, mask, strict=True) if m] for row, mask in zip(values, masks, strict=True)]

        result = {key: unpadded(batch[key]) for key in ("input_ids", "token_type_ids") if key in batch}
        for task in self.labelled:
            encoder = self.encoders[task.name]
            labels = encoder.encode(batch[encoder.column], indices[0])
            if task.type is TaskType.TOKEN_CLASSIFICATION:
                for row, ids, tags in zip(indices, batch["input_ids"], labels, strict=True):
                    if len(ids) != len(tags):
                        raise ValueError(
                            f"task {task.name!r}: row {row} has {len(ids)} input_ids and {len(tags)} labels in column "
                            f"{encoder.column!r}"
                        )
                labels = unpadded(labels)
            result[label_key(task.name)] = labels
        return result


def first_subword_labels(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Return one label per token: a word's at its first subword, -100 elsewhere.

    Example:
        >>> first_subword_labels([None, 0, 1, 1, None], [3, 5])
        [-100, 3, 5, -100, -100]
    """
    labels, previous = [], None
    for word in word_ids:
        labels.append(IGNORE_INDEX if word is None or word == previous else tags[word])
        previous = word
    return labels


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    state = json.loads(backend.to_str())
    # These two are set by every call, and say nothing of how text becomes tokens.
    return json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True)
