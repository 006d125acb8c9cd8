"""Accuracy of tokens over a vocabulary, the names of the metrics, and the one that counts."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from language import decoder_tokenizer
from language_models import make_plain

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.metrics import compute_default_metrics, default_metric_names, greater_is_better, primary_metric

TASKS = [Task("lm", "causal_lm"), Task("lm", "masked_lm")]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.type))
@pytest.mark.parametrize("seed", range(3))
def test_accuracy_counts_the_tokens_that_are_predicted(task, seed):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(6, 5, 4))
    labels = np.where(draw.random((6, 5)) < 0.4, -100, draw.integers(0, 4, (6, 5)))
    pairs = [
        (int(row[place].argmax()), label)
        for row, own in zip(logits, labels, strict=True)
        for place, label in enumerate(own)
        if label != -100
    ]
    expected = sum(guess == label for guess, label in pairs) / len(pairs)
    for predictions in (logits, logits.argmax(-1)):
        assert compute_default_metrics(task, predictions, labels)["accuracy"] == pytest.approx(expected)
    padded = np.pad(logits.argmax(-1), ((0, 0), (0, 2)), constant_values=-100)
    longer = np.pad(labels, ((0, 0), (0, 2)), constant_values=-100)
    assert compute_default_metrics(task, padded, longer)["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.type))
def test_without_a_token_accuracy_is_0(task):
    nothing = np.full((2, 3), -100)
    assert compute_default_metrics(task, nothing, nothing) == {"accuracy": 0.0}


def test_the_metric_that_counts_by_default_and_by_choice():
    mood = Task("mood", "causal_lm", prompt="{text}", labels=("good", "bad"))
    assert [primary_metric(task) for task in (*TASKS, mood)] == ["accuracy", "accuracy", "label_accuracy"]
    assert default_metric_names(TASKS[1]) == ("accuracy", "perplexity")
    assert set(default_metric_names(mood)) == {*default_metric_names(TASKS[0]), "label_accuracy"}
    assert not greater_is_better("perplexity") and not greater_is_better("eval_lm_perplexity")
    assert all(map(greater_is_better, ("label_accuracy", "rouge_l", "exact_match", "eval_lm_accuracy")))
    chosen = Task("lm", "causal_lm", prompt="{text}", metric="rouge_l")
    assert primary_metric(chosen) == "rouge_l"
    with pytest.raises(ValueError, match="task 'lm': metric 'rouge_l' is not computed for masked_lm.*accuracy, perple"):
        primary_metric(Task("lm", "masked_lm", metric="rouge_l"))
    with pytest.raises(ValueError, match="metric 'label_accuracy' is not computed for causal_lm"):
        primary_metric(Task("lm", "causal_lm", metric="label_accuracy"))


def test_a_run_can_be_decided_by_perplexity(tmp_path):
    """Perplexity is e to the mean loss of all tokens, and lower is better."""
    task = Task("lm", "causal_lm", metric="perplexity", weight=1.0)
    data = Dataset.from_dict({"text": ["the film was good", "we saw paris", "it was a very very bad film", "a film"]})
    trainer = MultiTaskTrainer(
        HardSharingModel.from_backbone(make_plain("llama, tied"), [task]),
        MultiTaskTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", primary_task="lm", per_device_eval_batch_size=3
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=decoder_tokenizer(),
    )
    metrics = trainer.evaluate()
    assert trainer.args.metric_for_best_model == "eval_lm_perplexity" and trainer.args.greater_is_better is False
    assert metrics["eval_lm_perplexity"] == pytest.approx(np.exp(metrics["eval_lm_loss"]), rel=1e-6)
    single = trainer.evaluate({"lm": data.select([0, 1])}), trainer.evaluate({"lm": data.select([2, 3])})
    tokens = [len(decoder_tokenizer()(text)["input_ids"]) for text in data["text"]]  # all but the first, and an end
    sums = [one["eval_lm_loss"] * n for one, n in zip(single, (sum(tokens[:2]), sum(tokens[2:])), strict=True)]
    assert metrics["eval_lm_loss"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-5)
