"""Looking at questions and choices before training: what is counted, and what cannot be measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BACKBONES, make_tokenizer
from datasets import Dataset
from questions import choices, question_datasets, question_tasks

from hf_multitask import HardSharingModel, gradient_conflicts
from hf_multitask.analysis.preflight_rows import read_lengths, read_split
from hf_multitask.data.sources import make_sources

TONE, WHO, NEXT = question_tasks()


def test_choices_are_part_of_a_text_and_of_its_length():
    (source,) = make_sources([NEXT])
    rows = Dataset.from_dict(
        {
            "question": ["the film was"] * 3,
            "choices": [["good", "very very bad"], ["good", "sad"], ["good", "sad"]],
            "label": [0, 1, 1],
        }
    )
    facts = read_split(rows, source, "train")
    assert len(np.unique(facts.hashes)) == 2 and not facts.empty.any()
    facts = read_lengths(facts, rows, source, make_tokenizer(), 32, 10)
    assert facts.lengths.tolist() == [9, 7, 7] and facts.max_length == 32  # of the longest pair: 3 + 3 + 3 special


def test_contexts_that_are_read_in_windows_are_not_cut():
    (source,) = make_sources([WHO])
    rows = question_datasets()["who"]
    facts = read_lengths(read_split(rows, source, "train"), rows, source, make_tokenizer(), 32, 10)
    assert facts.rows == 24 and facts.lengths is None


def model_and_rows(tasks):
    torch.manual_seed(0)
    data = question_datasets(who=30, next=30)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), tasks, head_dropout=0.0)
    return model, {task.dataset: data[task.dataset] for task in tasks}


def test_their_gradients_are_compared():
    model, rows = model_and_rows([WHO, NEXT])
    found = gradient_conflicts(model, rows, make_tokenizer(), 3, batch_size=6, head_warmup_steps=0, max_length=24)
    assert found.tasks == ("who", "next") and np.isfinite(found.cosines).all() and (found.norms > 0).all()


@pytest.mark.parametrize("task", [WHO, NEXT], ids=lambda task: task.name)
def test_heads_that_read_more_than_one_vector_are_not_fitted_to_features(task):
    other = question_tasks()[1 if task is NEXT else 2]
    model, rows = model_and_rows([task, other])
    with pytest.raises(
        ValueError, match=f"task '{task.name}': the features of a .* cannot be cached.*head_warmup_steps=0"
    ):
        gradient_conflicts(model, rows, make_tokenizer(), 3, batch_size=6, max_length=24)


def test_choices_of_repeated_questions_are_no_repetition():
    (source,) = make_sources([NEXT])
    facts = read_split(choices(rows=20), source, "train")
    assert len(np.unique(facts.hashes)) == 20
