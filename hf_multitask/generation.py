"""Evaluation of tasks that generate: what is written is compared with the target, and closed sets are ranked.

| metric | what it is |
|---|---|
| `label_accuracy` | share of rows whose own target is the likeliest of the task's `labels` |
| `exact_match` | share of rows where what is written equals the target, white space aside |
| `rouge_l` | mean F-measure of ROUGE-L (Lin 2004), with stemming, by the package `rouge-score` |

The likelihood of a target is the sum over its tokens, the one that ends it included: probabilities of whole answers,
which longer labels get no discount on. Nothing is sampled: text is written greedily unless `Task(generation=...)` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .data.dataset import MultiTaskDataset
from .data.prompt_rows import ANSWER, target_tokens
from .data.seq2seq_rows import answer_ids
from .data.sources import label_key
from .models.backbone import usable_positions
from .models.base import MultiTaskModel
from .models.target_scores import target_scores
from .models.task import Task, TaskType, closest

__all__ = ["WRITTEN_METRICS", "GenerationEvaluator", "check_generation"]

WRITTEN_METRICS = ("exact_match", "rouge_l")
"""Metrics of generated text, of tasks that generate."""

_NEW_TOKENS = 64  # where neither the task nor its targets say how many


def check_generation(tasks: Sequence[Task], with_generate: bool) -> None:
    """Check, before training, that what tasks ask for can be computed.

    Raises:
        ValueError: No task generates, a task's primary metric is one of written text and none is written, or
            `generate` does not know a task's arguments.
        ImportError: The package that computes ROUGE-L is missing.
    """
    able = [task for task in tasks if task.type.generates]
    if with_generate and not able:
        raise ValueError("predict_with_generate does not go with these tasks: none of them generates text")
    for task in able:
        if task.metric in WRITTEN_METRICS and not with_generate:
            raise ValueError(f"task {task.name!r}: metric {task.metric!r} needs predict_with_generate=True")
        if (wrong := _wrong_argument(task.generation or {})) is not None:
            raise ValueError(f"task {task.name!r}: {wrong}")
    if with_generate:
        _rouge()


def _wrong_argument(options: Mapping[str, Any]) -> str | None:
    """Return what is wrong with arguments of `generate`, or None."""
    known = vars(GenerationConfig())
    for name, value in options.items():
        if name not in known:
            return f"generation has no argument {name!r}{closest(name, known)}"
        if (name == "num_return_sequences" and value not in (None, 1)) or (name == "return_dict_in_generate" and value):
            return f"generation: {name} does not go with evaluation, where one text is written for each row"
    try:
        GenerationConfig(**options)
    except (TypeError, ValueError) as error:
        return f"generation: {error}"
    return None


def _rouge() -> Callable[[str, str], float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            'predict_with_generate computes ROUGE-L with rouge-score: pip install "hf_multitask[generation]"'
        ) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda target, written: scorer.score(target, written)["rougeL"].fmeasure


class GenerationEvaluator:
    """Ranks and writes the targets of one task's rows; several processes share the rows.

    Args:
        model: The model, unwrapped.
        task: A task that generates.
        tokenizer: Its tokenizer.
        collate: The collator.
        rows_per_batch: Rows that go through the model together.
        process_index: Rank of this process.
        num_processes: Number of processes; all must call the same methods.
        autocast: Returns a context in which the model computes, for mixed precision.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        rows_per_batch: int,
        process_index: int = 0,
        num_processes: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.task, self.collate, self.autocast = model, task, collate, autocast
        self.tokenizer: Any = tokenizer
        self.rows_per_batch = rows_per_batch
        self._rank = process_index, num_processes
        self._key = label_key(task.name)
        positions = usable_positions(model)
        self._positions = None if positions is None else positions - model.reserved_positions
        # Whether prompt and target are texts of their own, for an encoder and a decoder.
        self._reads_apart = task.type is TaskType.SEQ2SEQ_LM

    # ---- closed sets ----

    def label_accuracy(self, dataset: MultiTaskDataset) -> float:
        """Return the share of rows whose target is the likeliest of the task's labels; a collective call."""
        scores = self.label_scores(dataset)
        answers = [int(row[ANSWER]) for row in _rows(dataset)]
        return _mean([int(np.argmax(row)) == answer for row, answer in zip(scores, answers, strict=True)])

    def label_scores(self, dataset: MultiTaskDataset) -> list[list[float]]:
        """Return for each row the log-likelihood of each of the task's labels; a collective call."""
        candidates = self._candidates()
        scores: list[list[float]] = []
        for rows in self._batches(dataset, max(self.rows_per_batch // len(candidates[0]), 1)):
            prompts, answers = [], []
            for row in rows:
                prompt, _ = self._split(row)
                spaced = len(candidates) > 1 and self.tokenizer.decode(prompt[-1:])[-1:].isspace()
                answers.append(candidates[int(spaced)])
                prompts.append(self._leave_room(prompt, max(map(len, answers[-1]))))
            with self.autocast():
                found = target_scores(self.model, self.task.name, prompts, answers)
                if found is None:
                    found = self._read_again(rows, prompts, answers)
            scores += found.tolist()
        return self._gather(scores)

    def _read_again(self, rows: Any, prompts: Sequence[list[int]], answers: Sequence[list[list[int]]]) -> Tensor:
        """Return what `target_scores` returns, for models that read every prompt again for every answer."""
        parts = zip(rows, prompts, answers, strict=True)
        pairs = [self._join(row, prompt, tokens) for row, prompt, every in parts for tokens in every]
        return (-self._losses(pairs)).view(len(rows), -1)

    def _candidates(self) -> list[list[list[int]]]:
        """Return the tokens of every label: for each way in which a prompt may end, one list per label."""
        if self._reads_apart:
            return [[answer_ids(self.tokenizer, label) for label in self.task.labels or ()]]
        return target_tokens(self.task, self.tokenizer)

    def _join(self, row: Mapping[str, Any], prompt: list[int], target: list[int]) -> dict[str, Any]:
        """Return a prepared row with another target."""
        if self._reads_apart:
            return {**row, self._key: target}
        return {**row, "input_ids": prompt + target, self._key: len(prompt)}

    @torch.no_grad()
    def _losses(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """Return `[rows]`, the negative log-likelihood of each row's target."""
        batch = self.collate(rows)
        device = self.model.device
        inputs: dict[str, Any] = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        for key in ("labels", "label_positions"):
            inputs[key] = {name: value.to(device) for name, value in inputs.get(key, {}).items()}
        for counted in ("num_items", "num_tokens"):
            inputs.pop(counted, None)
        return self.model(**inputs).row_losses[self.task.name].float()

    # ---- written text ----

    def has_targets(self, dataset: MultiTaskDataset) -> bool:
        """Return whether rows have a prompt and a target, rather than a text that is predicted as a whole."""
        row = dataset[0]
        return self._key in row and (self.task.label_column is not None or row[self._key] > 1)

    def write(self, dataset: MultiTaskDataset, **options: Any) -> list[list[int]]:
        """Return the tokens that the model writes behind the prompt of each row; a collective call.

        Args:
            dataset: The rows of one source.
            **options: Arguments of `generate`; they go before `Task(generation=...)`.
        """
        wanted = {**(self.task.generation or {}), **options}
        if not {"max_new_tokens", "max_length"} & set(wanted):
            parts = [self._split(row) for row in _rows(dataset)]
            if self._key in dataset[0]:
                options["max_new_tokens"] = max([len(target) for _, target in parts] + [1])
            else:
                longest = max(len(prompt) for prompt, _ in parts)
                room = _NEW_TOKENS if self._positions is None else self._positions - longest
                options["max_new_tokens"] = max(min(_NEW_TOKENS, room), 1)
        options = {**self._defaults(), **(self.task.generation or {}), **options}
        written: list[list[int]] = []
        for rows in self._batches(dataset, self.rows_per_batch):
            new = options.get("max_new_tokens") or 1
            prompts = [self._leave_room(self._split(row)[0], new) for row in rows]
            side = "right" if self._reads_apart else "left"
            padded = self.tokenizer.pad({"input_ids": prompts}, padding_side=side, return_tensors="pt")
            inputs = {key: padded[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            with self.autocast():
                found = self.model.generate(**inputs, task=self.task.name, **options)
            # What an encoder read does not come back, but the token that every text begins with.
            written += found[:, 1 if self._reads_apart else inputs["input_ids"].shape[1] :].tolist()
        return self._gather(written)

    def _defaults(self) -> dict[str, Any]:
        """Return arguments of `generate` for what nobody asked otherwise: no chance, and the ends of the targets."""
        config = self.model.config
        ends = (config.generation or {}).get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
        known = {*(ends if isinstance(ends, (list, tuple)) else [ends]), self.tokenizer.eos_token_id} - {None}
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        return options | ({"eos_token_id": sorted(known)} if known else {})

    def _leave_room(self, prompt: list[int], behind: int) -> list[int]:
        """Return the end of a prompt that leaves room for tokens behind it among the backbone's positions."""
        if self._positions is None or self._reads_apart:
            return prompt
        return prompt[-max(self._positions - behind, 1) :]

    def text_metrics(self, dataset: MultiTaskDataset, written: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return `exact_match` and `rouge_l` of what was written for the rows of a dataset."""
        rouge = _rouge()
        texts = [self.text(tokens) for tokens in written]
        targets = [self.text(self._split(row)[1]) for row in _rows(dataset)]
        pairs = list(zip(targets, texts, strict=True))
        return {
            "exact_match": _mean([" ".join(target.split()) == " ".join(text.split()) for target, text in pairs]),
            "rouge_l": _mean([rouge(target, text) for target, text in pairs]),
        }

    def text(self, tokens: Sequence[int]) -> str:
        """Return written tokens as text, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _split(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return prompt and target of a prepared row; without a target the prompt is all there is."""
        ids = list(map(int, row["input_ids"]))
        if self._reads_apart:
            return ids, list(map(int, row.get(self._key, ())))
        start = row.get(self._key, len(ids))
        return ids[:start], ids[start:]

    # ---- processes ----

    def _batches(self, dataset: MultiTaskDataset, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield this process's rows, some at a time; rows of similar length do not come together, order is kept."""
        rank, processes = self._rank
        own = list(range(rank, len(dataset), processes))
        for start in range(0, len(own), size):
            yield [dataset[number] for number in own[start : start + size]]

    def _gather(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes in the order of the rows."""
        rank, processes = self._rank
        if processes == 1:
            return values
        numbered = gather_object([(rank + processes * i, value) for i, value in enumerate(values)])
        return [value for _, value in sorted(numbered, key=lambda pair: pair[0])]


def _rows(dataset: MultiTaskDataset) -> Iterator[dict[str, Any]]:
    for number in range(len(dataset)):
        yield dataset[number]


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
