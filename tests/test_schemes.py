"""What holds for every sharing scheme: parameters belong to somebody, saving, resuming, layouts, balancing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, PAD_ID, make_tasks

from hf_multitask import AutoModelForMultiTask, Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.conversion import select_tasks
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.passes import Segment

# Every scheme, and the options of one that make another of it.
KINDS: dict[str, tuple[str, dict]] = {
    "hard": ("hard", {}),
    "soft": ("soft", {}),
    "soft, cross-stitched": ("soft", {"cross_stitch": True}),
    "conditioned": ("conditioned", {}),
    "prefix": ("prefix", {"num_virtual_tokens": 3}),
    "adapter": ("adapter", {"rank": 3}),
    "adapter, shared": ("adapter", {"rank": 2, "shared_rank": 3}),
    "adapter, shared alone": ("adapter", {"rank": 0, "shared_rank": 3}),
    "mixture": ("mixture_of_experts", {"num_experts": 4}),
    "mixture, tasks routed": ("mixture_of_experts", {"num_experts": 3, "router_task_embedding": True}),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# No parameter that two tasks train: there is nothing to combine.
NOTHING_SHARED = ("soft", "prefix", "adapter")
FROZEN = ("prefix", "adapter", "adapter, shared", "adapter, shared alone")


def make_model(kind: str, tasks: list[Task] | None = None, dropout: float | None = 0.0, **more) -> MultiTaskModel:
    """Make a model whose parts all do something: none is at the value that makes it the plain backbone."""
    scheme, options = KINDS[kind]
    torch.manual_seed(0)
    model = SCHEMES[scheme].from_backbone(BACKBONES["bert"](), tasks or make_tasks(), **{**options, **more})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    return model


def make_batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 90, (5, 9), generator=draw)
    mask = (torch.arange(9) < torch.tensor([9, 9, 4, 6, 3]).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


def quiet(kind: str) -> dict:
    """Options that leave out random numbers in training, which depend on how rows are cut."""
    return {"router_noise": 0.0} if kind.startswith("mixture") else {}


def weights(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def check_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, value in one.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (value - two[name]).abs().max() / scale < tolerance, name


def check_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@EVERY_KIND
def test_every_trained_parameter_is_shared_or_of_one_task(kind):
    model = make_model(kind)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    shared = [id(p) for p in model.shared_parameters()]
    own = [id(p) for task in model.tasks for p in model.task_parameters(task.name)]
    assert len(shared) == len(set(shared)) and len(own) == len(set(own))
    assert not set(shared) & set(own) and set(shared) | set(own) == trained
    assert (not shared) == (kind in NOTHING_SHARED)


@EVERY_KIND
def test_saved_and_loaded_it_answers_the_same(tmp_path, kind):
    model, batch = make_model(kind), make_batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForMultiTask.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.tasks == model.tasks
    check_equal(model(**batch).logits, loaded(**batch).logits)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@EVERY_KIND
def test_heads_of_another_label_count_are_refused(tmp_path, kind):
    make_model(kind).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    next(task for task in config["tasks"] if task["name"] == "names")["labels"].append("B-time")
    file.write_text(json.dumps(config))
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"heads\.names.* has the shape"):
        AutoModelForMultiTask.from_pretrained(tmp_path)


@EVERY_KIND
def test_a_step_on_one_task_leaves_the_others_alone(kind):
    more = {"penalty": 0.0} if kind == "soft" else {}
    model = make_model(kind, **more).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch, before = make_batch(), weights(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(
            **batch, segments={"tone": Segment(0, 5, 9)}, labels={"tone": torch.tensor([0, 1, 1, 0, 1])}
        ).loss.backward()
        optimizer.step()
    mine = {id(p) for p in model.task_parameters("tone")}
    others = {id(p) for task in model.tasks[1:] for p in model.task_parameters(task.name)}
    for name, parameter in model.named_parameters():
        if id(parameter) in others or not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
        elif id(parameter) in mine:
            assert not torch.equal(parameter, before[name]), name


@EVERY_KIND
def test_an_auxiliary_task_changes_nothing_when_it_is_gone(kind):
    tasks = [*make_tasks()[:3], Task("names", "token_classification", labels=("O", "B"), auxiliary=True)]
    model, batch = make_model(kind, tasks), make_batch()
    assert list(model(**batch).logits) == ["tone", "strength", "traits"]
    if kind == "soft, cross-stitched":
        with pytest.raises(ValueError, match="cross"):
            select_tasks(model, ["tone", "strength", "traits"])
        return
    served = select_tasks(model, ["tone", "strength", "traits"])
    check_equal(model(**batch).logits, served(**batch).logits)
    assert sum(p.numel() for p in served.parameters()) < sum(p.numel() for p in model.parameters())


@EVERY_KIND
def test_a_copy_is_a_model_of_its_own(kind):
    model, batch = make_model(kind), make_batch()
    before = model(**batch).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    check_equal(before, other(**batch).logits)
    changed = model(**batch).logits
    assert not any(torch.equal(changed[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hard"])
def test_from_hard_sharing_to_every_scheme(kind):
    scheme, options = KINDS[kind]
    hard, batch = make_model("hard"), make_batch()
    model = hard.to_scheme(scheme, **options)
    assert type(model) is SCHEMES[scheme]
    check_equal(dict(hard.heads.state_dict()), dict(model.heads.state_dict()))
    expected, found = hard(**batch).logits, model(**batch).logits
    if kind not in ("prefix",):  # a prefix cannot begin as none
        for name in expected:
            assert (found[name] - expected[name]).abs().max() < 1e-5, name
    assert not {p.data_ptr() for p in hard.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_from_soft_to_hard_sharing_by_averaging():
    soft, batch = make_model("soft"), make_batch()
    hard = soft.to_scheme("hard")
    for name, value in hard.backbone.state_dict().items():
        mean = torch.stack([encoder.state_dict()[name].double() for encoder in soft.encoders.values()]).mean(0)
        assert (value - mean).abs().max() < 1e-6, name
    assert set(hard(**batch).logits) == set(soft(**batch).logits)


@pytest.mark.parametrize("kind", ["conditioned", "prefix", "adapter", "mixture"])
def test_a_scheme_that_cannot_change_says_so(kind):
    with pytest.raises(ValueError, match="cannot change its scheme"):
        make_model(kind).to_scheme("hard")
    with pytest.raises(ValueError, match="scheme 'sofd' is not known, did you mean 'soft'"):
        make_model("hard").to_scheme("sofd")


@EVERY_KIND
@pytest.mark.parametrize("native", [True, False])
def test_a_task_by_itself_answers_the_same(tmp_path, kind, native):
    labels = ("negative", "positive")
    tasks = [Task("tone", "single_label_classification", labels=labels, head="native"), *make_tasks()[1:]]
    model, batch = make_model(kind, tasks), make_batch()
    expected = model(**batch).logits["tone"]
    if native and kind not in ("hard", "soft", "adapter", "adapter, shared", "adapter, shared alone"):
        with pytest.raises(ValueError, match="no plain model"):
            model.export_task("tone", tmp_path, native=True)
        return
    if kind == "soft, cross-stitched":
        with pytest.raises(ValueError, match="cross"):
            model.export_task("tone", tmp_path, native=False)
        return
    model.export_task("tone", tmp_path, native=native)
    if native:
        from transformers import AutoModelForSequenceClassification

        found = AutoModelForSequenceClassification.from_pretrained(tmp_path)(**batch).logits
    else:
        found = AutoModelForMultiTask.from_pretrained(tmp_path)(**batch).logits["tone"]
    assert (found - expected).abs().max() < 1e-5


# ---- in the trainer ----


@EVERY_KIND
@pytest.mark.sample(5)
def test_however_the_rows_are_cut(kind, make_trainer):
    runs = []
    for rows, accumulation in ((8, 1), (2, 4)):
        model = make_model(kind, **quiet(kind))
        trainer = make_trainer(
            model,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
            max_steps=3,
        )
        trainer.train()
        runs.append((weights(model), [line for line in trainer.state.log_history if "loss" in line]))
    (one, lines), (two, others) = runs
    check_close(one, two)
    for line, other in zip(lines, others, strict=True):
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@EVERY_KIND
@pytest.mark.sample(7)
def test_resumed_equals_uninterrupted(kind, make_trainer, tmp_path):
    arguments = dict(save_strategy="steps", save_steps=2, max_steps=5, logging_steps=1, head_learning_rate=3e-3)
    whole = make_model(kind, dropout=0.1)
    trainer = make_trainer(whole, output_dir=str(tmp_path / "a"), **arguments)
    trainer.train()
    resumed = make_model(kind, dropout=0.1)
    again = make_trainer(resumed, output_dir=str(tmp_path / "b"), **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    check_equal(weights(whole), weights(resumed))
    last = AutoModelForMultiTask.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert set(weights(last)) == set(weights(whole))


@pytest.mark.parametrize("kind", ["soft", "adapter"])
@pytest.mark.sample(9)
def test_a_run_of_another_scheme_is_not_gone_on_with(kind, make_trainer, tmp_path):
    make_trainer(make_model(kind), save_strategy="steps", save_steps=2).train()
    checkpoint = str(next(Path(tmp_path / "out").glob("checkpoint-*")))
    with pytest.raises(ValueError, match="options of the model"):
        more = {"penalty": 0.5} if kind == "soft" else {"lora_alpha": 50}
        make_trainer(make_model(kind, **more)).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.sample(3)
def test_the_best_checkpoint_comes_back_with_its_adapters(kind, make_trainer, datasets):
    model = make_model(kind)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    trainer = make_trainer(
        model,
        evaluation=datasets,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="strength_loss",
        greater_is_better=False,
        learning_rate=0.3,  # so high that the last step is not the best
    )
    trainer.train()
    assert trainer.state.best_global_step != trainer.state.global_step
    best = AutoModelForMultiTask.from_pretrained(trainer.state.best_model_checkpoint)
    check_equal(weights(best), weights(model))
    check_equal(before, dict(model.backbone.state_dict()))


@EVERY_KIND
@pytest.mark.sample(5)
def test_task_by_task_and_summed_it_is_the_plain_step(kind, make_trainer):
    if kind in NOTHING_SHARED:
        for arguments in ({"gradient_combination": "upgrad"}, {"conflict_logging_steps": 1}):
            with pytest.raises(ValueError, match="no shared parameter is trained"):
                make_trainer(make_model(kind), **arguments)
        arguments = {"loss_weighting": "random", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        plain = {**arguments, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    else:
        arguments, plain = {"conflict_logging_steps": 1}, {}
    runs = []
    for own in (plain, arguments):
        model = make_model(kind, **quiet(kind))
        make_trainer(model, optim="sgd", learning_rate=0.05, **own).train()
        runs.append(weights(model))
    check_close(*runs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOTHING_SHARED])
@pytest.mark.parametrize("memory", ["buffer", "sketch"])
@pytest.mark.sample(7)
def test_gradients_of_tasks_are_combined(kind, memory, make_trainer):
    runs = []
    for rows, accumulation in ((8, 1), (2, 4)):
        model = make_model(kind, **quiet(kind))
        trainer = make_trainer(
            model,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            gradient_combination="upgrad",
            gradient_memory=memory,
            optim="sgd",
            learning_rate=0.05,
        )
        trainer.train()
        assert any(key.startswith("coefficient/") for line in trainer.state.log_history for key in line)
        runs.append(weights(model))
    check_close(*runs)


@EVERY_KIND
@pytest.mark.sample(4)
def test_activation_checkpointing_makes_no_difference(kind, make_trainer):
    runs = []
    for checkpointing in (False, True):
        model = make_model(kind, dropout=0.1)
        make_trainer(model, activation_checkpointing=checkpointing).train()
        runs.append(weights(model))
    check_close(*runs, tolerance=1e-6)


@EVERY_KIND
def test_a_task_without_rows_is_left_alone(kind, make_trainer):
    model = make_model(kind)
    weighted = {"task_sampling": "weighted", "task_sampling_kwargs": {"weights": {}}}
    names = [source.name for source in make_trainer(model)._sources]
    weighted["task_sampling_kwargs"]["weights"] = {name: float("traits" not in name) for name in names}
    before = [p.detach().clone() for p in model.idle_parameters("traits")]
    make_trainer(model, weight_decay=0.1, **weighted).train()
    now = list(model.idle_parameters("traits"))
    assert before and all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@EVERY_KIND
@pytest.mark.sample(4)
def test_it_learns(kind, make_trainer, datasets):
    model = make_model(kind)
    trainer = make_trainer(model, evaluation=datasets, max_steps=60, learning_rate=1e-2, logging_steps=60)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_strength_loss"] < before["eval_strength_loss"]
    assert after["eval_names_loss"] < before["eval_names_loss"]


# ---- adding and removing tasks ----

NEW = Task("mood", "single_label_classification", labels=("calm", "angry", "sad"))


@EVERY_KIND
def test_an_added_task_leaves_the_others_as_they_are(tmp_path, kind):
    model, batch = make_model(kind), make_batch()
    if kind == "soft, cross-stitched":
        with pytest.raises(ValueError, match="every encoder reads all others"):
            model.add_task(NEW)
        assert len(model.tasks) == 4
        return
    before, parameters, names = model(**batch).logits, dict(model.named_parameters()), [*model.heads]
    model.add_task(NEW)
    assert [task.name for task in model.tasks] == [*names, "mood"] == [task["name"] for task in model.config.tasks]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    logits = model(**batch).logits
    check_equal(before, {name: logits[name] for name in names})
    assert logits["mood"].shape == (5, 3)
    own = {id(p) for p in model.task_parameters("mood")}
    assert own and own <= {id(now[name]) for name in set(now) - set(parameters)}
    model.train()
    model(**batch, labels={"mood": torch.tensor([0, 1, 2, 0, 1])}).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.task_parameters("mood"))
    model.eval()
    model.save_pretrained(tmp_path)
    check_equal(logits, AutoModelForMultiTask.from_pretrained(tmp_path)(**batch).logits)
    copied = copy.deepcopy(model)
    check_equal(logits, copied(**batch).logits)


@EVERY_KIND
def test_a_removed_task_leaves_the_others_as_they_are(tmp_path, kind):
    model, batch = make_model(kind), make_batch()
    model.save_pretrained(tmp_path)
    if kind == "soft, cross-stitched":
        with pytest.raises(ValueError, match="every encoder reads all others"):
            model.remove_task("tone")
        return
    before, state = model(**batch).logits, torch.get_rng_state()
    model.remove_task("tone")
    assert torch.equal(torch.get_rng_state(), state)
    logits = model(**batch).logits
    check_equal({name: before[name] for name in ("strength", "traits", "names")}, logits)
    assert not any(".tone" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    check_equal(logits, AutoModelForMultiTask.from_pretrained(tmp_path)(**batch).logits)
    model.add_task(make_tasks()[0])
    assert [*model(**batch).logits] == ["strength", "traits", "names", "tone"]
    check_equal(logits, {name: model(**batch).logits[name] for name in logits})


def test_changes_of_tasks_that_cannot_be_are_refused_and_change_nothing():
    model = make_model("hard", [*make_tasks()[:1], Task("help", "regression", auxiliary=True)])
    before = weights(model)
    for change, message in (
        (lambda: model.add_task(make_tasks()[0]), "has a task 'tone' already"),
        (lambda: model.add_task(Task("Tone", "regression")), "differ only in case"),
        (lambda: model.add_task({"name": "x", "type": "regresion"}), "did you mean 'regression'"),
        (lambda: model.add_task(Task("write", "seq2seq_lm")), "'write'"),
        (lambda: model.remove_task("tune"), "did you mean 'tone'"),
        (lambda: model.remove_task("tone"), "all tasks are auxiliary"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    check_equal(before, weights(model))
    model.remove_task("help")
    with pytest.raises(ValueError, match="'tone' is the only one"):
        model.remove_task("tone")


def test_changed_tasks_keep_mode_precision_freezing_and_checkpointing():
    model = make_model("hard").to(torch.bfloat16).train()
    model.activation_checkpointing_enable()
    frozen = model.backbone.get_input_embeddings().weight.requires_grad_(False)
    model.add_task(NEW)
    assert model.training and model.is_activation_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.backbone.get_input_embeddings().weight is frozen and not frozen.requires_grad


def test_an_added_task_starts_at_the_mean_of_the_encoders():
    model = make_model("soft")
    mean = model.merged_backbone().state_dict()
    model.add_task(NEW)
    check_equal(mean, model.encoder("mood").state_dict())
    assert [p.requires_grad for p in model.encoder("mood").parameters()] == [
        p.requires_grad for p in model.encoder("tone").parameters()
    ]
