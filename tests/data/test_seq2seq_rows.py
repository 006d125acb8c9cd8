"""Rows of tasks that write with an encoder-decoder: a text to read, and a target that is a text of its own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from datasets import ClassLabel, Dataset, Features, Value
from language import CHAT_TEMPLATE, decoder_tokenizer, sayings
from tokenizers import processors

from hf_multitask import DataCollatorForMultiTask, Task
from hf_multitask.data.all_rows import make_row_encoder
from hf_multitask.data.dataset import MultiTaskDataset
from hf_multitask.data.preprocessing import check_packing, prepare
from hf_multitask.data.prompt_rows import ANSWER
from hf_multitask.data.sources import make_sources

ROWS = Dataset.from_dict(
    {
        "text": ["the film was great", "a sad film", "it was fine and happy"],
        "target": ["superb", "poor poor", "good"],
        "label": [1, 0, 1],
    }
)


def bart_tokenizer(chat: bool = False):
    """A tokenizer that puts tokens around texts and targets alike."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def prepared(task: Task, rows: Dataset = ROWS, tokenizer=None, max_length: int = 64, **options) -> Dataset:
    (source,) = make_sources([task])
    return prepare(rows, source, tokenizer or bart_tokenizer(), max_length=max_length, **options)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids)


def test_text_and_target_are_as_the_tokenizer_makes_them():
    tokenizer = bart_tokenizer()
    rows = prepared(Task("say", "seq2seq_lm"), tokenizer=tokenizer)
    assert rows.column_names == ["input_ids", "labels_say"]
    assert [decode(tokenizer, ids) for ids in rows["input_ids"]][0] == "[CLS] the film was great [SEP]"
    assert [decode(tokenizer, ids) for ids in rows["labels_say"]] == [
        "[CLS] superb [SEP]",
        "[CLS] poor poor [SEP]",
        "[CLS] good [SEP]",
    ]


def test_a_target_ends_whatever_the_tokenizer_does():
    tokenizer = decoder_tokenizer()
    rows = prepared(Task("say", "seq2seq_lm"), tokenizer=tokenizer)
    assert decode(tokenizer, rows["input_ids"][1]) == "a sad film"
    assert [decode(tokenizer, ids) for ids in rows["labels_say"]][1] == "poor poor [SEP]"
    language = bart_tokenizer()  # some tokenizers write the language of a text behind its end
    language.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [MASK]", pair="$A $B", special_tokens=[("[SEP]", 2), ("[MASK]", 4)]
    )
    assert decode(language, prepared(Task("say", "seq2seq_lm"), tokenizer=language)["labels_say"][0]) == (
        "superb [SEP] [MASK]"
    )


def test_prompts_name_columns_and_labels_have_numbers():
    features = Features(
        {"text": Value("string"), "target": Value("string"), "label": ClassLabel(names=["bad", "good"])}
    )
    task = Task("say", "seq2seq_lm", prompt="was it {target} ? {text}", label_column="label", labels=("good", "bad"))
    tokenizer = bart_tokenizer()
    rows = prepared(task, ROWS.cast(features), tokenizer)
    assert decode(tokenizer, rows["input_ids"][1]) == "[CLS] was it poor poor [UNK] a sad film [SEP]"
    assert [decode(tokenizer, ids) for ids in rows["labels_say"]] == [
        "[CLS] good [SEP]",
        "[CLS] bad [SEP]",
        "[CLS] good [SEP]",
    ]
    assert rows[ANSWER] == [0, 1, 0]


def test_several_prompts_are_drawn_by_the_seed():
    task = Task("say", "seq2seq_lm", prompt=["good {text}", "bad {text}"])
    rows = Dataset.from_dict({"text": ["film"] * 40, "target": ["a"] * 40})
    firsts = [[ids[1] for ids in prepared(task, rows, seed=seed)["input_ids"]] for seed in (0, 0, 1)]
    assert firsts[0] == firsts[1] != firsts[2] and len(set(firsts[0])) == 2


def test_chats_are_read_as_a_chat_and_the_answer_is_a_text_of_its_own():
    tokenizer = bart_tokenizer(chat=True)
    rows = prepared(Task("say", "seq2seq_lm", chat=True), tokenizer=tokenizer)
    assert decode(tokenizer, rows["input_ids"][1]).startswith("[CLS]") and len(rows["input_ids"][1]) > 5
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("good", "bad")]
    chats = prepared(Task("say", "seq2seq_lm", text_columns="m"), Dataset.from_dict({"m": messages}), tokenizer)
    assert [decode(tokenizer, ids) for ids in chats["labels_say"]] == ["[CLS] good [SEP]", "[CLS] bad [SEP]"]
    assert chats["input_ids"][0] == chats["input_ids"][1] and len(chats["input_ids"][0]) > 3
    asked = Dataset.from_dict({"m": [one[:1] for one in messages]})
    only = prepared(Task("say", "seq2seq_lm", text_columns="m"), asked, tokenizer, labels=False)
    assert only.column_names == ["input_ids"] and only["input_ids"] == chats["input_ids"]
    with pytest.raises(ValueError, match="has no chat template"):
        prepared(Task("say", "seq2seq_lm", chat=True))


def test_rows_without_targets_are_there_to_be_written_for():
    assert prepared(Task("say", "seq2seq_lm"), ROWS.remove_columns("target"), labels=None).column_names == ["input_ids"]
    assert prepared(Task("say", "seq2seq_lm"), ROWS, labels=False).column_names == ["input_ids"]


def test_long_texts_are_cut_and_keep_what_a_template_asks():
    tokenizer = bart_tokenizer()
    rows = Dataset.from_dict({"text": ["film " * 30, "film"], "other": ["sad", "sad"], "target": ["good", "good"]})
    task = Task("say", "seq2seq_lm", prompt="{text} was it {other}")
    cut = prepared(task, rows, tokenizer, max_length=10)
    assert decode(tokenizer, cut["input_ids"][0]) == "[CLS] film film film film film was it sad [SEP]"
    assert decode(tokenizer, cut["input_ids"][1]) == "[CLS] film was it sad [SEP]"
    # Not even the template has room: the tokenizer cuts, and what it puts at the ends stays.
    assert decode(tokenizer, prepared(task, rows, tokenizer, max_length=4)["input_ids"][0]).endswith("[SEP]")
    own = prepared(Task("say", "seq2seq_lm", max_length=7), rows, tokenizer)
    assert max(map(len, own["input_ids"])) == 7


def test_targets_that_are_too_long_are_few_or_refused():
    tokenizer = bart_tokenizer()
    many = {"text": ["film"] * 200, "target": ["good"] * 198 + ["good " * 9] * 2}
    rows = prepared(Task("say", "seq2seq_lm"), Dataset.from_dict(many), tokenizer, max_length=6)
    assert decode(tokenizer, rows["labels_say"][199]) == "[CLS] good good good good good"  # one in a hundred
    # A target that just fits is not cut.
    many["target"] = ["good " * 4] * 200
    assert (
        prepared(Task("say", "seq2seq_lm"), Dataset.from_dict(many), tokenizer, max_length=6)["labels_say"][0][-1] == 2
    )
    many["target"] = ["good"] * 197 + ["good " * 9] * 3
    message = "task 'say': 3 of 200 targets do not fit into max_length=6 tokens and would be cut; raise max_length"
    with pytest.raises(ValueError, match=message):
        prepared(Task("say", "seq2seq_lm"), Dataset.from_dict(many), tokenizer, max_length=6)


def test_what_decides_the_tokens_decides_the_cache():
    (source,) = make_sources([Task("say", "seq2seq_lm")])

    def key(**changes):
        tokenizer = bart_tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return make_row_encoder(ROWS.features, source, tokenizer, 64, True).key()

    keys = [key(), key(tgt_lang="de"), key(src_lang="en"), key(truncation_side="left"), key(eos_token="[MASK]")]
    assert key() == keys[0] and all(one != other for i, one in enumerate(keys) for other in keys[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": ["", "a", "b"]}, "target '' in row 0 of column 'target' is empty"),
        ({"target": [None, "a", "b"]}, "target None in row 0 of column 'target' is empty"),
        ({"text": ["a", None, "b"]}, "text None in row 1 of column 'text'"),
    ],
)
def test_bad_rows_are_named(change, message):
    rows = Dataset.from_dict({**ROWS.to_dict(), **change})
    with pytest.raises(ValueError, match=message):
        prepared(Task("say", "seq2seq_lm"), rows)


def test_bad_columns_tokenizers_and_lengths_are_named():
    task = Task("say", "seq2seq_lm")
    with pytest.raises(ValueError, match="task 'say': no column 'target' for the labels; columns are text, label"):
        prepared(task, ROWS.remove_columns("target"))
    with pytest.raises(ValueError, match="task 'say': no text column 'text'"):
        prepared(task, ROWS.remove_columns("text"))
    with pytest.raises(ValueError, match="task 'say': prompt asks for a column 'txt'"):
        prepared(Task("say", "seq2seq_lm", prompt="{txt}"))
    with pytest.raises(ValueError, match="has no end-of-sequence token, so that no target would end"):
        prepared(task, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="max_length=2 leaves no room: the tokenizer adds 2 special tokens"):
        prepared(task, max_length=2)
    with pytest.raises(ValueError, match="target 'superb' in row 0 of column 'target' is not one of its 1 labels"):
        prepared(Task("say", "seq2seq_lm", labels=("good",)))
    with pytest.raises(ValueError, match="row 0 of column 'text' has no token"):
        prepared(task, Dataset.from_dict({"text": [""], "target": ["a"]}), decoder_tokenizer())
    with pytest.raises(ValueError, match="packing=True is for causal_lm tasks, and there is none"):
        check_packing(SimpleNamespace(tasks=[task], supports_packing=True), True)


def test_a_batch_has_targets_of_their_own():
    tasks = [Task("tone", "regression", dataset="reviews"), Task("say", "seq2seq_lm"), Task("all", "seq2seq_lm")]
    tokenizer = bart_tokenizer()
    sources = make_sources(tasks)
    rows = {
        "reviews": prepared(tasks[0], ROWS, tokenizer),
        "say": prepared(Task("say", "seq2seq_lm", text_columns="said"), sayings(5), tokenizer),
        "all": prepared(Task("all", "seq2seq_lm"), ROWS, tokenizer),
    }
    dataset = MultiTaskDataset(sources, rows)
    batch = DataCollatorForMultiTask(tokenizer, tasks)([dataset[i] for i in range(len(dataset))])
    assert "label_positions" not in batch and set(batch["labels"]) == {"tone", "say", "all"}
    for name in ("say", "all"):
        labels, targets = batch["labels"][name], rows[name][f"labels_{name}"]
        assert labels.shape == (len(targets), max(map(len, targets))) and labels.dtype == torch.int64
        for row, target in zip(labels.tolist(), targets, strict=True):
            assert row == target + [-100] * (len(row) - len(target))
        assert batch["num_items"][name] == sum(map(len, targets))
        part = batch["segments"][name]
        assert part.rows == len(targets) and part.length == max(map(len, rows[name]["input_ids"]))
        read = batch["input_ids"][part.start, : len(rows[name]["input_ids"][0])]
        assert read.tolist() == rows[name]["input_ids"][0]
    assert batch["num_tokens"] == sum(len(ids) for part in rows.values() for ids in part["input_ids"])
    assert np.all(batch["attention_mask"].sum(1).numpy() > 0)
    alone = MultiTaskDataset(sources[1:2], {"say": rows["say"].remove_columns("labels_say")})
    assert "labels" not in DataCollatorForMultiTask(tokenizer, tasks)([alone[0]])


def test_a_stream_gives_the_same_rows():
    (source,) = make_sources([Task("say", "seq2seq_lm")])
    encoder = make_row_encoder(ROWS.features, source, bart_tokenizer(), 64, True)
    assert encoder.keeps_rows
    streamed = encoder(ROWS.to_dict(), [0, 1, 2])
    assert streamed == prepared(Task("say", "seq2seq_lm")).to_dict()
