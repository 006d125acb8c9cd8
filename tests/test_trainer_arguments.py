"""The trainer takes what `Trainer` takes, in its order, and passes on only what it was given."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Trainer, TrainerCallback

from hf_multitask import (
    DataCollatorForMultiTask,
    MultiTaskSeq2SeqTrainer,
    MultiTaskSeq2SeqTrainingArguments,
    MultiTaskTrainer,
    MultiTaskTrainerMixin,
    MultiTaskTrainingArguments,
)

PAIRS = [
    (MultiTaskTrainer, Trainer, MultiTaskTrainingArguments),
    (MultiTaskSeq2SeqTrainer, Seq2SeqTrainer, MultiTaskSeq2SeqTrainingArguments),
]


def make_args(kind, tmp_path, **more):
    return kind(str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **more)


@pytest.mark.parametrize(("ours", "theirs", "_"), PAIRS)
def test_the_signature_is_that_of_the_trainer_itself(ours, theirs, _):
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)


@pytest.mark.parametrize(("ours", "theirs", "kind"), PAIRS)
def test_every_argument_can_be_given_by_its_place(ours, theirs, kind, model, datasets, tokenizer, tmp_path):
    class Mine(TrainerCallback):
        pass

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collator = DataCollatorForMultiTask(tokenizer, model.tasks)

    def keep(logits, labels):
        return logits

    values = {
        "model": model,
        "args": make_args(kind, tmp_path),
        "data_collator": collator,
        "train_dataset": datasets,
        "eval_dataset": datasets,
        "processing_class": tokenizer,
        "model_init": None,
        "compute_loss_func": None,
        "compute_metrics": {"names": lambda prediction: {"mine": 1.0}},
        "callbacks": [Mine()],
        "optimizers": (optimizer, None),
        "optimizer_cls_and_kwargs": None,
        "preprocess_logits_for_metrics": keep,
    }
    names = [name for name in inspect.signature(theirs).parameters]
    assert set(names) <= set(values)
    trainer = ours(*[values[name] for name in names])
    assert trainer.optimizer is optimizer and trainer.data_collator is collator and trainer.model is model
    assert any(isinstance(callback, Mine) for callback in trainer.callback_handler.callbacks)
    assert trainer.preprocess_logits_for_metrics is keep
    trainer.train()
    assert trainer.evaluate()["eval_names_mine"] == 1.0


@pytest.mark.parametrize(("ours", "theirs", "_"), PAIRS)
def test_a_plain_model_takes_them_by_place_too(ours, theirs, _, bert, tmp_path):
    from transformers import BertForSequenceClassification, Seq2SeqTrainingArguments, TrainingArguments

    kind = Seq2SeqTrainingArguments if theirs is Seq2SeqTrainer else TrainingArguments
    plain = BertForSequenceClassification(bert.config)
    rows = Dataset.from_dict({"input_ids": [[1, 5, 2]] * 4, "label": [0, 1] * 2})
    given = [plain, make_args(kind, tmp_path), None, rows, None, make_tokenizer(), None, None, None, [], (None, None)]
    ours(*given).train()


class Short(Trainer):
    """One with a short `__init__`, as people write them."""

    def __init__(self, model, args, train_dataset, processing_class, temperature=1.0):
        super().__init__(model, args, train_dataset=train_dataset, processing_class=processing_class)
        self.temperature = temperature


class Passing(Trainer):
    """One that passes on what it does not know."""

    def __init__(self, *args, temperature=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature


class Recording(Trainer):
    """One that says what it was given."""

    def __init__(self, model, args, **kwargs):
        self.given = set(kwargs)
        super().__init__(model, args, **kwargs)


def test_a_trainer_with_a_short_init_gets_only_what_it_takes(model, datasets, tokenizer, tmp_path):
    class Mine(MultiTaskTrainerMixin, Short):
        pass

    trainer = Mine(model, make_args(MultiTaskTrainingArguments, tmp_path), datasets, tokenizer, 0.5)
    assert trainer.temperature == 0.5 and isinstance(trainer.data_collator, DataCollatorForMultiTask)
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(TypeError, match="'callbacks'"):
        Mine(model, make_args(MultiTaskTrainingArguments, tmp_path), datasets, tokenizer, callbacks=[])


def test_a_trainer_that_passes_on_gets_places_and_names(model, datasets, tokenizer, tmp_path):
    class Mine(MultiTaskTrainerMixin, Passing):
        pass

    args = make_args(MultiTaskTrainingArguments, tmp_path, eval_strategy="steps")
    trainer = Mine(model, args, None, datasets, datasets, processing_class=tokenizer, temperature=0.5)
    trainer.train()
    assert trainer.temperature == 0.5 and trainer.state.global_step == 1
    with pytest.raises(TypeError, match="multiple values.*'model'"):
        Mine(model, args, model=model)
    with pytest.raises(TypeError, match="20 positional"):
        Mine(*[None] * 20)


def test_only_what_was_given_is_passed_on(model, datasets, tokenizer, tmp_path):
    class Mine(MultiTaskTrainerMixin, Recording):
        pass

    args = make_args(MultiTaskTrainingArguments, tmp_path, eval_strategy="steps")
    trainer = Mine(model, args, train_dataset=datasets, eval_dataset=datasets, processing_class=tokenizer)
    assert trainer.given == {"train_dataset", "eval_dataset", "processing_class", "data_collator"}
    stopping = [EarlyStoppingCallback()]
    more = dict(train_dataset=datasets, eval_dataset=datasets, processing_class=tokenizer, callbacks=stopping)
    assert Mine(model, args, **more).given == {*trainer.given, "callbacks"}
