"""Texts of any length through the encoder: cut into windows, run with windows of like length, put together again.

A text that is too long for its tasks loses its end, or is read in windows that overlap by `stride` tokens:

- *Whole texts* (classification, regression): the logits of a text are the mean over its windows, weighted by the
  tokens of the text in each. A mean of logits is a geometric mean of probabilities, so that one window in doubt does
  not blur what the others are sure of, and a regression's value is the plain weighted mean of values; the weights keep
  a short last window from counting like a full one. Tokens in an overlap count once for each of their windows.
- *Words*: each word is taken from the window where it has most context, that is where the nearer of the window's two
  ends is farthest away; entities are then found in the whole text, so that none ends because a window does.

Of a pair the longer text is cut, and the other stands in every window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data.shared_tokenizer import tokenize
from .data.words import first_tokens, space_ids, spaced, with_spaces
from .models.base import MultiTaskModel
from .models.passes import Segment
from .models.task import Task
from .prediction_answers import Word

__all__ = ["Window", "cut_into_windows", "mean_logits", "run_windows", "word_probabilities"]

# Words of running text: numbers, words with inner marks, @names and #tags, and single marks.
_WORD = re.compile(r"[@#]?\w+(?:[-'’.,:/]\w+)*|[^\w\s]")


@dataclass
class Window:
    """A row of the encoder.

    Args:
        encoding: Its tokens, of the tokenizer's backend.
        part: Which of the texts is the one that is cut.
        cut: Whether something of the text is in no window.
        spaces: Tokens that are nothing but a space.
        spaced: Whether words have a space in front that was not there.
        tasks: The tasks that read it, by name.
        logits: By task, `[C]`, or `[L, C]` for its own L tokens; on the CPU, in float32.
    """

    encoding: Any
    part: int = 0
    cut: bool = False
    spaces: frozenset[int] = frozenset()
    spaced: bool = False
    tasks: dict[str, Task] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the encoder sees: windows of equal keys need one row only."""
        return tuple(self.encoding.ids), tuple(self.encoding.type_ids)


def cut_into_windows(
    tokenizer: Any, texts: Sequence[tuple[Any, ...]], length: int, stride: int | None, numbers: Sequence[int]
) -> list[list[Window]]:
    """Return the windows of each input.

    Args:
        tokenizer: The tokenizer.
        texts: Inputs of one form: single texts or pairs, strings or lists of words.
        length: Tokens of a window, special tokens included.
        stride: Tokens that two windows share; None cuts what is too long.
        numbers: The inputs' numbers, for messages.

    Raises:
        ValueError: Windows would have no token of their own.
    """
    words = not isinstance(texts[0][0], str)
    about: dict[str, Any] = {"spaces": space_ids(tokenizer), "spaced": words and spaced(tokenizer)}
    if about["spaced"]:
        texts = [tuple(with_spaces(given)) for given in texts]
    if stride is None:
        windows = []
        for encoding in _tokenize(tokenizer, texts, length, truncation=True):
            windows.append([Window(encoding, cut=bool(encoding.overflowing), **about)])
        return windows
    parts = _longer(tokenizer, texts, length, stride, numbers)
    found: dict[int, list[Window]] = {}
    for part in sorted(set(parts)):
        places = [place for place, own in enumerate(parts) if own == part]
        truncation = "only_second" if part else "only_first"
        own = _tokenize(tokenizer, [texts[i] for i in places], length, truncation=truncation, stride=stride)
        for place, encoding in zip(places, own, strict=True):
            found[place] = [Window(each, part, **about) for each in (encoding, *encoding.overflowing)]
    return [found[place] for place in range(len(texts))]


def _tokenize(tokenizer: Any, texts: Sequence[tuple[Any, ...]], length: int, **options: Any) -> list[Any]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    words = not isinstance(texts[0][0], str)
    return tokenize(
        tokenizer, *columns, max_length=length, is_split_into_words=words, verbose=False, **options
    ).encodings


def _longer(
    tokenizer: Any, texts: Sequence[tuple[Any, ...]], length: int, stride: int, numbers: Sequence[int]
) -> list[int]:
    """Return which text of each input is the longer one, after checking that it can be cut."""
    pair = len(texts[0]) > 1
    room = length - tokenizer.num_special_tokens_to_add(pair=pair)
    parts, others = [0] * len(texts), [0] * len(texts)
    if pair:
        options = {
            "add_special_tokens": False,
            "verbose": False,
            "is_split_into_words": not isinstance(texts[0][0], str),
        }
        for i, given in enumerate(texts):
            sizes = [len(tokenize(tokenizer, text, **options).input_ids) for text in given]
            if sum(sizes) > room:
                parts[i], others[i] = int(sizes[1] >= sizes[0]), min(sizes)
    for number, other in zip(numbers, others, strict=True):
        if stride >= room - other:
            behind = f" beside the {other} of the shorter text" if other else ""
            raise ValueError(
                f"input {number}: stride={stride} leaves no token of its own to a window, where max_length={length} "
                f"has room for {max(room - other, 0)}{behind}; take a smaller stride"
            )
    return parts


@torch.inference_mode()
def run_windows(model: MultiTaskModel, tokenizer: Any, windows: Iterable[Window], batch_size: int) -> None:
    """Compute the logits of windows: tasks of the same window share its pass, and like lengths come together.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        windows: The windows; they get their `logits`.
        batch_size: Rows per pass of the encoder.
    """
    groups: dict[tuple[str, ...], list[Window]] = {}
    for window in windows:
        groups.setdefault(tuple(window.tasks), []).append(window)
    for names, members in groups.items():
        members.sort(key=lambda window: len(window.encoding.ids))
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            inputs = _pad(tokenizer, [window.encoding for window in batch])
            whole = Segment(0, *inputs["input_ids"].shape)
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            logits = model(**inputs, segments=dict.fromkeys(names, whole)).logits
            for name in names:
                for window, own in zip(batch, logits[name].float().cpu(), strict=True):
                    window.logits[name] = own[: len(window.encoding.ids)] if own.dim() > 1 else own


def _pad(tokenizer: Any, encodings: Sequence[Any]) -> dict[str, Tensor]:
    """Return encodings as the model's inputs, `[rows, L]`, padded on the right."""
    columns = {"input_ids": ("ids", tokenizer.pad_token_id), "attention_mask": ("attention_mask", 0)}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = ("type_ids", tokenizer.pad_token_type_id)
    return {
        name: pad_sequence([torch.tensor(getattr(one, source)) for one in encodings], True, padding)
        for name, (source, padding) in columns.items()
    }


def mean_logits(windows: Sequence[Window], name: str) -> Tensor:
    """Return the logits of a whole text, `[C]`: their mean over its windows, weighted by the text's tokens in each."""
    if len(windows) == 1:
        return windows[0].logits[name]
    sizes = torch.tensor([float(window.encoding.sequence_ids.count(window.part)) for window in windows])
    return (torch.stack([window.logits[name] for window in windows]) * (sizes / sizes.sum()).unsqueeze(-1)).sum(0)


def word_probabilities(windows: Sequence[Window], text: Any, task: Task) -> tuple[list[Word], Tensor]:
    """Return the words of an input's first text that were read, and their labels' probabilities, `[words, C]`.

    A word has the label of its first token, as in training.
    """
    best: dict[Word, tuple[int, int, int]] = {}  # of each word: context, window, token
    for number, window in enumerate(windows):
        for word, token, context in _words_in(window, text):
            if word not in best or context > best[word][0]:
                best[word] = context, number, token
    words = sorted(best)
    if not words:
        return [], torch.zeros(0, task.num_outputs)
    logits = [window.logits[task.name] for window in windows]
    rows = torch.stack([logits[number][token] for _, number, token in map(best.__getitem__, words)])
    return words, rows.softmax(-1)


def _words_in(window: Window, text: Any) -> list[tuple[Word, int, int]]:
    """Return the words of a window: where they are in the text, their first token, and how much context that has."""
    encoding = window.encoding
    sequence = encoding.sequence_ids
    places = [place for place, part in enumerate(sequence) if part == 0]
    if not places:
        return []
    first, last = places[0], places[-1]
    offsets = encoding.offsets
    blank = [token in window.spaces for token in encoding.ids]
    found: list[tuple[Word, int, int]] = []

    def note(word: Word, token: int, begins: int) -> None:
        # Its beginning may be in the window before, or all but the space in front in the one after.
        elsewhere = blank[token] or (token == first and offsets[token][0] > begins)
        found.append((word, token, -1 if elsewhere else min(token - first, last - token)))

    if not isinstance(text, str):
        word_ids = [number if part == 0 else None for number, part in zip(encoding.word_ids, sequence, strict=True)]
        for token in first_tokens(word_ids, blank):
            number = encoding.word_ids[token]
            note((number, number + 1), token, int(window.spaced and number > 0))
        return found
    token, position = first, offsets[first][0]
    for match in _WORD.finditer(text):
        if match.end() <= position:
            continue
        while token <= last and (offsets[token][1] <= match.start() or blank[token]):
            token += 1
        if token > last:
            break  # the rest is in no token of this window
        if offsets[token][0] < match.end():
            note((match.start(), match.end()), token, match.start())
    return found
