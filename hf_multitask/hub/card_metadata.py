"""The metadata of a model card: what the Hub filters and ranks by.

The results in `model-index` are each task's own, on its own dataset. huggingface_hub joins results whose task type,
dataset and split are the same under the name of the first, so that of two tasks that read the same rows one would get
the other's metrics; here every task's results are made by themselves and put behind each other.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from .card_facts import CardFacts, TaskFacts
from .card_text import plain

__all__ = ["TASK_TYPES", "card_metadata", "eval_results"]

# What the Hub calls a type of task.
TASK_TYPES = {
    "single_label_classification": "text-classification",
    "multi_label_classification": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "seq2seq_lm": "text-generation",
}

# Metrics that have another identifier on the Hub; all others go by their own name.
_METRIC_TYPES = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "label_accuracy": "accuracy",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "rouge_l": "rouge",
}


def eval_results(task: TaskFacts) -> list[EvalResult]:
    """Return the results of one task: its own metrics on its own dataset, without losses."""
    return [
        EvalResult(
            task_type=TASK_TYPES[task.type],
            task_name=task.name,
            dataset_type=plain(task.dataset.type),
            dataset_name=plain(task.dataset.name),
            dataset_config=None if task.dataset.config is None else plain(task.dataset.config),
            dataset_split=split,
            dataset_revision=None if task.dataset.revision is None else plain(task.dataset.revision),
            metric_type=_METRIC_TYPES.get(name, plain(name)),
            metric_name=plain(name),
            metric_value=value,
        )
        for split, metrics in task.metrics.items()
        for name, value in metrics.items()
        if name != "loss" and not task.auxiliary and not _is_time(name)
    ]


def _is_time(name: str) -> bool:
    return name.endswith(("runtime", "_per_second"))


def card_metadata(facts: CardFacts) -> dict[str, Any]:
    """Return the metadata as plain types, in the order in which they are written; what is not known is not there."""
    served = [task for task in facts.tasks if task.served]
    kinds = {TASK_TYPES[task.type] for task in served}
    datasets = list(dict.fromkeys(task.dataset.hub_id for task in facts.tasks if task.dataset.hub_id))
    tags = ["multi-task-learning", *sorted(kinds), *map(plain, facts.tags)]
    emitted: dict[str, Any] = {"co2_eq_emissions": {"emissions": facts.emissions, "source": "codecarbon"}}
    data = ModelCardData(
        base_model=facts.backbone,
        language=[plain(one) for one in facts.languages] or None,
        license=None if facts.license is None else plain(facts.license),
        library_name="hf_multitask",
        pipeline_tag=next(iter(kinds)) if len(kinds) == 1 else None,
        tags=list(dict.fromkeys(tags)),
        datasets=datasets or None,
        **({} if facts.emissions is None else emitted),
    )
    metadata = data.to_dict()
    name = plain(facts.name)
    results = [
        entry
        for task in facts.tasks
        if (own := eval_results(task))
        for entry in eval_results_to_model_index(name, own)[0]["results"]
    ]
    if results:
        metadata["model-index"] = [{"name": name, "results": results}]
    return metadata
