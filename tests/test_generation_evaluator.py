"""What is written for rows, and which of a closed set of answers is the likeliest: against plain Transformers."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from language import decoder_tokenizer
from language_models import make_plain
from transformers import GenerationConfig

from hf_multitask import DataCollatorForMultiTask, HardSharingModel, Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.sources import make_sources
from hf_multitask.generation import GenerationEvaluator, check_generation
from hf_multitask.models.auto import SCHEMES

MOODS = ("negative", "positive", "good")
MOOD = Task("mood", "causal_lm", prompt="{text} was", labels=MOODS)
SAY = Task("say", "causal_lm", prompt="{text} and")
TEXTS = ["the film", "we saw paris", "it", "john saw a very very good film and maria", "berlin"]


def make(
    task: Task, name: str = "gpt2", plain=None, scheme: str = "hard", tokenizer=None, rows_per_batch: int = 2, **options
):
    plain = plain or make_plain(name, noise=0.3)
    model = SCHEMES[scheme].from_backbone(plain, [task])
    tokenizer = tokenizer or decoder_tokenizer()
    collate = DataCollatorForMultiTask(tokenizer, [task], **options)
    return GenerationEvaluator(model, task, tokenizer, collate, rows_per_batch), plain


def prepared(task: Task, columns: dict[str, list], max_length: int = 64, tokenizer=None, **options):
    return prepare_sources(
        Dataset.from_dict(columns),
        make_sources([task]),
        "eval_dataset",
        tokenizer=tokenizer or decoder_tokenizer(),
        max_length=max_length,
        **options,
    )


def continued(plain, ids: list[int], **options) -> list[int]:
    given = torch.tensor([ids])
    options = {"do_sample": False, "pad_token_id": 3, "eos_token_id": 2, **options}
    return plain.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()


def without_padding(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token != 3]


# ---- closed sets ----


@pytest.mark.parametrize("prompt", ["{text} was", "{text} : "])
@pytest.mark.parametrize(("rows_per_batch", "packing"), [(1, False), (7, False), (7, True)])
def test_the_likelihood_of_an_answer_is_that_of_its_tokens_and_its_end(prompt, rows_per_batch, packing):
    task = Task("mood", "causal_lm", prompt=prompt, labels=MOODS)
    evaluator, plain = make(task, rows_per_batch=rows_per_batch, packing=packing)
    answers = [MOODS[i % 3] for i in range(5)]
    rows = prepared(task, {"text": TEXTS, "target": answers})
    tokenizer = decoder_tokenizer()
    expected = []
    for text in TEXTS:
        before = tokenizer(prompt.format(text=text))["input_ids"]
        scores = []
        for mood in MOODS:
            after = [*tokenizer(mood)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after)))
        expected.append(scores)
    found = evaluator.label_scores(rows)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    likeliest = [MOODS[max(range(3), key=scores.__getitem__)] for scores in expected]
    right = [a == b for a, b in zip(likeliest, answers, strict=True)]
    assert evaluator.label_accuracy(rows) == pytest.approx(sum(right) / 5)
    all_right = prepared(task, {"text": TEXTS, "target": likeliest})
    assert evaluator.label_accuracy(all_right) == 1.0


@pytest.mark.parametrize("scheme", ["hard", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_longer_answers_than_a_row_has_room_for(name, scheme):
    """Prompts are cut so that their own target fits; others of the set may be longer."""
    task = Task("mood", "causal_lm", prompt="{text} was", labels=("good", "wonderful and dreadful"))
    evaluator, _ = make(task, name, scheme=scheme)
    positions = 66 - evaluator.model.reserved_positions
    rows = prepared(task, {"text": ["film " * 90, "we saw it"], "target": ["good", "good"]}, positions)
    assert len(rows[0]["input_ids"]) == positions
    scores = evaluator.label_scores(rows)
    assert all(map(math.isfinite, (*scores[0], *scores[1])))
    alone = prepared(task, {"text": ["we saw it"], "target": ["good"]})
    assert scores[1] == pytest.approx(evaluator.label_scores(alone)[0], rel=1e-4)


# ---- written text ----


def test_what_is_written_is_what_transformers_writes_behind_each_prompt():
    evaluator, plain = make(SAY)
    targets = ["good", "very good film", "bad", "a", "paris"]
    rows = prepared(SAY, {"text": TEXTS, "target": targets})
    longest = max(len(row["input_ids"]) - row["labels_say"] for row in (rows[i] for i in range(5)))
    written = evaluator.write(rows)
    assert len(written) == 5
    for tokens, text in zip(written, TEXTS, strict=True):
        ids = decoder_tokenizer()(f"{text} and")["input_ids"]
        assert without_padding(tokens) == without_padding(continued(plain, ids, max_new_tokens=longest))
    assert [len(tokens) <= 2 for tokens in evaluator.write(rows, max_new_tokens=2)] == [True] * 5


def test_of_rows_without_targets_some_tokens_are_written():
    evaluator, plain = make(SAY)
    rows = prepared(SAY, {"text": ["it"]}, labels=None)
    (tokens,) = evaluator.write(rows)
    ids = decoder_tokenizer()("it and")["input_ids"]
    assert without_padding(tokens) == without_padding(continued(plain, ids, max_new_tokens=64))


@pytest.mark.parametrize("scheme", ["hard", "prefix"])
@pytest.mark.parametrize("with_targets", [False, True])
def test_prompts_leave_room_for_what_is_written(with_targets, scheme):
    """GPT-2 has 66 positions, and no more."""
    evaluator, plain = make(SAY, scheme=scheme)
    columns = {"text": ["film " * 90, "it", "we"], "target": ["good", "very " * 30, "bad"]}
    positions = 66 - evaluator.model.reserved_positions
    rows = prepared(SAY, columns if with_targets else {"text": columns["text"]}, positions, labels=None)
    written = evaluator.write(rows)
    assert len(written) == 3
    assert with_targets is False or max(map(len, written)) == 31
    if scheme == "hard":
        room = 66 - max(map(len, written))
        cut = list(map(int, rows[0]["input_ids"]))[: rows[0].get("labels_say")][-room:]
        assert without_padding(written[0]) == without_padding(continued(plain, cut, max_new_tokens=66 - room))
    assert max(map(len, evaluator.write(rows, max_new_tokens=40))) <= 40


def test_text_ends_with_the_token_that_ends_targets():
    """The tokenizer's, whatever the checkpoint says: it is what the model has learned to end with."""
    plain = make_plain("gpt2", noise=0.3)
    prompts = [decoder_tokenizer()(f"{text} and")["input_ids"] for text in TEXTS]
    free = [continued(plain, ids, max_new_tokens=8, eos_token_id=None) for ids in prompts]
    end = next(tokens[2] for tokens in free if tokens[2] not in tokens[:2] and tokens[2] > 4)
    tokenizer = decoder_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    evaluator, _ = make(SAY, plain=plain, tokenizer=tokenizer)
    rows = prepared(SAY, {"text": TEXTS, "target": ["very good film and paris"] * 5}, tokenizer=tokenizer)
    ended = 0
    for tokens, alone in zip(evaluator.write(rows, max_new_tokens=8), free, strict=True):
        stop = next((i + 1 for i, token in enumerate(alone) if token in (end, 2)), 8)
        assert tokens[:stop] == alone[:stop] and set(tokens[stop:]) <= {3}
        ended += stop < 8
    assert ended
    kept = evaluator.write(rows, max_new_tokens=8, eos_token_id=2)
    assert any(end in tokens[:-1] and set(tokens[tokens.index(end) + 1 :]) - {3} for tokens in kept)


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_sampled_unless_the_task_says_so(asked):
    """Checkpoints of chat models come with settings that sample."""
    plain = make_plain("gpt2", noise=0.1)
    plain.generation_config = GenerationConfig(do_sample=True, temperature=3.0, top_k=0, eos_token_id=2)
    task = Task("say", "causal_lm", prompt="{text} and", generation={"do_sample": True} if asked else None)
    evaluator, _ = make(task, plain=plain)
    rows = prepared(task, {"text": TEXTS, "target": ["very good film"] * 5})
    torch.manual_seed(0)
    first, second = evaluator.write(rows, max_new_tokens=10), evaluator.write(rows, max_new_tokens=10)
    assert (first != second) == asked


def test_exact_match_and_rouge_of_known_texts():
    pytest.importorskip("rouge_score")
    evaluator, _ = make(SAY)
    targets = ["good film", "very good", "paris", "it was bad", "film"]
    rows = prepared(SAY, {"text": TEXTS, "target": targets})
    tokenizer = decoder_tokenizer()
    texts = ["good film", "very bad", "", "was it bad", "film film"]
    written = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id, 3, 3] for text in texts]
    found = evaluator.text_metrics(rows, written)
    # Longest common subsequences: 2 of 2 and 2; 1 of 2 and 2; 0; 2 of 3 and 3; 1 of 1 and 2.
    f = [1.0, 0.5, 0.0, 2 / 3, 2 / (1 + 2)]
    assert found == {"exact_match": pytest.approx(1 / 5), "rouge_l": pytest.approx(sum(f) / 5)}


def test_rows_have_targets_where_there_is_a_prompt_of_any_length():
    evaluator, _ = make(Task("say", "causal_lm", prompt="{text}"))
    one = prepared(evaluator.task, {"text": ["film"], "target": ["good"]})
    assert one[0]["labels_say"] == 1 and evaluator.has_targets(one)
    assert not evaluator.has_targets(prepared(evaluator.task, {"text": ["film"]}, labels=None))
    whole, _ = make(Task("lm", "causal_lm"))
    assert not whole.has_targets(prepared(whole.task, {"text": ["the film"]}))


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_rows_and_each_is_read_once(processes, monkeypatch):
    """The rows of all processes come back in their order."""
    rows = prepared(MOOD, {"text": TEXTS, "target": ["good"] * 5})
    alone, plain = make(MOOD)
    parts: list[list] = []
    for rank in range(processes):
        own, _ = make(MOOD, plain=plain)
        own._rank = rank, processes
        monkeypatch.setattr("hf_multitask.generation.gather_object", lambda given: given)
        numbers = [row["place"][1] for batch in own._batches(rows, 2) for row in batch]
        assert numbers == list(range(rank, 5, processes))
        parts.append([(number, value) for number, value in zip(numbers, own.label_scores(rows), strict=True)])
    together = [value for _, value in sorted(pair for part in parts for pair in part)]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone.label_scores(rows)), rtol=1e-5, atol=1e-5)


# ---- before training ----


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"max_new_token": 5}, "generation has no argument 'max_new_token', did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 0}, "generation: .*max_new_tokens"),
        (
            {"num_beams": 2, "num_return_sequences": 2},
            "generation: num_return_sequences .* one text is written for each row",
        ),
        ({"return_dict_in_generate": True}, "generation: return_dict_in_generate does not go"),
    ],
)
def test_arguments_of_generate_are_looked_at(generation, message):
    with pytest.raises(ValueError, match=f"task 'say': {message}"):
        check_generation([Task("say", "causal_lm", prompt="{text}", generation=generation)], with_generate=True)


def test_what_cannot_be_computed_is_refused_before_training():
    tone = Task("tone", "regression")
    check_generation([tone], with_generate=False)
    check_generation([tone, SAY], with_generate=True)
    check_generation([Task("say", "causal_lm", prompt="{text}", generation={"num_beams": 2})], with_generate=True)
    with pytest.raises(ValueError, match="predict_with_generate does not go with these tasks: none of them generates"):
        check_generation([tone], with_generate=True)
    wanted = Task("say", "causal_lm", prompt="{text}", metric="rouge_l")
    with pytest.raises(ValueError, match="task 'say': metric 'rouge_l' needs predict_with_generate=True"):
        check_generation([tone, wanted], with_generate=False)
    assert isinstance(make(SAY)[0].model, HardSharingModel)
