"""One batch of raw rows → the columns of prepared rows, or an error that names task, column and row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..models.heads import IGNORE_INDEX
from ..models.task import Task, TaskType
from .labels import LabelEncoder, LabelError, label_feature
from .shared_tokenizer import tokenize
from .sources import Source, label_key
from .words import first_tokens, space_ids, spaced, with_spaces

__all__ = ["Labels", "RowEncoder", "TextRows", "TokenizedRows", "tokenizer_key"]

_VERSION = 6  # part of the cache key: raise it when the prepared form changes


Labels = bool | None | frozenset[str]
"""Whether label columns are read: all must be there (True), those that are there are (None), or those of some tasks."""


class RowEncoder:
    """Common part of the two kinds of rows: finds the label columns, encodes a batch of rows."""

    special_tokens = 0
    has_token_types = False
    # Whether each row gives one prepared row, so that a stream can be prepared as it comes.
    keeps_rows = True

    def __init__(self, columns: Features, source: Source, labels: Labels, max_length: int) -> None:
        self.max_length = max_length
        self.labelled: list[Task] = []
        self.encoders: dict[str, LabelEncoder] = {}
        for task in source.tasks:
            wanted = task.name in labels if isinstance(labels, frozenset) else labels is not False
            if task.type is TaskType.MASKED_LM and wanted:
                self.labelled.append(task)  # the text itself is the label
            if task.label_column is None:
                continue
            column = self._label_column(task, columns, source)
            if column not in columns:
                if labels is True:
                    raise ValueError(
                        f"task {task.name!r}: no column {column!r} for the labels; columns are {', '.join(columns)}"
                    )
                continue
            if wanted and not task.type.is_language:
                self.labelled.append(task)
                self.encoders[task.name] = self._make_encoder(task, column, columns)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        raise NotImplementedError

    @property
    def features(self) -> Features:
        """Columns and types of prepared rows."""
        return Features(
            {"input_ids": List(Value("int32"))}
            | ({"token_type_ids": List(Value("int8"))} if self.has_token_types else {})
            | {label_key(task.name): label_feature(task) for task in self.labelled}
        )

    def _label_column(self, task: Task, columns: Features, source: Source) -> str:
        return task.label_column

    def _make_encoder(self, task: Task, column: str, columns: Features) -> LabelEncoder:
        return LabelEncoder(task, column, columns)

    def lengths(self, encoded: Mapping[str, list]) -> list[int]:
        """Return the tokens of each prepared row, of which as many as `max_length` can be read."""
        return [len(ids) for ids in encoded["input_ids"]]

    def check(self, rows: Any) -> None:
        """Raise ValueError where a prepared table as a whole is of no use."""

    def cut_targets(self, columns: Mapping[str, Sequence[Any]]) -> int:
        """Return of how many prepared rows, given by columns, the target was cut."""
        return 0

    def check_cut(self, cut: int, seen: int, at_least: int = 0) -> None:
        """Raise ValueError where too many targets were cut of the rows that were seen.

        Args:
            cut: Targets that were cut.
            seen: Rows so far.
            at_least: Rows that there are surely going to be.
        """

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        return [
            type(self).__name__,
            _VERSION,
            [(task.to_dict(), getattr(self.encoders.get(task.name), "column", None)) for task in self.labelled],
        ]

    def fingerprint(self, dataset: Dataset) -> str:
        """Return a cache key of content: pickling a tokenizer would hash the padding it was last called with."""
        return Hasher.hash([dataset._fingerprint, *self.key()])


class TextRows(RowEncoder):
    """Rows of text."""

    def __init__(
        self,
        columns: Features,
        source: Source,
        labels: Labels,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.columns = source.text_columns
        for column in self.columns:
            if column not in columns:
                raise ValueError(
                    f"task {source.tasks[0].name!r}: no text column {column!r}; columns are {', '.join(columns)}"
                )
        if tokenizer is None:
            raise ValueError("processing_class is missing: the rows hold text and need the backbone's tokenizer")
        self.words = isinstance(columns[self.columns[0]], List)
        for column in self.columns:
            feature = columns[column]
            value = feature.feature if isinstance(feature, List) else feature
            if not isinstance(value, Value) or value.dtype not in ("string", "large_string"):
                raise ValueError(
                    f"text column {column!r} has the type {feature}; it must hold strings or lists of words"
                )
            if isinstance(feature, List) != self.words:
                raise ValueError(f"text columns {self.columns}: one holds texts, the other lists of words")
        super().__init__(columns, source, labels, max_length)
        for task in self.labelled:
            if task.type is TaskType.TOKEN_CLASSIFICATION and not self.words:
                raise ValueError(
                    f"task {task.name!r}: column {self.columns[0]!r} must hold lists of words, one per tag"
                )
        self.tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.spaced = self.words and spaced(tokenizer)
        self.space_ids = space_ids(tokenizer)
        pair = len(self.columns) == 2
        self.special_tokens = tokenizer.num_special_tokens_to_add(pair=pair)
        if max_length <= self.special_tokens:
            raise ValueError(
                f"max_length={max_length} leaves no room: the tokenizer adds {self.special_tokens} special tokens"
            )
        # For single texts they are all 0, which is what a backbone takes without them.
        self.has_token_types = pair and "token_type_ids" in tokenizer.model_input_names

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        side = self.tokenizer.truncation_side
        return [
            *super().key(),
            self.columns,
            self.max_length,
            self.has_token_types,
            sorted(self.special_ids),
            side,
            tokenizer_key(self.tokenizer),
        ]

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        texts = [batch[column] for column in self.columns]
        for column, values in zip(self.columns, texts, strict=True):
            for row, value in zip(indices, values, strict=True):
                if value is None or (self.words and None in value):
                    raise ValueError(f"text None in row {row} of column {column!r}; filter such rows out")
        encoded = tokenize(
            self.tokenizer,
            *(map(with_spaces, texts) if self.spaced else texts),
            truncation=True,
            max_length=self.max_length,
            is_split_into_words=self.words,
            return_attention_mask=False,
            return_token_type_ids=self.has_token_types,
        )
        for row, ids in zip(indices, encoded["input_ids"], strict=True):
            if not ids:
                raise ValueError(f"row {row} of column {self.columns[0]!r} is empty and has no token; filter it out")
        result = {"input_ids": encoded["input_ids"]}
        if self.has_token_types:
            result["token_type_ids"] = encoded["token_type_ids"]
        for task in self.labelled:
            if task.type is TaskType.MASKED_LM:
                result[label_key(task.name)] = [
                    self._words(encoded.word_ids(i), ids) for i, ids in enumerate(encoded["input_ids"])
                ]
                continue
            encoder = self.encoders[task.name]
            labels = encoder.encode(batch[encoder.column], indices[0])
            if task.type is TaskType.TOKEN_CLASSIFICATION:
                for row, words, tags in zip(indices, texts[0], labels, strict=True):
                    if len(words) != len(tags):
                        raise LabelError(
                            f"task {task.name!r}: row {row} has {len(words)} words in column {self.columns[0]!r} and "
                            f"{len(tags)} labels in column {encoder.column!r}",
                            task.name,
                        )
                labels = [
                    first_subword_labels(encoded.word_ids(i), tags, [token in self.space_ids for token in ids])
                    for i, (tags, ids) in enumerate(zip(labels, encoded["input_ids"], strict=True))
                ]
            result[label_key(task.name)] = labels
        return result

    def _words(self, word_ids: Sequence[int | None], ids: Sequence[int]) -> list[int]:
        """Return the number of each token's word; unknown words and special tokens in the text itself are none."""
        pairs = zip(word_ids, ids, strict=True)
        return word_numbers([None if token in self.special_ids else word for word, token in pairs])


class TokenizedRows(RowEncoder):
    """Rows that were tokenized before; padding is taken out again."""

    def __init__(
        self,
        columns: Features,
        source: Source,
        labels: Labels,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        super().__init__(columns, source, labels, max_length)
        self.has_token_types = "token_type_ids" in columns
        self.vocabulary = None if tokenizer is None else len(tokenizer)
        self.special_ids = frozenset([] if tokenizer is None else tokenizer.all_special_ids)
        for task in self.labelled:
            if task.whole_words:
                raise ValueError(f"task {task.name!r}: whole_words needs texts; in tokenized rows words are not known")

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        return [*super().key(), self.max_length, self.vocabulary]

    def _label_column(self, task: Task, columns: Features, source: Source) -> str:
        candidates = [label_key(task.name), task.label_column]
        if len(source.tasks) == 1:
            candidates += ["labels", "label"]
        return next((c for c in candidates if c in columns), task.label_column)

    def _make_encoder(self, task: Task, column: str, columns: Features) -> LabelEncoder:
        ignored = (IGNORE_INDEX,) if task.type is TaskType.TOKEN_CLASSIFICATION else ()
        return LabelEncoder(task, column, columns, encoded=column == label_key(task.name), ignored=ignored)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        masks = batch.get("attention_mask") or [[1] * len(ids or ()) for ids in batch["input_ids"]]
        for row, ids, mask in zip(indices, batch["input_ids"], masks, strict=True):
            self._check(row, ids, mask)

        def unpadded(values: list[list[int]]) -> list[list[int]]:
            return [[v for v, m in zip(row, mask, strict=True) if m] for row, mask in zip(values, masks, strict=True)]

        result = {key: unpadded(batch[key]) for key in ("input_ids", "token_type_ids") if key in batch}
        for task in self.labelled:
            if task.type is TaskType.MASKED_LM:
                result[label_key(task.name)] = [
                    word_numbers([None if i in self.special_ids else place for place, i in enumerate(ids)])
                    for ids in result["input_ids"]
                ]
                continue
            encoder = self.encoders[task.name]
            labels = encoder.encode(batch[encoder.column], indices[0])
            if task.type is TaskType.TOKEN_CLASSIFICATION:
                for row, ids, tags in zip(indices, batch["input_ids"], labels, strict=True):
                    if len(ids) != len(tags):
                        raise LabelError(
                            f"task {task.name!r}: row {row} has {len(ids)} input_ids and {len(tags)} labels in column "
                            f"{encoder.column!r}",
                            task.name,
                        )
                labels = unpadded(labels)
            result[label_key(task.name)] = labels
        return result

    def _check(self, row: int, ids: Any, mask: Any) -> None:
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"row {row} of column 'input_ids' holds {ids!r}; it must hold a list of token ids")
        if not isinstance(mask, list) or len(mask) != len(ids):
            raise ValueError(f"row {row}: attention_mask must be as long as input_ids, {len(ids)}; it is {mask!r}")
        if not any(mask):
            raise ValueError(f"row {row} has no token; filter it out")
        if sum(map(bool, mask)) > self.max_length:
            # Cut here, the text would lose the token that ends it.
            raise ValueError(
                f"row {row} has {sum(map(bool, mask))} tokens, more than max_length={self.max_length}: tokenize with "
                "truncation, or raise max_length"
            )
        if self.vocabulary is not None and ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise ValueError(f"row {row} holds token ids outside the tokenizer's 0 to {self.vocabulary - 1}")


def word_numbers(word_ids: Sequence[int | None]) -> list[int]:
    """Return the number of each token's word, -100 for special tokens; pairs of texts count their words on.

    Example:
        >>> word_numbers([None, 0, 1, 1, None, 0, None])
        [-100, 0, 1, 1, -100, 2, -100]
    """
    numbers: list[int] = []
    offset, last = 0, -1
    for word in word_ids:
        if word is None:
            offset = last + 1
            numbers.append(IGNORE_INDEX)
        else:
            last = offset + word
            numbers.append(last)
    return numbers


def first_subword_labels(
    word_ids: Sequence[int | None], tags: Sequence[int], blank: Sequence[bool] | None = None
) -> list[int]:
    """Return one label per token: a word's at its first subword, -100 elsewhere.

    Args:
        word_ids: The number of each token's word, None for special tokens.
        tags: The label of each word.
        blank: Of each token, whether it is nothing but a space; one that is not comes first.

    Example:
        >>> first_subword_labels([None, 0, 1, 1, None], [3, 5])
        [-100, 3, 5, -100, -100]
    """
    labels = [IGNORE_INDEX] * len(word_ids)
    for place in first_tokens(word_ids, blank):
        labels[place] = tags[word_ids[place]]  # type: ignore[index]
    return labels


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what of a tokenizer decides how texts become tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    state = json.loads(backend.to_str())
    # These two are set by every call, and say nothing of how text becomes tokens.
    return json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True)
