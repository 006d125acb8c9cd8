"""What users override or hand over is called once for what it is meant for, or refused before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, make_datasets, make_tokenizer
from torch.utils.data import SequentialSampler
from transformers import Trainer

from hf_multitask import MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.guard import NonFiniteLossError
from hf_multitask.models.auto import SCHEMES
from hf_multitask.trainer import MultiTaskTrainerMixin

TASKS = (
    Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
    Task("strength", "regression", dataset="reviews", label_column="strength"),
)
ACCUMULATED = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)


@pytest.fixture
def make(tmp_path):
    """A function that makes a trainer of some class, without dropout; its updates are those of the gradients."""

    def make(kind=MultiTaskTrainer, scheme="hard", tasks=TASKS, **arguments):
        torch.manual_seed(0)
        given = {
            key: arguments.pop(key) for key in ("compute_metrics", "preprocess_logits_for_metrics") if key in arguments
        }
        options = {"num_experts": 2, "router_noise": 0.0} if scheme == "mixture_of_experts" else {}
        model = SCHEMES[scheme].from_backbone(BACKBONES["bert"](), list(tasks), **options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        defaults = dict(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=16, learning_rate=0.1,
            optim="sgd", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        datasets = {"reviews": make_datasets(rows=48)["reviews"]}
        args = MultiTaskTrainingArguments(**{**defaults, **arguments})
        return kind(
            model, args, train_dataset=datasets, eval_dataset=datasets, processing_class=make_tokenizer(), **given
        )

    return make


def check_same(one, other, factor: float = 1.0) -> None:
    """Check that two runs made the same updates and logged the same losses, the other `factor` times as large."""
    for (name, value), own in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(value, own, atol=2e-6), name
    for line, own in zip(one.state.log_history, other.state.log_history, strict=True):
        assert set(line) == set(own)
        for key in {"loss/tone", "loss/strength", "share/tone"} & set(line):
            assert own[key] == pytest.approx(line[key], rel=1e-5)
        if "loss" in line:
            assert own["loss"] == pytest.approx(factor * line["loss"], rel=1e-5)


class Counting(MultiTaskTrainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        loss, outputs = self.own_loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class FromLogits(Counting):
    """The plain loss, made by hand: the mean of a micro-batch."""

    def own_loss(self, model, inputs, window):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        tone = F.cross_entropy(outputs.logits["tone"], labels["tone"])
        return 0.5 * tone + 0.5 * F.mse_loss(outputs.logits["strength"], labels["strength"]), outputs


class FromOutputs(Counting):
    def own_loss(self, model, inputs, window):
        outputs = model(**inputs)
        return outputs.loss, outputs


class FromWindow(Counting):
    """The plain loss, summed over the rows of a micro-batch and divided by those of the window."""

    def own_loss(self, model, inputs, window):
        outputs = model(**inputs)
        sums = {task: losses.sum() for task, losses in outputs.row_losses.items()}
        return sum(sums[task] / window.items[task] * window.shares()[task] for task in sums), outputs


class Declared(FromWindow):
    loss_is_scaled_for_ga = True


class Doubled(Counting):
    def own_loss(self, model, inputs, window):
        loss, outputs = super(Counting, self).compute_loss(model, inputs, True, window)
        return 2 * loss, outputs


class Twice(Counting):
    """Two passes, of which the loss is the sum."""

    def own_loss(self, model, inputs, window):
        one, outputs = super(Counting, self).compute_loss(model, dict(inputs), True, window)
        other = super(Counting, self).compute_loss(model, dict(inputs), False, window)
        return one + other, outputs


@pytest.mark.parametrize("options", [{}, ACCUMULATED], ids=["whole", "accumulated"])
@pytest.mark.parametrize("kind", [FromLogits, FromOutputs, FromWindow, Declared, Doubled, Twice])
@pytest.mark.sample(3)
def test_an_overridden_loss_counts_once_whatever_the_micro_batches(make, kind, options):
    factor = 2.0 if kind in (Doubled, Twice) else 1.0
    plain = make(max_grad_norm=1e9, **options)
    trainer = make(kind, learning_rate=0.1 / factor, max_grad_norm=1e9, **options)
    if kind is FromLogits:  # its passes have no labels, so that there are no losses of the heads to log
        plain.progress.add_losses = lambda losses: None
    for one in (plain, trainer):
        one.train()
    check_same(plain, trainer, factor)
    assert trainer.calls == 2 * options.get("gradient_accumulation_steps", 1)


@pytest.mark.parametrize("scheme", ["soft", "mixture_of_experts", "conditioned", "adapter"])
@pytest.mark.sample(2)
def test_what_a_scheme_adds_counts_once_in_an_overridden_loss(make, scheme):
    plain, trainer = make(scheme=scheme, **ACCUMULATED), make(FromOutputs, scheme=scheme, **ACCUMULATED)
    for one in (plain, trainer):
        one.train()
    if scheme == "mixture_of_experts":  # what its router adds is a mean over each micro-batch in the override
        assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=0.01)
    else:
        check_same(plain, trainer)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(gradient_combination="pcgrad"), "gradient_combination='pcgrad'"),
        (dict(loss_weighting="gradnorm"), "loss_weighting='gradnorm'"),
        (dict(loss_weighting="uncertainty"), "loss_weighting='uncertainty'"),
        (dict(conflict_logging_steps=1), "conflict_logging_steps=1"),
        (dict(tasks=(TASKS[0], Task("strength", "regression", dataset="reviews", label_column="strength",
                                    weight_schedule={"type": "linear", "end": 0.5}))), "weight_schedule"),
        (dict(tasks=(TASKS[0], Task("strength", "regression", dataset="reviews", label_column="strength",
                                    auxiliary=True)), auxiliary_gating="cosine"), "auxiliary_gating='cosine'"),
    ],
)  # fmt: skip
def test_an_override_that_would_not_count_is_refused(make, options, named):
    with pytest.raises(ValueError, match=f"FromLogits overrides compute_loss.*{named}"):
        make(FromLogits, **options)


def test_a_loss_of_the_users_own_that_is_not_finite_is_named(make):
    class Bad(FromOutputs):
        def own_loss(self, model, inputs, window):
            loss, outputs = super().own_loss(model, inputs, window)
            return loss / (loss - loss.detach()), outputs

    with pytest.raises(NonFiniteLossError, match="step 0 .*\n.*Bad.compute_loss returned"):
        make(Bad).train()


class OwnSampler(MultiTaskTrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset)


class OwnLoader(MultiTaskTrainer):
    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(eval_dataset)


class Plain(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class Behind(MultiTaskTrainerMixin, Plain):
    pass


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (OwnSampler, "OwnSampler._get_train_sampler .* task_sampling"),
        (OwnLoader, "OwnLoader.get_eval_dataloader .* data_collator"),
        (Behind, "Plain.compute_loss would not be called.* before the mixin"),
    ],
)
def test_methods_that_nothing_would_call_are_refused(make, kind, named):
    with pytest.raises(ValueError, match=named):
        make(kind)


def test_steps_and_optimizers_of_a_subclass_go_through_ours_or_are_refused(make):
    class Around(MultiTaskTrainer):
        calls = 0

        def training_step(self, *args):
            self.calls += 1
            return super().training_step(*args)

        def log(self, logs, start_time=None):
            super().log(logs | {"mine": 1.0}, start_time)

    class Own(MultiTaskTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs)).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Optimizer(MultiTaskTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    plain, around = make(**ACCUMULATED), make(Around, **ACCUMULATED)
    for one in (plain, around):
        one.train()
    assert around.calls == 8 and all("mine" in line for line in around.state.log_history)
    for value, own in zip(plain.model.parameters(), around.model.parameters(), strict=True):
        assert torch.equal(value, own)
    with pytest.raises(RuntimeError, match="Own.training_step does not call super"):
        make(Own).train()
    make(Optimizer).train()
    with pytest.raises(ValueError, match="head_learning_rate is not used: Optimizer.create_optimizer"):
        make(Optimizer, head_learning_rate=0.1).train()


# ---- preprocess_logits_for_metrics ----


def argmax(logits, labels):
    return logits.argmax(-1)


def accuracy(prediction):
    assert prediction.predictions.ndim == 1
    return {"mine": float((prediction.predictions == prediction.label_ids).mean())}


@pytest.mark.parametrize("preprocess", [argmax, {"tone": argmax}], ids=["one", "by task"])
def test_logits_are_preprocessed_for_tasks_with_metrics_of_their_own(make, preprocess):
    plain = make()
    expected = plain.evaluate()
    trainer = make(compute_metrics={"tone": accuracy}, preprocess_logits_for_metrics=preprocess)
    metrics = trainer.evaluate()
    assert metrics["eval_tone_mine"] == pytest.approx(expected["eval_tone_accuracy"])
    for key in ("eval_strength_mse", "eval_strength_loss", "eval_tone_loss"):
        assert metrics[key] == pytest.approx(expected[key]), key
    # As in `Trainer`, predictions are what the metrics get.
    outputs, logits = trainer.predict(trainer.eval_dataset), plain.predict(plain.eval_dataset)
    assert np.array_equal(outputs["tone"].predictions, logits["tone"].predictions.argmax(-1))
    assert outputs["tone"].metrics["test_tone_mine"] == metrics["eval_tone_mine"]
    assert np.allclose(outputs["strength"].predictions, logits["strength"].predictions)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        (dict(preprocess_logits_for_metrics=argmax), ValueError, "one function.*compute_metrics"),
        (dict(preprocess_logits_for_metrics={"tome": argmax}), ValueError, "'tome' is no task, did you mean 'tone'"),
        (dict(preprocess_logits_for_metrics={"strength": argmax}), ValueError, "'strength' has default metrics"),
        (dict(preprocess_logits_for_metrics={"tone": 3}), TypeError, "functions, got 3"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, options, error, named):
    metrics = {} if callable(options["preprocess_logits_for_metrics"]) else {"tone": accuracy}
    with pytest.raises(error, match=named):
        make(compute_metrics=metrics, **options)
