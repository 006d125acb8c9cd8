"""Tasks over the vocabulary train like all others, under every sharing scheme."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES
from datasets import Dataset
from language import (
    ENCODER_DECODERS,
    decoder_tasks,
    decoder_tokenizer,
    encoder_decoder,
    encoder_tasks,
    sayings,
    seq2seq_tasks,
)
from safetensors import safe_open
from test_distributed import free_port, run_together
from test_schemes import KINDS, check_close, check_equal, quiet, weights
from transformers import LlamaConfig, LlamaForCausalLM

from hf_multitask import AutoModelForMultiTask, MultiTaskTrainer, MultiTaskTrainingArguments
from hf_multitask.balancing.combination import COMBINATIONS
from hf_multitask.data.collator import DataCollatorForMultiTask
from hf_multitask.data.sources import make_sources
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.conversion import select_tasks
from hf_multitask.models.encoder_decoder import decoder_parameters
from hf_multitask.prediction import Predictor

CONFIG = dict(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=66,
    pad_token_id=3,
    bos_token_id=1,
    eos_token_id=2,
)
# In the default run; the others, which differ in no path of these tasks, are longer proofs.
DEFAULT = {
    *(("encoder", kind) for kind in ("hard", "soft, cross-stitched")),
    *(("decoder", kind) for kind in ("hard", "adapter, shared", "prefix")),
    ("t5", "hard"),
}


def kinds(*names: str) -> list:
    """Return families and sharing schemes, of these names (or all), as parameters."""
    every = [
        *(("encoder", kind) for kind in KINDS),
        *(("decoder", kind) for kind in KINDS if "cross" not in kind),
        *((family, "hard") for family in ENCODER_DECODERS),
    ]
    return [
        pytest.param(which, id=", ".join(which), marks=() if which in DEFAULT else pytest.mark.slow)
        for which in every
        if not names or which[1] in names
    ]


EVERY = pytest.mark.parametrize("which", kinds())
SOME = pytest.mark.parametrize("which", kinds("hard", "soft", "adapter, shared", "mixture"))


def build(which: tuple[str, str], tied: bool = True) -> MultiTaskModel:
    family, kind = which
    scheme, options = KINDS[kind]
    torch.manual_seed(0)
    if family == "encoder":
        backbone, tasks = BACKBONES["bert"](), encoder_tasks()
    elif family in ENCODER_DECODERS:
        backbone, tasks = encoder_decoder(family), seq2seq_tasks()
    else:
        backbone, tasks = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=tied)), decoder_tasks()
    options = {**options, **quiet(kind)}
    model = SCHEMES[scheme].from_backbone(backbone, tasks, head_dropout=0.0, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def train(datasets, tokenizer):
    """A function that trains a model on its tasks' rows, and returns the trainer."""

    def run(model, *, resume=None, start=True, **arguments):
        rows = {"reviews": datasets["reviews"]}
        evaluation = {"reviews": datasets["reviews"].select(range(9))}
        if len(model.tasks) > 2:
            rows["sayings"], evaluation["sayings"] = sayings(), sayings(5)
        args = MultiTaskTrainingArguments(
            **{
                "output_dir": "out",
                "max_steps": 4,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "task_sampling": "uniform",
                **arguments,
            }
        )
        trainer = MultiTaskTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=evaluation,
            processing_class=tokenizer if len(model.tasks) == 2 else decoder_tokenizer(),
        )
        if start:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@EVERY
@pytest.mark.sample(12)
def test_every_parameter_is_trained_and_belongs_to_somebody(train, tmp_path, which):
    model = build(which)
    shared, own = list(model.shared_parameters()), [p for t in model.tasks for p in model.task_parameters(t.name)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in [*shared, *own]}) == len(shared) + len(own) == len(trained)
    before = weights(model)
    train(model, output_dir=str(tmp_path), weight_decay=0.0, max_steps=6)
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(before[name], p)]
    # What sees no row, or where a gradient is 0 by symmetry, may stay.
    assert not [name for name in still if "position" not in name and "token_type" not in name], still


@EVERY
@pytest.mark.sample(12)
def test_saved_and_loaded_they_are_the_same(train, tmp_path, which):
    trainer = train(build(which), output_dir=str(tmp_path), max_steps=2)
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "model")
    check_equal(weights(trainer.model), weights(loaded))
    again = train(loaded, output_dir=str(tmp_path), start=False).evaluate()
    for key, value in metrics.items():
        assert key.endswith(("runtime", "per_second", "epoch")) or again[key] == value, key


@SOME
@pytest.mark.sample(12)
def test_layouts_give_one_update(train, tmp_path, which):
    models = [build(which) for _ in range(2)]
    for model, (rows, accumulation) in zip(models, ((8, 1), (2, 4)), strict=True):
        train(
            model,
            output_dir=str(tmp_path),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            max_steps=3,
        )
    check_close(weights(models[0]), weights(models[1]), 1e-4)


@SOME
@pytest.mark.sample(12)
def test_interrupted_and_resumed_it_ends_where_it_would_have(train, tmp_path, which):
    whole = build(which)
    train(whole, output_dir=str(tmp_path / "a"), max_steps=12)  # more than one pass over the rows
    part = build(which)
    train(part, output_dir=str(tmp_path / "b"), max_steps=12, save_strategy="steps", save_steps=5)
    resumed = build(which)
    train(resumed, output_dir=str(tmp_path / "b"), max_steps=12, resume=str(tmp_path / "b" / "checkpoint-5"))
    check_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "which",
    [("encoder", "hard"), ("decoder", "hard"), ("decoder", "adapter, shared"), ("t5", "hard"), ("bart", "hard")],
)
@pytest.mark.sample(12)
def test_coefficients_reach_the_table_of_embeddings_in_every_way(train, tmp_path, which, monkeypatch):
    """Written from buffers, scaled in a plain step, or in a second pass after sketches: one gradient."""
    monkeypatch.setitem(
        COMBINATIONS, "mgda", lambda gramian: torch.linspace(1.0, 0.2, len(gramian), dtype=gramian.dtype)
    )
    results = []
    for memory, every in (("buffer", 1), ("buffer", 2), ("sketch", 1)):
        model = build(which)
        train(
            model,
            output_dir=str(tmp_path),
            gradient_combination="mgda",
            gradient_memory=memory,
            combination_every=every,
            optim="sgd",
            learning_rate=0.05,
            max_steps=4,
            max_grad_norm=0.0,
        )
        results.append(weights(model))
    for other in results[1:]:
        check_close(results[0], other, 1e-4)


@pytest.mark.parametrize("memory", ["buffer", "sketch"])
@pytest.mark.parametrize(
    "which", [("encoder", "hard"), ("decoder", "hard"), ("decoder", "adapter, shared"), ("t5, untied", "hard")]
)
@pytest.mark.sample(8)
def test_gradients_task_by_task_make_the_plain_step(train, tmp_path, which, memory, monkeypatch):
    """A combination that decides nothing (one constant for all) must be the plain step, tied table included."""
    plain, combined = build(which), build(which)
    arguments = dict(optim="sgd", learning_rate=0.05, max_steps=3, max_grad_norm=0.0)
    train(plain, output_dir=str(tmp_path), **arguments)
    monkeypatch.setitem(COMBINATIONS, "mgda", lambda gramian: torch.ones(len(gramian), dtype=gramian.dtype))
    options = {"gradient_combination": "mgda", "gradient_memory": memory, "combination_every": 2}
    train(combined, output_dir=str(tmp_path), **arguments, **options)
    check_close(weights(plain), weights(combined), 1e-4)


@pytest.mark.parametrize(
    "which", [("encoder", "hard"), ("encoder", "soft"), ("decoder", "hard"), ("decoder", "prefix"), ("t5", "hard")]
)
@pytest.mark.sample(3)
def test_an_auxiliary_task_changes_no_answer(train, tmp_path, which):
    trainer = train(build(which), output_dir=str(tmp_path))
    model = trainer.model.eval()
    kept = [task.name for task in model.tasks if not task.auxiliary]
    alone = select_tasks(model, kept)
    ids = torch.randint(5, 90, (3, 7))
    check_equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    assert "words" not in model(input_ids=ids).logits and "words" not in trainer.predict(trainer.eval_dataset)


def collate(tasks, rows, dataset, packing=False):
    """A batch of some rows of each source."""
    numbers = {}
    for i in range(len(dataset)):
        name, row = dataset.locate(i)
        if row in rows:
            numbers.setdefault(name, []).append(i)
    batch = [dataset[i] for part in numbers.values() for i in part]
    return DataCollatorForMultiTask(decoder_tokenizer(), tasks, packing=packing)(batch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["hard", "soft", "adapter", "conditioned"])
def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(train, tmp_path, kind, attention):
    model = build(("decoder", kind))
    model.set_attn_implementation(attention)
    dataset = train(model, output_dir=str(tmp_path), start=False).train_dataset
    model.train()
    results = []
    for packing in (False, True):
        batch = collate(model.tasks, range(7), dataset, packing)
        assert batch.get("packed", False) == packing
        if packing:
            assert batch["segments"]["repeat"].rows < 7 and batch["num_tokens"] == results[0][2]["num_tokens"]
            assert batch["num_items"] == results[0][2]["num_items"]
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.row_losses, gradients, batch))
    assert results[0][0].keys() == results[1][0].keys()
    for task, losses in results[0][0].items():
        torch.testing.assert_close(losses, results[1][0][task], rtol=1e-5, atol=1e-5)
    check_close(results[0][1], results[1][1], 1e-4)


def test_packing_in_training_is_the_same_training(train, tmp_path):
    models = [build(("decoder", "hard")) for _ in range(2)]
    for model, packing in zip(models, (False, True), strict=True):
        train(model, output_dir=str(tmp_path), packing=packing, optim="sgd", learning_rate=0.1)
    check_close(weights(models[0]), weights(models[1]), 1e-4)
    with pytest.raises(ValueError, match="packing=True does not go with PrefixModel"):
        train(build(("decoder", "prefix")), output_dir=str(tmp_path), packing=True)
    with pytest.raises(ValueError, match="packing=True is for causal_lm tasks"):
        train(build(("encoder", "hard")), output_dir=str(tmp_path), packing=True)


@pytest.mark.parametrize("kind", ["hard", "prefix", "adapter, shared"])
@pytest.mark.sample(3)
def test_generating_tasks_are_evaluated_by_what_they_write(train, tmp_path, kind):
    model = build(("decoder", kind))
    trainer = train(
        model,
        output_dir=str(tmp_path),
        predict_with_generate=True,
        max_steps=60,
        learning_rate=0.01 if kind == "hard" else 0.03,
        per_device_train_batch_size=16,
    )
    metrics = trainer.evaluate()
    if kind == "hard":  # a frozen backbone of random weights learns less
        assert metrics["eval_mood_label_accuracy"] > 0.8  # the words say it plainly
    assert 0 < metrics["eval_repeat_rouge_l"] <= 1 and 0 <= metrics["eval_repeat_exact_match"] <= 1
    assert metrics["eval_words_perplexity"] == pytest.approx(
        torch.tensor(metrics["eval_words_loss"]).exp().item(), 1e-4
    )
    assert "eval_words_exact_match" not in metrics
    written = trainer.predict({"sayings": sayings(3).remove_columns("target")}, max_new_tokens=9)["repeat"].predictions
    own = decoder_tokenizer()
    prompts = own([f"{row['said']} and" for row in sayings(3)], padding=True, padding_side="left", return_tensors="pt")
    prompts = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    direct = model.generate(**prompts, task="repeat", max_new_tokens=9, pad_token_id=3)
    for one, other in zip(written.tolist(), direct[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
        assert [token for token in one if token != 3] == [token for token in other if token != 3]


def test_writing_and_ranking_compute_in_the_precision_of_the_run(train, tmp_path):
    model, seen = build(("decoder", "hard")), []
    trainer = train(model, output_dir=str(tmp_path), predict_with_generate=True, max_steps=1, bf16=True)
    layer = next(module for module in model.modules() if type(module) is torch.nn.Linear)
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    (rows,) = [part for part in trainer.eval_dataset.split() if part.sources[0].name == "reviews:mood"]
    (mood,) = rows.sources[0].tasks
    trainer._evaluator(mood).label_scores(rows)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    trainer.evaluate()
    assert set(seen) == {torch.bfloat16}


def test_batch_size_does_not_change_what_is_written_or_ranked(train, tmp_path):
    model = build(("decoder", "hard"))
    results = []
    for rows in (1, 3, 16):
        trainer = train(
            copy.deepcopy(model),
            output_dir=str(tmp_path),
            start=False,
            predict_with_generate=True,
            per_device_eval_batch_size=rows,
        )
        results.append({k: v for k, v in trainer.evaluate().items() if "repeat" in k or "mood" in k})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            assert other[key] == pytest.approx(value, rel=1e-4), key


def test_untied_tables_are_trained_shared_and_saved(train, tmp_path):
    model = build(("decoder", "hard"), tied=False)
    assert any(p is model.lm_head.weight for p in model.shared_parameters())
    before = model.lm_head.weight.detach().clone()
    trainer = train(model, output_dir=str(tmp_path))
    assert not torch.equal(before, model.lm_head.weight)
    trainer.save_model(tmp_path / "m")
    check_equal(weights(model), weights(AutoModelForMultiTask.from_pretrained(tmp_path / "m")))


def test_a_frozen_scheme_leaves_the_untied_table_to_the_backbone(train, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / "backbone")
    model = SCHEMES["adapter"].from_backbone(str(tmp_path / "backbone"), decoder_tasks())
    before = model.lm_head.weight.detach().clone()
    trainer = train(model, output_dir=str(tmp_path / "out"))
    assert torch.equal(before, model.lm_head.weight)
    trainer.save_model(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith(("backbone.", "lm_head."))]
    check_equal(weights(model), weights(AutoModelForMultiTask.from_pretrained(tmp_path / "m")))


def test_sources_are_the_tasks_own():
    names = [source.name for source in make_sources(decoder_tasks())]
    assert names == ["reviews:tone", "reviews:words", "reviews:mood", "sayings"]


def held_out_tasks():
    tasks = decoder_tasks()
    return [*tasks[:3], replace(tasks[3], held_out=True)]


@pytest.mark.parametrize("given", [True, False])
def test_held_out_tasks_are_evaluated_and_never_trained(datasets, tmp_path, given):
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=True))
    model = SCHEMES["hard"].from_backbone(backbone, held_out_tasks())
    rows = {"reviews": datasets["reviews"], **({"sayings": sayings()} if given else {})}
    trainer = MultiTaskTrainer(
        model=model,
        args=MultiTaskTrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=rows,
        eval_dataset={"reviews": datasets["reviews"].select(range(6)), "sayings": sayings(5)},
        processing_class=decoder_tokenizer(),
    )
    trainer.train()
    assert trainer.progress.rows_seen.keys() == {"tone", "words", "mood"}
    metrics = trainer.evaluate()
    assert metrics["eval_held_out_average"] == metrics["eval_repeat_accuracy"]
    assert metrics["eval_average"] == pytest.approx(
        (metrics["eval_tone_accuracy"] + metrics["eval_mood_label_accuracy"]) / 2
    )


@pytest.mark.parametrize("kind", ["prefix", "soft"])
def test_tasks_cannot_be_held_out_where_each_has_parameters_of_its_own(datasets, tmp_path, kind):
    model = SCHEMES[kind].from_backbone(LlamaForCausalLM(LlamaConfig(**CONFIG)), held_out_tasks())
    with pytest.raises(ValueError, match=r"held_out tasks \(repeat\) do not go with"):
        MultiTaskTrainer(
            model=model,
            args=MultiTaskTrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
            train_dataset={"reviews": datasets["reviews"]},
            processing_class=decoder_tokenizer(),
        )


SELDOM = {
    "task_sampling": "weighted",
    "task_sampling_kwargs": {"weights": {"reviews:tone": 40, "reviews:words": 0, "reviews:mood": 1, "sayings": 1}},
    "weight_decay": 0.5,
}


@pytest.mark.parametrize(
    "setting",
    [
        ("encoder", "hard", {"gradient_combination": "upgrad"}),
        ("decoder", "adapter, shared", {"packing": True}),
        # Some steps have no row of a task that writes: decay must then leave the decoder alone.
        ("t5, untied", "hard", SELDOM),
        pytest.param(("bart", "hard", {"gradient_combination": "upgrad"}), marks=pytest.mark.slow),
        pytest.param(("encoder", "hard", {}), marks=pytest.mark.slow),
        pytest.param(("encoder", "soft", {}), marks=pytest.mark.slow),
        pytest.param(("decoder", "hard", {"packing": True}), marks=pytest.mark.slow),
        pytest.param(("decoder", "hard", {"gradient_combination": "upgrad"}), marks=pytest.mark.slow),
        pytest.param(("decoder", "prefix", {}), marks=pytest.mark.slow),
    ],
    ids=lambda setting: ", ".join([*setting[:2], *setting[2]]),
)
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, setting):
    family, kind, extra = setting
    script = str(Path(__file__).with_name("language_processes.py"))
    results = []
    for processes in (1, 2):
        out = str(tmp_path / f"{processes}.pt")
        address = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        environments = [address | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
        command = [sys.executable, script, out, family, kind, json.dumps(extra)]
        run_together([command] * processes, environments if processes > 1 else [{}])
        results.append(torch.load(out, weights_only=True))
    one, two = results
    check_close(one["weights"], two["weights"], 1e-3)
    for key, value in one["metrics"].items():
        if key.endswith(("runtime", "per_second")):
            continue
        assert two["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_evaluation_may_be_of_the_first_rows(train, tmp_path):
    model = build(("encoder", "hard"))
    whole = train(model, output_dir=str(tmp_path), start=False)
    part = train(model, output_dir=str(tmp_path), start=False, max_eval_samples=3)
    assert set(whole.eval_dataset.sizes.values()) == {9} and set(part.eval_dataset.sizes.values()) == {3}
    assert part.evaluate({"reviews": Dataset.from_dict({"text": ["good"] * 5, "label": ["positive"] * 5})})
    assert set(part.train_dataset.sizes.values()) == {40}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@pytest.mark.sample(3)
def test_encoder_decoders_are_evaluated_by_what_they_write(train, tmp_path, family):
    model = build((family, "hard"))
    arguments = dict(max_steps=90, learning_rate=0.01, per_device_train_batch_size=16, logging_steps=90)
    trainer = train(model, output_dir=str(tmp_path), predict_with_generate=True, **arguments)
    metrics = trainer.evaluate()
    assert metrics["eval_mood_label_accuracy"] > 0.8 and metrics["eval_mood_exact_match"] > 0.6
    assert 0 < metrics["eval_repeat_rouge_l"] <= 1 and 0 <= metrics["eval_repeat_exact_match"] <= 1
    assert metrics["eval_repeat_perplexity"] == pytest.approx(
        torch.tensor(metrics["eval_repeat_loss"]).exp().item(), 1e-4
    )
    assert metrics["eval_average"] == pytest.approx(
        (metrics["eval_tone_accuracy"] + metrics["eval_mood_label_accuracy"] + metrics["eval_repeat_accuracy"]) / 3
    )
    (rows,) = [part for part in trainer.eval_dataset.split() if part.sources[0].name == "reviews:mood"]
    scores = trainer._evaluator(model.tasks[2]).label_scores(rows)
    right = sum(scores[i][rows[i]["answer"]] for i in range(len(rows)))
    tokens = sum(len(rows[i]["labels_mood"]) for i in range(len(rows)))
    assert -right / tokens == pytest.approx(metrics["eval_mood_loss"], rel=1e-5)
    own, asked = decoder_tokenizer(), sayings(3)
    written = trainer.predict({"sayings": asked.remove_columns("target")}, max_new_tokens=7)["repeat"].predictions
    texts = own(list(asked["said"]), padding=True, padding_side="right", return_tensors="pt")
    texts = {key: texts[key] for key in ("input_ids", "attention_mask")}
    direct = model.generate(**texts, task="repeat", max_new_tokens=7, pad_token_id=3)[:, 1:]
    assert written.tolist() == direct.tolist() and len(set(map(tuple, written.tolist()))) > 1
    answers = next(Predictor(model, own)([{"text": "the film was great", "said": "paris"}]))
    assert set(answers) == {"tone", "mood", "repeat"} and answers["mood"]["label"] == "positive"
    for rows in (1, 16):
        options = dict(start=False, predict_with_generate=True, per_device_eval_batch_size=rows)
        found = train(copy.deepcopy(model), output_dir=str(tmp_path), **options).evaluate()
        for key in (key for key in metrics if "mood" in key or "repeat" in key):
            assert found[key] == pytest.approx(metrics[key], rel=1e-4), key


@pytest.mark.parametrize("combination", ["sum", "upgrad"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
@pytest.mark.sample(4)
def test_a_step_that_trains_nothing_that_writes_leaves_the_decoder_alone(train, tmp_path, family, combination):
    """Gradients of zeros would let momentum and decay move it, where all parameters take part in a step."""
    for weights_of_tasks, moves in ((dict(words=0.0, mood=0.0, repeat=0.0), False), (dict(words=0.0, mood=0.0), True)):
        tasks = [replace(task, weight=weights_of_tasks.get(task.name, task.weight)) for task in seq2seq_tasks()]
        model = SCHEMES["hard"].from_backbone(encoder_decoder(family), tasks)
        decoder = [*decoder_parameters(model.backbone), *(model.lm_head.parameters() if model.lm_head else ())]
        before = [parameter.detach().clone() for parameter in decoder]
        train(model, output_dir=str(tmp_path), gradient_combination=combination, weight_decay=0.5, max_steps=2)
        assert moves != all(torch.equal(one, other) for one, other in zip(decoder, before, strict=True))
