"""Raw text in, readable answers out: every task of a saved model from one pass of the encoder.

A [`Predictor`] is what `hf-multitask predict` runs. Answers by task type:

| type | answer |
|---|---|
| `single_label_classification` | `{"label": ..., "score": ...}` |
| `multi_label_classification` | `[{"label": ..., "score": ...}, ...]`, those above 0.5 |
| `regression` | a number, or `{name: number}` where the task names several values |
| `token_classification` | entities `[{"label", "text", "start", "end", "score"}, ...]` |
| `question_answering` | `{"answer", "start", "end", "score"}`; an empty answer from 0 to 0 where there is none |
| `multiple_choice` | `{"label", "choice", "score"}`, the number of the choice and its text |
| `causal_lm`, `seq2seq_lm` | `{"text"}`, what is written; `{"label", "score"}` where targets are a closed set |

Scores are probabilities in [0, 1], an entity's is that of its least certain word; `start` and `end` count characters
of the text (words, for input that is a list of words). Where tags are no BIO scheme, every word is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .data.preprocessing import longest_input
from .models.auto import AutoModelForMultiTask
from .models.base import MultiTaskModel
from .models.passes import Segment
from .models.task import Task, TaskType, closest
from .row_prediction import predict_rows, reads_own_rows
from .text_prediction import predict_texts

__all__ = ["Predictor"]

# Words of running text: numbers, words with inner marks, @names and #tags, and single marks.
_WORD = re.compile(r"[@#]?\w+(?:[-'’.,:/]\w+)*|[^\w\s]")

Text = str | Sequence[str] | tuple[str, str] | dict[str, Any]


class Predictor:
    """Predicts the tasks of a multi-task model for raw text.

    Args:
        model: The model.
        tokenizer: Its tokenizer, a fast one.
        max_length: Longest input in tokens; longer texts are cut, contexts of questions read in several windows
            (default: what the model was trained on).

    Raises:
        ValueError: The tokenizer cannot tell where its tokens lie in the text, or all tasks are `masked_lm`, which
            has no answers.
    """

    def __init__(self, model: MultiTaskModel, tokenizer: Any, max_length: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} has no offsets; a fast tokenizer is needed")
        self.model = model.eval()
        self.tokenizer = tokenizer
        # Words that nobody hid are not looked for.
        able = [task for task in model.tasks if not task.auxiliary and task.type is not TaskType.MASKED_LM]
        self.tasks = {task.name: task for task in able}
        if not able:
            raise ValueError("none of the model's tasks says something about a text: they are masked_lm")
        self.max_length = longest_input(tokenizer, model, max_length or model.config.max_input_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Load model and tokenizer from a folder or a Hub id.

        Raises:
            FileNotFoundError: It looks like a folder and there is none.
        """
        folder = str(folder)
        if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"model folder {folder!r} does not exist")
        model = AutoModelForMultiTask.from_pretrained(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), AutoTokenizer.from_pretrained(folder))

    def __call__(
        self, texts: Iterable[Text], tasks: Sequence[str] | None = None, batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Yield one dictionary of answers by task for each text.

        Args:
            texts: Strings; pairs of strings as a tuple (question and context); lists of words; texts and a list of
                choices as a tuple; or rows with the tasks' columns.
            tasks: Names of the tasks (default: all that can read the text and are not auxiliary).
            batch_size: Texts per pass of the encoder.

        Raises:
            ValueError: A task is unknown, or a text is of no form that it can read.
        """
        for name in tasks or ():
            if name not in self.tasks:
                raise ValueError(f"no task {name!r}{closest(name, self.tasks)}; tasks are {', '.join(self.tasks)}")
        chosen = [self.tasks[name] for name in (tasks or self.tasks)]
        # What each input is for each way of reading it: the tasks that read it so share one pass of the encoder.
        rows = [self._read(text, chosen, number, fitting=not tasks) for number, text in enumerate(texts)]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers: list[dict[str, Any]] = [{} for _ in batch]
            passes: dict[tuple, tuple[list[int], list[tuple[Any, ...]]]] = {}
            for i, readings in enumerate(batch):
                for names, length, row in readings:
                    # A pass takes texts of one form: single or pair, running text or words.
                    places, inputs = passes.setdefault((names, length, len(row), isinstance(row[0], str)), ([], []))
                    places.append(i)
                    inputs.append(row)
            for (names, length, *_), (places, inputs) in passes.items():
                if reads_own_rows(task := self.tasks[names[0]]):
                    numbers = [start + place for place in places]
                    answer_rows = predict_texts if task.type.generates else predict_rows
                    own = answer_rows(self.model, self.tokenizer, task, inputs, numbers, length, batch_size)
                    found = [{task.name: answer} for answer in own]
                else:
                    found = self._predict(inputs, [self.tasks[name] for name in names], length)
                for i, answer in zip(places, found, strict=True):
                    answers[i] |= answer
            for answer in answers:
                yield {task.name: answer[task.name] for task in chosen if task.name in answer}

    def _read(
        self, text: Text, tasks: Sequence[Task], number: int, fitting: bool
    ) -> list[tuple[tuple[str, ...], int, tuple[Any, ...]]]:
        """Return how the tasks read one input: (names of the tasks, longest input, texts) for each way.

        With `fitting`, tasks that read something else are left out; one must be left.
        """
        groups: dict[tuple, list[str]] = {}
        misfits = []
        for task in tasks:
            length = min(task.max_length or self.max_length, self.max_length)
            own = task.name if reads_own_rows(task) else None
            if isinstance(text, dict):
                fits = {*task.text_columns, *(task.choice_columns or ())} <= set(text)
                key: tuple = (length, task.text_columns, own)
            else:
                several = len(text) if isinstance(text, tuple) else 1
                # Words all along are a text; behind a text they are choices.
                chooses = several > 1 and isinstance(text[0], str) and isinstance(text[-1], list)
                fits = len(task.text_columns) == several - chooses and chooses == (task.choice_columns is not None)
                key = (length, None, own)
            if fits:
                groups.setdefault(key, []).append(task.name)
            else:
                misfits.append(task)
        if misfits and (not fitting or not groups):
            task = misfits[0]
            if isinstance(text, dict):
                wanted = sorted({c for task in misfits for c in (*task.text_columns, *(task.choice_columns or ()))})
                raise ValueError(
                    f"input {number} has the keys {sorted(text)}; the tasks read {', '.join(wanted)}; "
                    "choose the tasks that fit"
                )
            form = "a pair of texts" if len(task.text_columns) == 2 else "one text"
            form += " and a list of choices" if task.choice_columns else ""
            given = len(text) if isinstance(text, tuple) else 1
            raise ValueError(
                f"input {number}: task {task.name!r} reads {form}, got {given} text(s); choose other tasks"
            )
        readings = []
        for (length, columns, _), names in groups.items():
            row = tuple(text[c] for c in columns) if columns else text if isinstance(text, tuple) else (text,)
            choices = self.tasks[names[0]].choice_columns
            if isinstance(text, dict) and choices:
                row = (*row, text[choices[0]] if len(choices) == 1 else [text[c] for c in choices])
            for part in row:
                words = isinstance(part, list) and all(isinstance(word, str) for word in part)
                if self.tasks[names[0]].type.generates:  # chat messages, too
                    words = words or (isinstance(part, list) and all(isinstance(one, dict) for one in part))
                if not (isinstance(part, str) or words) or not part or (isinstance(part, str) and not part.strip()):
                    raise ValueError(f"input {number} is {part!r}; a text must be a non-empty string or list of words")
            readings.append((tuple(names), length, row))
        return readings

    @torch.inference_mode()
    def _predict(self, rows: Sequence[tuple[Any, ...]], tasks: Sequence[Task], length: int) -> list[dict[str, Any]]:
        words = not isinstance(rows[0][0], str)
        encoded = self.tokenizer(
            *[[row[i] for row in rows] for i in range(len(rows[0]))],
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
            is_split_into_words=words,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        offsets = encoded.pop("offset_mapping").tolist()
        whole = Segment(0, len(rows), encoded["input_ids"].shape[1])
        inputs = {key: value.to(self.model.device) for key, value in encoded.items()}
        logits = self.model(**inputs, segments={task.name: whole for task in tasks}).logits
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for task in tasks:
            scores = logits[task.name].float().cpu()
            if task.type is TaskType.TOKEN_CLASSIFICATION:
                for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
                    spans = (
                        _given_words(row[0], encoded.word_ids(i))
                        if words
                        else _found_words(row[0], offsets[i], encoded.sequence_ids(i))
                    )
                    answer[task.name] = _entities(task, row[0], spans, scores[i].softmax(-1))
            else:
                for answer, row_scores in zip(answers, scores, strict=True):
                    answer[task.name] = _answer(task, row_scores)
        return answers


def _answer(task: Task, scores: torch.Tensor) -> Any:
    """Return the readable form of one row's logits, `[C]`."""
    labels = task.labels or ()
    if task.type is TaskType.REGRESSION:
        values = [round(value, 4) for value in scores.tolist()]
        return dict(zip(labels, values, strict=True)) if labels else values[0]
    if task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        probabilities = scores.sigmoid().tolist()
        return [
            {"label": label, "score": round(p, 4)} for label, p in zip(labels, probabilities, strict=True) if p > 0.5
        ]
    probability, best = scores.softmax(-1).max(-1)
    return {"label": labels[int(best)], "score": round(float(probability), 4)}


# A word as (token that carries its label, start, end).
_Span = tuple[int, int, int]


def _given_words(words: Sequence[str], word_ids: Sequence[int | None]) -> list[_Span]:
    first = {word: token for token, word in reversed(list(enumerate(word_ids))) if word is not None}
    return [(first[word], word, word + 1) for word in range(len(words)) if word in first]


def _found_words(text: str, offsets: Sequence[Sequence[int]], sequence_ids: Sequence[int | None]) -> list[_Span]:
    """Return the words of running text, each with the first token that reaches into it."""
    spans, token = [], 0
    for match in _WORD.finditer(text):
        while token < len(offsets) and (sequence_ids[token] is None or offsets[token][1] <= match.start()):
            token += 1
        if token == len(offsets):
            break  # the rest was truncated
        if offsets[token][0] < match.end():
            spans.append((token, match.start(), match.end()))
    return spans


def _entities(task: Task, text: Any, spans: Sequence[_Span], probabilities: torch.Tensor) -> list[dict[str, Any]]:
    """Return the entities of one row (`probabilities` is `[L, C]`), or its words where labels are no BIO scheme."""
    labels = task.labels or ()
    bio = any(label.startswith("B-") for label in labels)
    best_scores, best = probabilities.max(-1)
    found: list[dict[str, Any]] = []
    previous = "O"
    for token, start, end in spans:
        label, score = labels[int(best[token])], float(best_scores[token])
        kind = label.split("-", 1)[-1] if bio else label
        if bio and label.startswith("I-") and previous.split("-", 1)[-1] == kind and previous != "O":
            found[-1]["end"] = end
            found[-1]["score"] = min(found[-1]["score"], score)
        elif not bio or label != "O":
            found.append({"label": kind, "text": "", "start": start, "end": end, "score": score})
        previous = label
    for entity in found:
        part = text[entity["start"] : entity["end"]]
        entity["text"] = part if isinstance(part, str) else " ".join(part)
        entity["score"] = round(entity["score"], 4)
    return found
