"""The trainer's laws: it is `Trainer` for a plain model, and layouts of the same rows give the same update."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tasks
from datasets import Dataset, DatasetDict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.models.passes import Segment


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights, relative to the size of the tensor it is in."""
    return max(((a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1e-3)).item() for name in a)


class Losses(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append({key: logs[key] for key in ("loss", "grad_norm") if key in logs})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.sample(2)
def test_one_plain_dataset_and_model_is_trainer_bit_for_bit(tmp_path, tokenizer, datasets, accumulation):
    rows = datasets["reviews"].map(
        lambda row: {**tokenizer(row["text"]), "labels": int(row["label"] == "positive")},
        remove_columns=datasets["reviews"].column_names,
    )

    def run(trainer_class, args_class, name):
        set_seed(3)
        config = BertConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        model = BertForSequenceClassification(config)
        args = args_class(
            str(tmp_path / name),
            max_steps=20,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            report_to="none",
            eval_strategy="steps",
            eval_steps=10,
            save_steps=10,
            use_cpu=True,
            disable_tqdm=True,
        )
        losses = Losses()
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=[losses],
        )
        trainer.train()
        return losses.lines, weights(model), sorted(p.name for p in Path(tmp_path / name, "checkpoint-20").iterdir())

    lines, expected, files = run(Trainer, TrainingArguments, "plain")
    own_lines, own, own_files = run(MultiTaskTrainer, MultiTaskTrainingArguments, "multi")
    assert own_lines == lines and len([line for line in lines if "grad_norm" in line]) == 20
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert own_files == files


LAYOUTS = {"8 x 4": (4, 8), "2 x 16": (16, 2), "32 x 1": (1, 32)}


@pytest.mark.parametrize("reduction", ["rows", "tasks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(6)
def test_a_window_gives_one_update_however_it_is_cut(make_trainer, bert, tasks, layout, reduction):
    def run(batch, accumulation):
        torch.manual_seed(0)
        bert.config.hidden_dropout_prob = bert.config.attention_probs_dropout_prob = 0.0
        model = HardSharingModel.from_backbone(bert, tasks, head_dropout=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = make_trainer(
            model,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            loss_reduction=reduction,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        return weights(model), [line for line in trainer.state.log_history if "loss" in line]

    whole, log = run(32, 1)
    cut, cut_log = run(*LAYOUTS[layout])
    assert largest_difference(whole, cut) < 1e-5
    for line, other in zip(log, cut_log, strict=True):
        assert {key for key in line} == {key for key in other}
        for key in line:
            assert other[key] == pytest.approx(line[key], rel=1e-4), key


@pytest.mark.parametrize("reduction", ["rows", "tasks"])
def test_the_loss_is_the_sum_of_shares_weights_and_mean_item_losses(make_trainer, bert, datasets, reduction):
    tasks = [
        Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews", weight=0.5),
        Task("names", "token_classification", labels=("O", "B-person", "B-place"), weight=3.0),
    ]
    model = HardSharingModel.from_backbone(bert, tasks).eval()
    trainer = make_trainer(
        model, loss_reduction=reduction, train={name: datasets[name] for name in ("reviews", "names")}
    )
    batches, window = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, torch.device("cpu"))
    losses, rows, items = {"tone": 0.0, "names": 0.0}, {"tone": 0, "names": 0}, {"tone": 0, "names": 0}
    for batch in batches:
        for task, segment in batch["segments"].items():
            for row in range(segment.start, segment.stop):
                length = int(batch["attention_mask"][row].sum())
                logits = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits[task]
                label = batch["labels"][task][row - segment.start]
                rows[task] += 1
                if task == "names":
                    label = label[:length]
                    losses[task] += torch.nn.functional.cross_entropy(logits[0], label, reduction="sum").item()
                    items[task] += int((label != -100).sum())
                else:
                    losses[task] += torch.nn.functional.cross_entropy(logits[0], label).item()
                    items[task] += 1
    assert window.rows == rows and window.items == items
    share = {t: rows[t] / sum(rows.values()) if reduction == "rows" else 0.5 for t in rows}
    expected = sum(share[t.name] * t.weight * losses[t.name] / items[t.name] for t in tasks)
    with torch.no_grad():
        total = sum(trainer.compute_loss(model, batch, num_items_in_batch=window).item() for batch in batches)
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_step_leaves_heads_without_rows_and_their_optimizer_state_untouched(make_trainer, model):
    before = weights(model)
    trainer = make_trainer(
        model,
        task_sampling="weighted",
        task_sampling_kwargs={"weights": {"reviews": 1, "traits": 1, "names": 0}},
        weight_decay=0.1,
    )
    trainer.train()
    after = weights(model)
    idle = {f"heads.names.{name}" for name, _ in model.heads["names"].named_parameters()}
    assert idle and all(torch.equal(before[name], after[name]) for name in idle)
    touched = {id(parameter) for parameter in trainer.optimizer.state}
    assert not touched & {id(parameter) for parameter in model.heads["names"].parameters()}
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("heads.tone"))


def test_every_log_line_holds_losses_and_shares_of_all_tasks_that_came(make_trainer, model):
    trainer = make_trainer(model, max_steps=6, logging_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        shares = {key: value for key, value in line.items() if key.startswith("share/")}
        assert set(shares) == {f"share/{task.name}" for task in model.tasks}
        assert sum(shares.values()) == pytest.approx(1)
        assert {f"loss/{k.removeprefix('share/')}" for k, v in shares.items() if v} == {
            key for key in line if key.startswith("loss/")
        }
        total = sum(line[f"loss/{k.removeprefix('share/')}"] * v for k, v in shares.items() if v)
        assert line["loss"] == pytest.approx(total, rel=0.2)  # means of products against products of means
    assert sum(trainer.progress.rows_seen.values()) > 6 * 8


def test_evaluation_has_the_keys_of_every_task_and_the_average_once(make_trainer, model, datasets):
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics)

    trainer = make_trainer(model, evaluation=DatasetDict(datasets), trainer_kwargs={"callbacks": [Watch()]})
    metrics = trainer.evaluate()
    primary = {"tone": "accuracy", "strength": "pearson", "traits": "micro_f1", "names": "f1"}
    assert metrics["eval_average"] == pytest.approx(np.mean([metrics[f"eval_{t}_{m}"] for t, m in primary.items()]))
    assert len(seen) == 1 and seen[0]["eval_average"] == metrics["eval_average"]
    assert all(f"eval_{task.name}_loss" in metrics for task in model.tasks)
    assert trainer.compute_metrics is None


def test_evaluation_is_the_same_whatever_the_batch_size(make_trainer, model, datasets):
    results = []
    for size in (1, 7, 64):
        metrics = make_trainer(model, evaluation=datasets, per_device_eval_batch_size=size).evaluate()
        results.append({k: v for k, v in metrics.items() if not k.endswith(("runtime", "second", "time"))})
    for other in results[1:]:
        assert set(other) == set(results[0])
        for key, value in results[0].items():
            assert other[key] == pytest.approx(value, abs=1e-5), key


def test_eval_loss_is_the_mean_over_items(make_trainer, model, datasets):
    metrics = make_trainer(model, evaluation=datasets, per_device_eval_batch_size=3).evaluate()
    trainer = make_trainer(model, evaluation=datasets)
    batch = trainer.data_collator(list(trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))))
    with torch.no_grad():
        expected = model.eval()(**batch).task_losses
    for task, loss in expected.items():
        assert metrics[f"eval_{task}_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_an_auxiliary_task_is_evaluated_but_counts_in_no_average(make_trainer, bert, datasets):
    tasks = make_tasks()
    tasks[3] = Task("names", "token_classification", labels=tasks[3].labels, auxiliary=True)
    metrics = make_trainer(HardSharingModel.from_backbone(bert, tasks), evaluation=datasets).evaluate()
    others = [metrics[f"eval_{key}"] for key in ("tone_accuracy", "strength_pearson", "traits_micro_f1")]
    assert metrics["eval_average"] == pytest.approx(np.mean(others)) and "eval_names_f1" in metrics


def test_primary_task_picks_the_best_checkpoint_and_stops(make_trainer, model, datasets):
    scores, score = iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2]), {"metric": "score", "greater_is_better": True}
    tasks = [task if task.name != "tone" else Task(**{**task.to_dict(), **score}) for task in make_tasks()]
    trainer = make_trainer(
        HardSharingModel.from_backbone(model.backbone, tasks),
        evaluation=datasets,
        primary_task="tone",
        max_steps=12,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        trainer_kwargs={
            "compute_metrics": {"tone": lambda prediction: {"other": 1.0, "score": next(scores)}},
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
        },
    )
    trainer.train()
    assert trainer.args.metric_for_best_model == "eval_tone_score" and trainer.args.greater_is_better
    assert trainer.state.best_metric == 0.9 and trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert trainer.state.global_step == 8
    loaded = HardSharingModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def test_without_primary_task_the_average_decides(make_trainer, model, datasets):
    trainer = make_trainer(
        model, evaluation=datasets, eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True
    )
    assert trainer.args.metric_for_best_model == "eval_average" and trainer.args.greater_is_better


def test_predict_returns_logits_and_labels_per_task(make_trainer, model, datasets):
    trainer = make_trainer(model)
    outputs = trainer.predict({name: rows.select(range(5)) for name, rows in datasets.items()})
    assert list(outputs) == ["tone", "strength", "traits", "names"]
    shapes = {name: output.predictions.shape for name, output in outputs.items()}
    assert shapes["tone"] == (5, 2) and shapes["strength"] == (5, 1) and shapes["traits"] == (5, 3)
    assert shapes["names"][0] == 5 and shapes["names"][2] == 3
    assert outputs["tone"].label_ids.tolist() == [1, 0, 1, 0, 1] and "test_tone_accuracy" in outputs["tone"].metrics
    unlabelled = trainer.predict({"reviews": datasets["reviews"].select_columns(["text"]).select(range(5))})
    assert unlabelled["tone"].label_ids is None
    assert np.array_equal(unlabelled["tone"].predictions, outputs["tone"].predictions)


def test_custom_metrics_get_logits_and_default_ones_stay(make_trainer, model, datasets):
    shapes = {}

    def of_names(prediction):
        shapes["names"] = prediction.predictions.shape
        return {"mine": 0.25}

    trainer = make_trainer(model, evaluation=datasets, trainer_kwargs={"compute_metrics": {"names": of_names}})
    metrics = trainer.evaluate()
    assert metrics["eval_names_mine"] == 0.25 and "eval_names_f1" not in metrics and "eval_tone_accuracy" in metrics
    assert len(shapes["names"]) == 3


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize("sampling", ["temperature", "annealed", "round_robin"])
@pytest.mark.sample(6)
def test_resumed_equals_uninterrupted(make_trainer, bert, tasks, tmp_path, sampling, composition):
    def make(name):
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(bert, tasks)
        return make_trainer(
            model,
            output_dir=str(tmp_path / name),
            max_steps=20,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=5,
            task_sampling=sampling,
            batch_composition=composition,
        )

    whole = make("whole")
    whole.train()
    for step in (5, 15):  # 9 windows make an epoch: one in the first, one in the second
        resumed = make("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        a, b = weights(whole.model), weights(resumed.model)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert resumed.progress.rows_seen == whole.progress.rows_seen


def test_arguments_datasets_and_model_of_the_caller_stay_as_they_are(make_trainer, bert, tasks, datasets, tokenizer):
    before = weights(bert)
    names = {name: (rows.column_names, rows._fingerprint) for name, rows in datasets.items()}
    args = MultiTaskTrainingArguments("unused", report_to="none", use_cpu=True, primary_task="tone", max_steps=1)
    given = args.to_dict()
    trainer = make_trainer(HardSharingModel.from_backbone(bert, tasks), evaluation=datasets)
    trainer.train()
    MultiTaskTrainer(
        HardSharingModel.from_backbone(bert, tasks),
        args,
        train_dataset=datasets,
        eval_dataset=datasets,
        processing_class=tokenizer,
    )
    Path("unused").rmdir()
    assert args.to_dict() == given
    assert {name: (rows.column_names, rows._fingerprint) for name, rows in datasets.items()} == names
    assert all(torch.equal(before[name], value) for name, value in weights(bert).items())


def test_model_init_and_a_single_dataset_work(make_trainer, bert, datasets, tokenizer, tmp_path):
    tasks = make_tasks()[:2]
    trainer = MultiTaskTrainer(
        model_init=lambda: HardSharingModel.from_backbone(bert, tasks),
        args=MultiTaskTrainingArguments(str(tmp_path / "o"), max_steps=2, report_to="none", use_cpu=True),
        train_dataset=datasets["reviews"],
        processing_class=tokenizer,
    )
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.slow
def test_tokenized_rows_train_like_text(make_trainer, bert, tokenizer, datasets):
    task = make_tasks()[0]

    def encode(row):
        return {
            **tokenizer(row["text"], padding="max_length", max_length=40),
            "labels": int(row["label"] == "positive"),
        }

    tokenized = datasets["reviews"].map(encode, remove_columns=datasets["reviews"].column_names)
    results = []
    for rows in (datasets["reviews"], tokenized):
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(bert, [task])
        make_trainer(model, train={"reviews": rows}).train()
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_training_learns(make_trainer, model, datasets):
    trainer = make_trainer(
        model, evaluation=datasets, max_steps=150, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=50
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_tone_accuracy"] > 0.9 and metrics["eval_strength_pearson"] > 0.8
    assert metrics["eval_names_f1"] > 0.8


def test_workers_change_nothing(make_trainer, bert, tasks):
    results = []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(bert, tasks)
        make_trainer(model, dataloader_num_workers=workers, max_steps=12).train()
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_checkpoints_hold_json_and_safetensors_of_the_model(make_trainer, model):
    trainer = make_trainer(model, save_strategy="steps", save_steps=4)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-4")
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "multitask_state.json").read_text())["rows_seen"] == trainer.progress.rows_seen


def test_a_segment_is_no_tensor_and_survives_the_move_to_a_device(make_trainer, model):
    batch = next(iter(make_trainer(model).get_train_dataloader()))
    assert all(isinstance(segment, Segment) for segment in batch["segments"].values())
    assert all(isinstance(n, int) for n in batch["num_items"].values())


def test_plain_text_rows_of_several_splits_can_be_given_as_dataset_dict(make_trainer, model, datasets):
    assert len(make_trainer(model, train=DatasetDict(datasets)).train_dataset) == sum(map(len, datasets.values()))
    assert isinstance(datasets["reviews"], Dataset)


def test_a_task_whose_name_begins_another_s_keeps_its_own_metrics(make_trainer, bert, datasets):
    classes = dict(type="single_label_classification", labels=("negative", "positive"), dataset="reviews")
    tasks = [Task("tone_fine", label_column="label", **classes), Task("tone", label_column="label", **classes)]
    trainer = make_trainer(
        HardSharingModel.from_backbone(bert, tasks),
        train={"reviews": datasets["reviews"]},
        evaluation={"reviews": datasets["reviews"]},
        trainer_kwargs={"compute_metrics": {"tone": lambda prediction: {"score": 100.0}}},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_average"] == pytest.approx((metrics["eval_tone_fine_accuracy"] + 100.0) / 2)
    outputs = trainer.predict({"reviews": datasets["reviews"]})
    assert set(outputs["tone"].metrics) == {"test_tone_score", "test_tone_loss"}


def test_predictions_are_logits_whatever_evaluations_keep_and_of_no_auxiliary_task(make_trainer, bert, datasets):
    tasks = make_tasks()
    tasks[1] = Task("strength", "regression", dataset="reviews", label_column="strength", auxiliary=True)
    model = HardSharingModel.from_backbone(bert, tasks)
    trainer = make_trainer(model, evaluation=datasets, prediction_loss_only=True)
    outputs = trainer.predict(datasets)
    assert set(outputs) == {"tone", "traits", "names"} and outputs["tone"].predictions.shape == (40, 2)
    metrics = trainer.evaluate()
    assert "eval_tone_loss" in metrics and "eval_tone_accuracy" not in metrics and "eval_average" not in metrics


def test_a_saved_model_knows_the_length_it_was_trained_on(make_trainer, model, tokenizer, tmp_path):
    from hf_multitask.prediction import Predictor

    trainer = make_trainer(model, max_length=12)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert Predictor.from_pretrained(tmp_path / "saved").max_length == 12


def test_group_by_length_trains_on_the_same_rows_in_another_order(model, make_trainer, datasets):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen, rows = [], []
    for strategy in ("random", "group_by_length"):
        model.load_state_dict(before)
        trainer = make_trainer(model, max_steps=-1, num_train_epochs=1, train_sampling_strategy=strategy)
        rows.append([batch["attention_mask"].sum(1).tolist() for batch in trainer.get_train_dataloader()])
        trainer.train()
        seen.append(trainer.progress.rows_seen)
    assert seen[0] == seen[1] and rows[0] != rows[1]


def test_a_trainer_made_before_tasks_were_changed_is_refused(tmp_path, model, datasets, tokenizer):
    def make():
        args = MultiTaskTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
        rows = {name: datasets[name] for name in {task.dataset for task in model.tasks}}
        return MultiTaskTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    last = model.tasks[-1]
    trainer = make()
    trainer.train()
    model.remove_task(last.name)
    with pytest.raises(
        ValueError, match="changed the model, which has the tasks tone, strength, traits; .*new trainer"
    ):
        trainer.train()
    model.add_task(last)  # by name the tasks are those of before; the parameters are not
    with pytest.raises(ValueError, match="changed the model"):
        trainer.train()
    before = model.heads[last.name].layers[-1].weight.clone()
    make().train()
    assert not before.equal(model.heads[last.name].layers[-1].weight)
