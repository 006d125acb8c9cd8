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
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data.dataset import MultiTaskDataset
from .data.prompt_rows import ANSWER, target_tokens
from .data.sources import label_key
from .models.base import MultiTaskModel
from .models.task import Task

__all__ = ["GenerationEvaluator", "check_generation"]

_NEW_TOKENS = 64  # where neither the task nor its targets say how many


def check_generation(tasks: Sequence[Task], with_generate: bool) -> None:
    """Check, before training, that what tasks ask for can be computed.

    Raises:
        ValueError: No task generates, or a task's primary metric is one of written text and none is written.
        ImportError: The package that computes ROUGE-L is missing.
    """
    able = [task for task in tasks if task.type.generates]
    if with_generate and not able:
        raise ValueError("predict_with_generate does not go with these tasks: none of them generates text")
    for task in able:
        if task.metric in ("exact_match", "rouge_l") and not with_generate:
            raise ValueError(f"task {task.name!r}: metric {task.metric!r} needs predict_with_generate=True")
    if with_generate:
        _rouge()


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
    ) -> None:
        self.model, self.task, self.collate = model, task, collate
        self.tokenizer: Any = tokenizer
        self.rows_per_batch = rows_per_batch
        self._rank = process_index, num_processes
        self._key = label_key(task.name)

    # ---- closed sets ----

    def label_accuracy(self, dataset: MultiTaskDataset) -> float:
        """Return the share of rows whose target is the likeliest of the task's labels; a collective call."""
        candidates = target_tokens(self.task, self.tokenizer)
        right: list[bool] = []
        for rows in self._batches(dataset, max(self.rows_per_batch // len(candidates[0]), 1)):
            pairs = []
            for row in rows:
                prompt, target = self._split(row)
                own = next((c for c in candidates if c[row[ANSWER]] == target), candidates[0])
                pairs += [{**row, "input_ids": prompt + tokens, self._key: len(prompt)} for tokens in own]
            losses = self._losses(pairs).view(len(rows), -1)
            best = losses.argmin(-1).tolist()
            right += [guess == row[ANSWER] for guess, row in zip(best, rows, strict=True)]
        return _mean(self._gather(right))

    @torch.no_grad()
    def _losses(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """Return `[rows]`, the negative log-likelihood of each row's target."""
        batch = self.collate(rows)
        device = self.model.device
        inputs: dict[str, Any] = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        for key in ("labels", "label_positions"):
            inputs[key] = {name: value.to(device) for name, value in inputs[key].items()}
        for counted in ("num_items", "num_tokens"):
            inputs.pop(counted, None)
        return self.model(**inputs).row_losses[self.task.name].float()

    # ---- written text ----

    def has_targets(self, dataset: MultiTaskDataset) -> bool:
        """Return whether rows have a prompt and a target, rather than a text that is predicted as a whole."""
        return dataset[0].get(self._key, 0) > 1

    def write(self, dataset: MultiTaskDataset, **options: Any) -> list[list[int]]:
        """Return the tokens that the model writes behind the prompt of each row; a collective call.

        Args:
            dataset: The rows of one source.
            **options: Arguments of `generate`; they go before `Task(generation=...)`.
        """
        wanted = {**(self.task.generation or {}), **options}
        if not {"max_new_tokens", "max_length"} & set(wanted):
            options["max_new_tokens"] = max([len(target) for _, target in map(self._split, _rows(dataset))] + [1])
            if options["max_new_tokens"] == 1 and self._key not in dataset[0]:
                options["max_new_tokens"] = _NEW_TOKENS
        if "pad_token_id" not in wanted:
            options["pad_token_id"] = self.tokenizer.pad_token_id
        written: list[list[int]] = []
        for rows in self._batches(dataset, self.rows_per_batch):
            prompts = [self._split(row)[0] for row in rows]
            padded = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            inputs = {key: padded[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            found = self.model.generate(**inputs, task=self.task.name, **options)
            written += found[:, inputs["input_ids"].shape[1] :].tolist()
        return self._gather(written)

    def text_metrics(self, dataset: MultiTaskDataset, written: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return `exact_match` and `rouge_l` of what was written for the rows of a dataset."""
        rouge = _rouge()
        texts = [self._text(tokens) for tokens in written]
        targets = [self._text(self._split(row)[1]) for row in _rows(dataset)]
        pairs = list(zip(targets, texts, strict=True))
        return {
            "exact_match": _mean([" ".join(target.split()) == " ".join(text.split()) for target, text in pairs]),
            "rouge_l": _mean([rouge(target, text) for target, text in pairs]),
        }

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _split(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return prompt and target of a prepared row; without a target the prompt is all there is."""
        ids = list(map(int, row["input_ids"]))
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
