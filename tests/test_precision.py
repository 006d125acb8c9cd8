"""Mixed precision, half-precision weights, activation checkpointing and compilation, with several tasks.

How far two runs may lie apart is said in units of the roundings they differ by: 2^-8 for a bfloat16 number, 2^-11 for
a float16 number.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, make_datasets, make_tasks
from datasets import Dataset
from questions import question_datasets, question_tasks
from test_schemes import KINDS, quiet
from torch._dynamo.utils import counters
from transformers import BertConfig, BertModel, TrainerCallback

from hf_multitask import HardSharingModel
from hf_multitask.guard import NonFiniteLossError
from hf_multitask.models.auto import SCHEMES

TASKS = ("tone", "strength", "traits", "names")
BAD_ROW = 13
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float().cpu().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of two sets of weights."""
    return math.sqrt(sum(((a[name] - b[name]).double() ** 2).sum().item() for name in a))


def training_lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line and "learning_rate" in line]


@pytest.fixture
def build(bert, tasks):
    """A function that makes the same model each time; dropout is off unless asked for."""

    def make(dropout: bool = False, **options):
        torch.manual_seed(1)
        model = HardSharingModel.from_backbone(bert, tasks, **options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
        return model

    return make


@pytest.fixture
def run(make_trainer, build):
    """A function that trains for six steps of plain gradient descent and returns the trainer.

    Adam would turn the rounding of a gradient near 0 into a step of full size in the other direction; here the error
    of the weights is that of the gradients.
    """

    def train(model=None, prepare=None, resume=None, **arguments):
        defaults = dict(max_steps=6, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=1.0)
        trainer = make_trainer(build() if model is None else model, **{**defaults, **arguments})
        if prepare is not None:
            prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def scale_gradients(trainer, init_scale: float = 2.0**10) -> None:
    """Make float16 run on a CPU too, for which Accelerate has no scaler: the parts are the real ones.

    With this scale no gradient of these models overflows, so that no step is left out but for a bad loss.
    """
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler(trainer.args.device.type, init_scale=init_scale)


def assert_near(start, exact, rounded, dtype, roundings: float = 2.0) -> None:
    """Check a run in half precision against the same run in float32.

    A loss is a mean over rows whose errors partly cancel: two roundings are much. The weights have moved by the sum of
    the gradients. A gradient comes through a chain of some ten rounded products, but each of its numbers sums over
    many tokens and rows, whose errors are of either sign: it is off by less than one rounding of its length, and so
    is the way that the weights went (0.2 to 0.6 of one; two are allowed).
    """
    rounding = ROUNDING[dtype]
    lines, others = training_lines(exact), training_lines(rounded)
    assert len(lines) == len(others) > 0
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if key.startswith("loss"):
                assert other[key] == pytest.approx(line[key], rel=2 * rounding), key
            elif key.startswith("share"):
                assert other[key] == line[key]
    a, b = weights(exact.model), weights(rounded.model)
    way = distance(start, a)
    assert way > 1e-3 and 0 < distance(a, b) < roundings * rounding * way, distance(a, b) / way / rounding


def spoilt_datasets() -> dict[str, Dataset]:
    """Rows of which one has a target so large that its squared error overflows float32."""
    datasets = make_datasets()
    rows = datasets["reviews"]
    strength = list(rows["strength"])
    strength[BAD_ROW] = 3e38
    return {**datasets, "reviews": Dataset.from_dict({**rows.to_dict(), "strength": strength})}


class Steps(TrainerCallback):
    """Keeps, for every step, whether it moved the weights and how many steps had been skipped after it."""

    def __init__(self):
        self.trainer, self.moved, self.skipped, self._before = None, [], [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = weights(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        after = weights(model)
        self.moved.append(any(not torch.equal(after[name], self._before[name]) for name in after))
        self.skipped.append(self.trainer.guard.skipped)


# ---- bfloat16 ----


def test_bf16_autocast_trains_like_float32_to_its_rounding(run, build):
    seen = set()
    model = build()
    for head in model.heads.values():
        head.register_forward_hook(lambda module, inputs, logits: seen.add(logits.dtype))
    exact, rounded = run(), run(model, bf16=True)
    assert seen == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert_near(weights(build()), exact, rounded, torch.bfloat16)


LOSSES = {
    "tone": lambda x, y: F.cross_entropy(x, y, reduction="none"),
    "strength": lambda x, y: ((x - y) ** 2).mean(-1),
    "traits": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(-1),
    "names": lambda x, y: F.cross_entropy(x[:, : y.shape[1]].transpose(1, 2), y, reduction="none").sum(-1),
}


@pytest.mark.parametrize("rounded", ["by autocast", "weights"])
def test_losses_of_rounded_logits_are_computed_in_float32(make_trainer, build, rounded):
    batch = next(iter(make_trainer(build()).get_train_dataloader()))
    model = build() if rounded == "by autocast" else build().to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rounded == "by autocast"):
        output = model.eval()(**batch)
    assert set(output.logits) == set(TASKS) and output.loss.dtype == torch.float32
    for task, logits in output.logits.items():
        assert logits.dtype == torch.bfloat16 and output.row_losses[task].dtype == torch.float32
        expected = LOSSES[task](logits.float(), batch["labels"][task])
        torch.testing.assert_close(output.row_losses[task], expected, rtol=1e-6, atol=1e-6)
        assert output.task_losses[task].dtype == torch.float32


@pytest.mark.parametrize("reduction", ["rows", "tasks"])
def test_a_window_gives_one_update_in_bf16_too_however_it_is_cut(run, build, reduction):
    whole = run(bf16=True, loss_reduction=reduction)
    cut = run(bf16=True, loss_reduction=reduction, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_near(weights(build()), whole, cut, torch.bfloat16)


def test_bf16_autocast_evaluates_like_float32_to_its_rounding(make_trainer, build, datasets):
    exact = make_trainer(build(), evaluation=datasets).evaluate()
    trainer = make_trainer(build(), evaluation=datasets, bf16=True)
    metrics, full = trainer.evaluate(), make_trainer(build(), evaluation=datasets, bf16_full_eval=True).evaluate()
    for task in TASKS:
        for found in (metrics, full):
            error = abs(found[f"eval_{task}_loss"] / exact[f"eval_{task}_loss"] - 1)
            assert 0 < error < 2 * ROUNDING[torch.bfloat16], task
    assert all(output.predictions.dtype == "float32" for output in trainer.predict(datasets).values())


def test_weights_in_bfloat16_train_and_stay_what_they_are(make_trainer, build, datasets, tmp_path):
    build().save_pretrained(tmp_path / "saved")
    model = HardSharingModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    arguments = dict(evaluation=datasets, max_steps=60, learning_rate=4e-3, per_device_train_batch_size=16)
    trainer = make_trainer(model, **arguments)
    before = trainer.evaluate()
    trainer.train()
    after, lines = trainer.evaluate(), training_lines(trainer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    first = make_trainer(build(), **{**arguments, "max_steps": 1})
    first.train()
    for key in (f"loss/{task}" for task in TASKS):
        assert lines[0][key] == pytest.approx(training_lines(first)[0][key], rel=2 * ROUNDING[torch.bfloat16])
    assert after["eval_tone_loss"] < before["eval_tone_loss"] / 2
    assert after["eval_strength_loss"] < before["eval_strength_loss"] / 2
    trainer.save_model(str(tmp_path / "trained"))
    again = HardSharingModel.from_pretrained(tmp_path / "trained")
    assert again.dtype == torch.bfloat16 and same(weights(again), weights(model))


# ---- float16, with a scaler ----


def test_float16_with_a_scaler_trains_like_float32_to_its_rounding(run, build):
    seen = set()
    model = build()
    for head in model.heads.values():
        head.register_forward_hook(lambda module, inputs, logits: seen.add(logits.dtype))
    exact, rounded = run(), run(model, scale_gradients, fp16=True)
    assert seen == {torch.float16} and rounded.accelerator.scaler.get_scale() == 2.0**10
    assert_near(weights(build()), exact, rounded, torch.float16)
    # The norm is that of gradients without the scale.
    for line, other in zip(training_lines(exact), training_lines(rounded), strict=True):
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=2 * ROUNDING[torch.float16])


BALANCED = [
    {},
    dict(gradient_combination="upgrad", loss_weighting="gradnorm"),
    dict(gradient_combination="upgrad", gradient_memory="sketch"),
]


@pytest.mark.parametrize("balanced", BALANCED, ids=str)
def test_the_scale_does_not_touch_the_update_nor_does_accumulation(run, build, balanced):
    small = run(None, lambda trainer: scale_gradients(trainer, 2.0**6), fp16=True, **balanced)
    large = run(
        None,
        lambda trainer: scale_gradients(trainer, 2.0**12),
        fp16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **balanced,
    )
    assert_near(weights(build()), small, large, torch.float16)


@pytest.mark.parametrize("balanced", BALANCED, ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.sample(3)
def test_a_bad_window_is_skipped_once_and_lowers_the_scale(run, build, accumulation, balanced):
    steps, given = Steps(), dict(train=spoilt_datasets(), on_nonfinite_loss="skip", max_steps=20, **balanced)
    given |= dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)

    def prepare(trainer):
        steps.trainer = trainer
        scale_gradients(trainer)

    scaled = run(build(), prepare, fp16=True, trainer_kwargs={"callbacks": [steps]}, **given)
    skipped = scaled.guard.skipped
    assert skipped >= 1 and scaled.state.global_step == 20
    assert scaled.accelerator.scaler.get_scale() == 2.0 ** (10 - skipped)
    bad = [now > before for before, now in zip([0, *steps.skipped], steps.skipped, strict=False)]
    assert steps.moved == [not step for step in bad]
    plain = run(build(), **given)
    assert plain.guard.skipped == skipped
    last, expected = training_lines(scaled)[-1], training_lines(plain)[-1]
    assert last["skipped_steps"] == expected["skipped_steps"] == skipped
    a, b = weights(plain.model), weights(scaled.model)
    assert distance(a, b) < 4 * ROUNDING[torch.float16] * distance(weights(build()), a)  # a longer way: 20 steps


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_an_infinite_loss_with_finite_gradients_is_skipped_too(run, build, precision):
    """A label that the model holds for impossible: its loss is infinite, the gradient of its logits is -1 and 1."""
    model = build()
    with torch.no_grad():
        model.heads["tone"].layers[-1].bias[0] = -math.inf
    start, steps = weights(model), Steps()

    def prepare(trainer):
        steps.trainer = trainer
        if precision == "float16":
            scale_gradients(trainer)

    trainer = run(
        model,
        prepare,
        fp16=precision == "float16",
        on_nonfinite_loss="skip",
        weight_decay=0.1,
        max_steps=3,
        per_device_train_batch_size=16,
        trainer_kwargs={"callbacks": [steps]},
    )
    assert steps.skipped == [1, 2, 3] and trainer.state.global_step == 3
    assert steps.moved == [False, False, False] and same(weights(model), start)


def test_a_bad_window_names_task_and_row_under_the_scaler(run, build):
    model, steps = build(), Steps()

    def prepare(trainer):
        steps.trainer = trainer
        scale_gradients(trainer)

    with pytest.raises(NonFiniteLossError) as error:
        run(
            model,
            prepare,
            train=spoilt_datasets(),
            fp16=True,
            max_steps=20,
            trainer_kwargs={"callbacks": [steps]},
        )
    text = str(error.value)
    assert f"step {steps.trainer.state.global_step} " in text and "task 'strength'" in text
    assert f"row(s) {BAD_ROW} of dataset 'reviews'" in text and "'tone'" not in text
    assert same(weights(model), steps._before)


def test_a_run_with_a_scaler_that_is_resumed_is_the_run_that_was_not_stopped(run, build, tmp_path):
    given = dict(train=spoilt_datasets(), fp16=True, on_nonfinite_loss="skip", max_steps=20, optim="adamw_torch")
    whole = run(
        build(dropout=True),
        scale_gradients,
        save_strategy="steps",
        save_steps=1,
        output_dir=str(tmp_path / "whole"),
        **given,
    )
    skipped = [line.get("skipped_steps", 0) for line in training_lines(whole)]
    stop = skipped.index(1) + 1  # just after the first bad window: the scale is halved
    assert stop < 20
    resumed = run(
        build(dropout=True),
        scale_gradients,
        resume=str(tmp_path / "whole" / f"checkpoint-{stop}"),
        output_dir=str(tmp_path / "resumed"),
        **given,
    )
    assert same(weights(whole.model), weights(resumed.model))
    assert resumed.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale() < 2.0**10
    assert resumed.guard.skipped == whole.guard.skipped


# ---- on a GPU ----


def half_precision(dtype) -> dict[str, bool]:
    return {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_half_precision_trains_like_float32_to_its_rounding(run, build, dtype):
    scalers = []

    def prepare(trainer):
        scalers.append(trainer.accelerator.scaler)  # Accelerate's own
        if dtype is torch.float16:
            scale_gradients(trainer)

    exact, rounded = run(use_cpu=False), run(None, prepare, use_cpu=False, **half_precision(dtype))
    assert rounded.args.device.type == "cuda" and (scalers[0] is not None) == (dtype is torch.float16)
    assert_near(weights(build()), exact, rounded, dtype)


@needs_cuda
def test_on_a_gpu_the_scaler_of_accelerate_finds_its_scale(run):
    trainer = run(use_cpu=False, fp16=True, max_steps=20)
    assert trainer.accelerator.scaler is not None and trainer.guard.skipped == 0
    assert 2.0**10 <= trainer.accelerator.scaler.get_scale() <= 2.0**16
    lines = training_lines(trainer)
    assert len(lines) == 20 and all(math.isfinite(line["loss"]) for line in lines)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_a_bad_window_is_skipped_once(run, build, dtype):
    steps = Steps()

    def prepare(trainer):
        steps.trainer = trainer
        if dtype is torch.float16:
            scale_gradients(trainer)

    trainer = run(
        build(),
        prepare,
        train=spoilt_datasets(),
        use_cpu=False,
        on_nonfinite_loss="skip",
        max_steps=20,
        trainer_kwargs={"callbacks": [steps]},
        **half_precision(dtype),
    )
    bad = [now > before for before, now in zip([0, *steps.skipped], steps.skipped, strict=False)]
    assert sum(bad) == trainer.guard.skipped >= 1 and steps.moved == [not step for step in bad]
    if trainer.accelerator.scaler is not None:
        assert trainer.accelerator.scaler.get_scale() == 2.0 ** (10 - trainer.guard.skipped)


# ---- activation checkpointing ----


CHECKPOINTING = [
    (None, 1),
    (None, 2),
    ({"every_n_layers": 2}, 2),
    # With accumulation the sum of several passes and micro-batches would be taken in another order.
    ({"use_reentrant": True}, 1),
]


@pytest.mark.parametrize(("options", "accumulation"), CHECKPOINTING)
def test_activation_checkpointing_changes_no_bit(run, build, options, accumulation):
    """With dropout, and with batches that take several passes of the encoder."""
    calls = {}

    def train(name, **arguments):
        model, calls[name] = build(dropout=True), [0, 0]

        def count(place):
            def hook(module, inputs, output):
                calls[name][place] += module.training

            return hook

        model.backbone.register_forward_hook(count(0))
        model.backbone.encoder.layer[0].attention.register_forward_hook(count(1))
        return run(model, gradient_accumulation_steps=accumulation, optim="adamw_torch", **arguments)

    plain = train("plain")
    saving = train("saving", activation_checkpointing=True, activation_checkpointing_kwargs=options)
    assert same(weights(plain.model), weights(saving.model))
    assert [line["loss"] for line in training_lines(plain)] == [line["loss"] for line in training_lines(saving)]
    passes, layers = calls["plain"]
    assert passes > 6 * accumulation and layers == passes  # some batches took more than one pass
    assert calls["saving"] == [passes, 2 * passes]  # each layer ran again on the way back


def test_activation_checkpointing_goes_with_bf16(run, build):
    plain, saving = (run(build(dropout=True), bf16=True, activation_checkpointing=on) for on in (False, True))
    assert same(weights(plain.model), weights(saving.model))


# ---- compilation ----


@pytest.fixture
def compiler():
    """Dynamo without memory of other tests, and its counters."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


def one_layer_model(tasks):
    torch.manual_seed(0)
    size = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    backbone = BertModel(BertConfig(**size, max_position_embeddings=66, pad_token_id=3))
    torch.manual_seed(1)
    model = HardSharingModel.from_backbone(backbone, tasks)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# A graph for the first shape, one for all other shapes, and one each for a single row and for views of a batch.
MOST_GRAPHS = 4


def test_compiled_training_is_eager_training_and_does_not_compile_for_every_batch(run, tasks, compiler, tmp_path):
    plain = run(one_layer_model(tasks), max_steps=12)
    batches = [
        tuple((task, segment.rows, segment.length) for task, segment in batch["segments"].items())
        for _, batch in zip(range(12), plain.get_train_dataloader(), strict=False)
    ]
    assert len(set(batches)) >= 9 and not compiler["stats"]["unique_graphs"]
    compiled = run(one_layer_model(tasks), max_steps=12, torch_compile=True, torch_compile_backend="eager")
    a, b = weights(plain.model), weights(compiled.model)
    assert distance(a, b) < 1e-5 * distance(weights(one_layer_model(tasks)), a)
    compiled.save_model(str(tmp_path / "saved"))
    assert same(weights(HardSharingModel.from_pretrained(tmp_path / "saved")), b)
    assert 1 <= compiler["stats"]["unique_graphs"] <= MOST_GRAPHS, dict(compiler["stats"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_with_real_backends(run, tasks, datasets, compiler, backend):
    plain = run(one_layer_model(tasks), evaluation=datasets, max_steps=12)
    compiled = run(
        one_layer_model(tasks), evaluation=datasets, max_steps=12, torch_compile=True, torch_compile_backend=backend
    )
    a, b = weights(plain.model), weights(compiled.model)
    assert distance(a, b) < 1e-4 * distance(weights(one_layer_model(tasks)), a)
    metrics, expected = compiled.evaluate(), plain.evaluate()
    for task in TASKS:
        assert metrics[f"eval_{task}_loss"] == pytest.approx(expected[f"eval_{task}_loss"], rel=1e-4)
    assert compiler["stats"]["unique_graphs"] <= 2 * MOST_GRAPHS  # of training and of evaluation


@pytest.mark.sample(20)
@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda kind: "mixture" not in kind))
def test_every_scheme_trains_and_evaluates_in_double_precision(kind, make_trainer):
    scheme, options = KINDS[kind]
    data = {**make_datasets(), **question_datasets()}
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        backbone, tasks = BACKBONES["bert"](), [*make_tasks(), *question_tasks()[1:]]
        model = SCHEMES[scheme].from_backbone(backbone, tasks, **{**options, **quiet(kind)}).to(dtype)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = make_trainer(model, data, data, max_steps=1, optim="sgd")
        trainer.train()
        found.append({key: value for key, value in trainer.evaluate().items() if key.endswith("_loss")})
        assert all(p.dtype == dtype for p in model.parameters() if p.requires_grad)
    assert found[0] == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in found[1].items()}
