"""Short rows stand together in long sequences: each once, none too long, and never at a higher cost than apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from language import decoder_tokenizer
from language_models import make_plain

from hf_multitask import DataCollatorForMultiTask, HardSharingModel, Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.packing import keeps_rows_apart, plan_packing
from hf_multitask.data.preprocessing import check_packing
from hf_multitask.data.sources import make_sources
from hf_multitask.models.auto import SCHEMES

LM = Task("lm", "causal_lm")


def random_lengths(draw: np.random.Generator) -> list[int]:
    kind = draw.integers(4)
    count = int(draw.integers(1, 40))
    if kind == 0:
        return draw.integers(1, 3000, count).tolist()
    if kind == 1:
        return [int(draw.integers(1, 500))] * count
    lengths = draw.lognormal(4, 1, count).astype(int) + 1
    return lengths.tolist() if kind == 2 else np.sort(lengths)[::-1].tolist()


def cost(lengths: list[int], plan: list[list[int]]) -> float:
    longest = max(sum(lengths[row] for row in sequence) for sequence in plan)
    return len(plan) * longest * (1 + longest / 2048)


@pytest.mark.parametrize("seed", range(150))
def test_every_row_once_no_sequence_too_long_and_never_dearer_than_apart(seed):
    draw = np.random.default_rng(seed)
    lengths = random_lengths(draw)
    longest = None if seed % 3 == 0 else int(draw.integers(1, 2 * max(lengths)))
    plan = plan_packing(lengths, longest)
    assert sorted(row for sequence in plan for row in sequence) == list(range(len(lengths)))
    assert all(sequence and sequence == sorted(sequence) for sequence in plan)
    if longest is not None:
        assert all(len(one) == 1 or sum(lengths[row] for row in one) <= longest for one in plan)
    assert cost(lengths, plan) <= cost(lengths, [[row] for row in range(len(lengths))]) * (1 + 1e-12)
    assert plan_packing(lengths, longest) == plan


def test_a_row_that_is_too_long_by_itself_does_not_keep_the_others_apart():
    lengths = [100, 30, 30, 30, 10]
    plan = plan_packing(lengths, longest=95)
    assert [0] in plan and len(plan) < 5


def test_little_is_padding_where_lengths_differ_much():
    draw = np.random.default_rng(0)
    lengths = (draw.lognormal(3.5, 0.9, 64).astype(int) + 1).tolist()
    plan = plan_packing(lengths)
    longest = max(sum(lengths[row] for row in sequence) for sequence in plan)
    assert sum(lengths) / (len(plan) * longest) > 0.95
    assert sum(lengths) / (64 * max(lengths)) < 0.5


# ---- in a batch ----


def packed_batch(texts: list[str], task: Task = LM, **options):
    rows = prepare_sources(
        Dataset.from_dict({"text": texts}),
        make_sources([task]),
        "train_dataset",
        tokenizer=decoder_tokenizer(),
        max_length=32,
    )
    collate = DataCollatorForMultiTask(decoder_tokenizer(), [task], packing=True, **options)
    return rows, collate([rows[i] for i in range(len(texts))])


def test_positions_begin_anew_and_labels_are_those_of_the_rows():
    texts = ["the film was good", "we saw paris", "a film", "it was very very bad and poor"]
    rows, batch = packed_batch(texts, packing_length=13)
    assert batch["packed"] is True and len(batch["input_ids"]) < 4
    width = batch["input_ids"].shape[1]
    flat, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    segment = batch["segments"]["lm"]
    assert (segment.start, segment.stop, segment.length) == (0, len(batch["input_ids"]), width)
    assert (
        batch["num_tokens"] == sum(len(row) for row in rows.rows[0]["input_ids"]) == int(batch["attention_mask"].sum())
    )
    items = 0
    for row, (places, tokens) in enumerate(zip(batch["label_positions"]["lm"], batch["labels"]["lm"], strict=True)):
        ids = rows.rows[0]["input_ids"][row]
        known = tokens != -100
        assert tokens[known].tolist() == ids[1:] and known.tolist() == sorted(known.tolist(), reverse=True)
        start = int(places[0])
        assert start // width == int(places[known][-1]) // width  # a row is in one sequence
        assert flat[start : start + len(ids)].tolist() == ids
        assert positions[start : start + len(ids)].tolist() == list(range(len(ids)))
        items += len(ids) - 1
    assert batch["num_items"]["lm"] == items
    # Behind the last row padding is a text of its own.
    for ids, mask, own in zip(batch["input_ids"], batch["attention_mask"], batch["position_ids"], strict=True):
        rest = int((mask == 0).sum())
        assert own[len(own) - rest :].tolist() == list(range(rest)) and (ids[len(ids) - rest :] == 3).all()


def test_without_packing_there_are_no_positions():
    rows, _ = packed_batch(["the film", "we saw"])
    batch = DataCollatorForMultiTask(decoder_tokenizer(), [LM])([rows[0], rows[1]])
    assert "packed" not in batch and "position_ids" not in batch


# ---- families that can ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, capped", "qwen2", "mixtral", "gptj"])
def test_texts_in_one_row_are_kept_apart(name):
    model = HardSharingModel.from_backbone(make_plain(name), [LM]).train()
    generator = torch.get_rng_state()
    assert keeps_rows_apart(model)
    assert model.training and torch.equal(generator, torch.get_rng_state())
    check_packing(model, True)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bloom", "falcon", "bert as decoder", "opt"])
def test_families_that_read_one_text_from_another_are_refused(name, noise):
    model = HardSharingModel.from_backbone(make_plain(name, noise=noise), [LM])
    family = model.backbone.config.model_type
    with pytest.raises(ValueError, match=f"packing=True does not go with backbone '{family}', whose attention"):
        check_packing(model, True)
    check_packing(model, False)


@pytest.mark.parametrize("scheme", ["soft", "conditioned", "adapter"])
def test_schemes_are_tried_as_they_are(scheme):
    tasks = [Task("tone", "regression"), LM]
    assert keeps_rows_apart(SCHEMES[scheme].from_backbone(make_plain("llama").to(torch.bfloat16), tasks))
    assert not keeps_rows_apart(SCHEMES[scheme].from_backbone(make_plain("bloom"), tasks))
