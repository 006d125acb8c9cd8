"""A trial with an argument is the training of a trainer that was made with it, whichever argument it is."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from conftest import BACKBONES, PAD_ID, make_datasets, make_tasks, make_tokenizer
from language import decoder_tokenizer
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task

pytest.importorskip("optuna")

DATASETS = make_datasets(rows=24)
SIZES = {"reviews": 24, "traits": 12}


def encoder(trial=None):
    tasks = [make_tasks()[0], replace(make_tasks()[2], auxiliary=True, weight=0.5), make_tasks()[1]]
    torch.manual_seed(0)
    return HardSharingModel.from_backbone(BACKBONES["bert"](), tasks)


def decoder(trial=None):
    torch.manual_seed(0)
    size = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    llama = LlamaForCausalLM(LlamaConfig(**size, pad_token_id=PAD_ID))
    answer = dict(label_column="label", dataset="reviews", generation={"max_new_tokens": 2})
    tasks = [Task("mood", "causal_lm", prompt="{text} it", **answer), Task("words", "causal_lm", dataset="traits")]
    return HardSharingModel.from_backbone(llama, tasks)


# By setting: the model, the tokenizer, and whether the training rows are streams.
SETTINGS = {
    "encoder": (encoder, make_tokenizer, False),
    "decoder": (decoder, decoder_tokenizer, False),
    "streams": (encoder, make_tokenizer, True),
}
CHOOSING = dict(save_strategy="best", load_best_model_at_end=True)
# By argument: a value, whether it changes what comes out, and what else is set.
SEARCHED = {
    "task_sampling": ("uniform", True, {}),
    "task_sampling_kwargs": ('{"alpha": 0.0}', True, {"task_sampling_kwargs": {"alpha": 1.0}}),
    "batch_composition": ("single_task", True, {}),
    "loss_reduction": ("tasks", True, {}),
    "primary_task": ("strength", True, CHOOSING),
    "loss_weighting": ("random", True, {}),
    "loss_weighting_kwargs": ({"decay": 0.1}, True, {"loss_weighting": "normalized"}),
    "gradient_combination": ("mgda", True, {}),
    "gradient_combination_kwargs": ({"c": 0.9}, True, {"gradient_combination": "cagrad"}),
    "auxiliary_gating": ("weighted_cosine", True, {}),
    "combination_every": (3, True, {"gradient_combination": "mgda"}),
    "gradient_memory": ("sketch", True, {"gradient_combination": "mgda"}),
    "conflict_logging_steps": (1, True, {}),
    "on_nonfinite_loss": ("skip", False, {}),
    "max_skipped_steps": (3, False, {}),
    "backbone_learning_rate": (0.1, True, {}),
    "head_learning_rate": (0.1, True, {}),
    "max_length": (5, True, {"max_length": 16}),
    "dataset_num_proc": (1, False, {}),
    "predict_with_generate": (True, True, {"setting": "decoder"}),
    "max_eval_samples": (3, True, {}),
    "packing": (True, True, {"setting": "decoder"}),
    "packing_length": (16, True, {"setting": "decoder", "packing": True}),
    "dataset_sizes": ('{"reviews": 4, "traits": 60}', True, {"setting": "streams", "dataset_sizes": SIZES}),
    "hub_include_code": (True, False, {}),
    # Of `Trainer`'s own, those that construction looks at.
    "seed": (7, True, {}),
    "data_seed": (7, True, {}),
    "metric_for_best_model": ("eval_strength_mse", True, CHOOSING),
    "greater_is_better": (False, True, CHOOSING),
    "lr_scheduler_type": ("reduce_lr_on_plateau", True, {"primary_task": "strength"}),
    "per_device_train_batch_size": (2, True, {"setting": "streams", "dataset_sizes": SIZES}),
    "train_sampling_strategy": ("group_by_length", True, {"per_device_train_batch_size": 2}),
}
_TIMES = ("runtime", "per_second")


class Watch(TrainerCallback):
    """Keeps what comes out of each training."""

    def __init__(self):
        self.outcomes = []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        lines = [{k: v for k, v in line.items() if not k.endswith(_TIMES)} for line in state.log_history]
        own = {"total_flos", "train_loss"}
        lines = [{k: v for k, v in line.items() if k not in own} for line in lines]
        names = ("metric_for_best_model", "greater_is_better", "lr_scheduler_kwargs")
        settled = {name: getattr(args, name) for name in names} | {"best": state.best_metric}
        self.outcomes.append((weights, lines, settled))


def same(one, other) -> bool:
    weights = all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    # NaN in a log equals itself.
    return weights and json.dumps(one[1:]) == json.dumps(other[1:])


def make(tmp_path, setting="encoder", make_model=None, **arguments):
    build, tokenizer, streamed = SETTINGS[setting]
    names = ("reviews", "traits")
    rows = {name: DATASETS[name].to_iterable_dataset() if streamed else DATASETS[name] for name in names}
    defaults = dict(output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=6, learning_rate=1e-2)
    defaults |= dict(eval_strategy="steps", eval_steps=1, save_strategy="no", logging_steps=1, report_to="none")
    watch = Watch()
    trainer = MultiTaskTrainer(
        model_init=make_model or build,
        args=MultiTaskTrainingArguments(**{**defaults, **arguments}, disable_tqdm=True, use_cpu=True),
        train_dataset=rows,
        eval_dataset={name: DATASETS[name] for name in names},
        processing_class=tokenizer(),
        callbacks=[watch],
    )
    return trainer, watch.outcomes


def search(trainer, trials):
    trainer.hyperparameter_search(
        lambda trial: trials[trial.number], lambda metrics: 0.0, n_trials=len(trials), backend="optuna"
    )


def test_every_argument_of_ours_is_in_the_table():
    ours = {field.name for field in fields(MultiTaskTrainingArguments)}
    assert ours - {field.name for field in fields(TrainingArguments)} <= set(SEARCHED)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.sample(16)
def test_a_trial_is_the_training_of_a_trainer_made_with_its_arguments(tmp_path, name):
    value, matters, options = SEARCHED[name]
    trainer, outcomes = make(tmp_path / "search", **options)
    search(trainer, [{name: value}, {}])
    given = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
    fresh, expected = make(tmp_path / "fresh", **{**options, name: given})
    fresh.train()
    plain, usual = make(tmp_path / "plain", **options)
    plain.train()
    assert same(outcomes[0], expected[0])
    assert same(outcomes[1], usual[0])  # nothing of the first trial is left
    assert same(expected[0], usual[0]) is not matters


def test_max_length_is_applied_in_every_trial(tmp_path):
    trainer, _ = make(tmp_path, max_length=16)
    longest = []
    loader = trainer.get_train_dataloader
    trainer.get_train_dataloader = lambda: (
        longest.append(max(map(len, trainer.train_dataset.rows[0]["input_ids"]))) or loader()
    )
    search(trainer, [{"max_length": 5}, {"max_length": 8}, {}])
    assert longest[:2] == [5, 8] and longest[2] > 8


def test_an_argument_that_is_assigned_is_applied_too(tmp_path):
    trainer, outcomes = make(tmp_path / "assigned", max_length=16)
    trainer.args.max_length, trainer.args.loss_weighting = 5, "random"
    trainer.train()
    fresh, expected = make(tmp_path / "fresh", max_length=5, loss_weighting="random")
    fresh.train()
    assert same(outcomes[0], expected[0])
    trainer.args.gradient_memory = "bufer"
    with pytest.raises(ValueError, match="'bufer'.*'buffer'"):
        trainer.train()


def test_tasks_of_a_trial_s_model_are_applied(tmp_path):
    def by_trial(trial):
        changes = {} if trial is None else {"weight": 3.0, "max_length": 5}
        tasks = [replace(make_tasks()[0], **changes), make_tasks()[2]]
        torch.manual_seed(0)
        return HardSharingModel.from_backbone(BACKBONES["bert"](), tasks)

    trainer, outcomes = make(tmp_path / "search", make_model=by_trial)
    search(trainer, [{"unknown to arguments": 1}])
    fresh, expected = make(tmp_path / "fresh", make_model=lambda: by_trial("trial"))
    fresh.train()
    assert same(outcomes[0], expected[0])


REFUSED = {
    "no argument": ({"max_lenght": 5}, "'max_lenght'.*'max_length'"),
    "used when the trainer is made": ({"report_to": "none"}, "report_to"),
    "a value that is none": ({"task_sampling": "unifrom"}, "'unifrom'.*'uniform'"),
    "what several tasks cannot honour": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    "too long for the backbone": ({"max_length": 100}, "max_length=100"),
    "a primary task that does not exist": ({"primary_task": "tune"}, "'tune'.*'tone'"),
    "packing for encoders": ({"packing": True}, "packing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused_before_the_first_step(tmp_path, case):
    params, match = REFUSED[case]
    trainer, outcomes = make(tmp_path, make_model=lambda: encoder())
    with pytest.raises(ValueError, match=match):
        search(trainer, [params])
    assert not outcomes and trainer.state.global_step == 0


def test_datasets_that_were_prepared_beforehand_cannot_be_cut_anew(tmp_path):
    first, _ = make(tmp_path / "first", max_length=16)
    trainer = MultiTaskTrainer(
        model_init=encoder,
        args=first.args,
        train_dataset=first.train_dataset,
        eval_dataset=first.eval_dataset,
        processing_class=make_tokenizer(),
        callbacks=[EarlyStoppingCallback()],
    )
    with pytest.raises(ValueError, match="max_length cannot change.*train_dataset was prepared"):
        search(trainer, [{"max_length": 5}])
