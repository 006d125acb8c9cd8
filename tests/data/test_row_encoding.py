"""What once went wrong with rows, and must not again."""

from __future__ import annotations

import pytest
from conftest import BACKBONES, make_tokenizer
from datasets import Dataset, Features, List, Value, load_dataset

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.data.labels import LabelEncoder, infer_labels
from hf_multitask.data.preprocessing import longest_input, prepare
from hf_multitask.data.sources import make_sources

TONE = Task("tone", "single_label_classification", labels=("negative", "positive"))
(SOURCE,) = make_sources([TONE])
PAIR = Task("same", "regression", text_columns=("one", "two"))


def test_the_cache_knows_which_side_is_cut_and_whether_there_are_token_types(tmp_path):
    Dataset.from_dict({"text": ["good " * 10 + "bad " * 10] * 3, "label": ["positive"] * 3}).to_parquet(
        tmp_path / "a.parquet"
    )
    Dataset.from_dict({"one": ["good"] * 3, "two": ["bad"] * 3, "label": [1.0] * 3}).to_parquet(tmp_path / "b.parquet")
    rows = {name: load_dataset("parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train") for name in "ab"}
    right, left = make_tokenizer(), make_tokenizer()
    left.truncation_side = "left"
    ids = [prepare(rows["a"], SOURCE, t, max_length=8)["input_ids"][0] for t in (right, left)]
    assert ids[0] != ids[1] and ids[0] == right("good " * 6)["input_ids"] and ids[1] == right("bad " * 6)["input_ids"]
    bare = make_tokenizer()
    bare.model_input_names = ["input_ids", "attention_mask"]
    (source,) = make_sources([PAIR])
    columns = [set(prepare(rows["b"], source, t, max_length=8).column_names) for t in (right, bare)]
    assert columns == [{"input_ids", "token_type_ids", "labels_same"}, {"input_ids", "labels_same"}]


def test_families_after_roberta_have_fewer_positions_than_rows_in_their_table(tokenizer):
    model = HardSharingModel.from_backbone(BACKBONES["roberta"](), [TONE])
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = int(1e30)
    longest = longest_input(tokenizer, model)
    assert longest == 70 - (3 + 1)
    model(input_ids=tokenizer("good " * (longest - 2), return_tensors="pt")["input_ids"])
    with pytest.raises(ValueError, match=f"exceeds the backbone's {longest} positions"):
        longest_input(tokenizer, model, longest + 1)


def test_a_task_s_own_max_length_is_checked_against_the_backbone(bert, datasets, tokenizer, tmp_path):
    task = Task("tone", "single_label_classification", labels=TONE.labels, dataset="reviews", max_length=400)
    args = MultiTaskTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="task 'tone': max_length=400 exceeds the backbone's 66 positions"):
        MultiTaskTrainer(
            HardSharingModel.from_backbone(bert, [task]),
            args,
            train_dataset=datasets["reviews"],
            processing_class=tokenizer,
        )


BAD = {
    "too long": ({"input_ids": [[1, 5, 2], [1] * 40]}, "row 1 has 40 tokens, more than max_length=32"),
    "outside the vocabulary": ({"input_ids": [[1, 5, 2], [1, 999]]}, "row 1 holds token ids outside"),
    "negative": ({"input_ids": [[1, -5, 2], [1, 2]]}, "row 0 holds token ids outside"),
    "None": ({"input_ids": [[1, 5, 2], None]}, "row 1 of column 'input_ids' holds None"),
    "nested": ({"input_ids": [[[1, 5]], [[1]]]}, "row 0 of column 'input_ids' holds"),
    "short mask": (
        {"input_ids": [[1, 5, 2], [1, 2]], "attention_mask": [[1, 1], [1, 1]]},
        "row 0: attention_mask must be as long as input_ids, 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokenized_rows_are_named(tokenizer, case):
    columns, message = BAD[case]
    with pytest.raises(ValueError, match="dataset 'tone' .train.") as error:
        prepare(Dataset.from_dict({**columns, "labels": [0, 1]}), SOURCE, tokenizer, max_length=32)
    assert message in str(error.value)


def test_labels_can_be_found_beside_a_missing_one_and_rows_may_all_be_without():
    rows = Dataset.from_dict({"tags": [["O", None], ["B-x"]]})
    assert infer_labels(rows, "tags") == ("O", "B-x")
    traits = Task("traits", "multi_label_classification", labels=("a", "b"))
    encoder = LabelEncoder(traits, "labels", Features({"labels": List(Value("null"))}))
    assert encoder.encode([[], []], 0) == [[0.0, 0.0], [0.0, 0.0]]
