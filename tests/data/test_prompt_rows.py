"""Rows of generating tasks: the loss is on the target only, and a prompt is the same in training and in use."""

from __future__ import annotations

import random

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from language import CHAT_TEMPLATE, decoder_tokenizer
from language_models import make_plain
from tokenizers import processors

from hf_multitask import DataCollatorForMultiTask, HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.prompt_rows import ANSWER, target_tokens
from hf_multitask.data.sources import make_sources
from hf_multitask.data.streaming import prepare_streams

END = 2
MOODS = ("negative", "positive")


def prepared(task: Task, rows: dict[str, list] | Dataset, *, max_length: int = 64, tokenizer=None, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
    return prepare_sources(
        dataset,
        make_sources([task]),
        "train_dataset",
        tokenizer=tokenizer or decoder_tokenizer(),
        max_length=max_length,
        **options,
    )


def texts(rows, tokenizer=None) -> list[tuple[str, str]]:
    """By row, the words of the prompt and those that are predicted."""
    tokenizer = tokenizer or decoder_tokenizer()
    part = rows.rows[0]
    (key,) = [name for name in part.column_names if name.startswith("labels_")]
    return [
        (" ".join(tokenizer.convert_ids_to_tokens(ids[:start])), " ".join(tokenizer.convert_ids_to_tokens(ids[start:])))
        for ids, start in zip(part["input_ids"], part[key], strict=True)
    ]


def messages(*turns: str, last: str = "assistant") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(turns)
    given = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    given[-1]["role"] = last
    return given


# ---- what a row may be ----


def test_a_prompt_and_a_target():
    task = Task("say", "causal_lm", prompt="was {text} good ?")
    rows = prepared(task, {"text": ["the film", "paris"], "target": ["very good", "bad"]})
    assert texts(rows) == [("was the film good [UNK]", "very good [SEP]"), ("was paris good [UNK]", "bad [SEP]")]
    assert task.text_columns == ("text",) and task.label_column == "target" and task.weight == 1.0


def test_a_prompt_of_several_columns_of_several_kinds():
    task = Task("say", "causal_lm", prompt="{a} {b} and {c} {{}} {d} {a}", label_column="t")
    columns = {"a": ["film"], "b": [["paris", "berlin"]], "c": [3], "d": [0.25], "t": ["good"]}
    tokenizer = decoder_tokenizer()
    rows = prepared(task, columns)
    assert rows.rows[0]["input_ids"][0] == [
        *tokenizer("film paris berlin and 3 {} 0.25 film")["input_ids"],
        *tokenizer("good")["input_ids"],
        END,
    ]
    assert task.text_columns == ("a", "b", "c", "d")


def test_names_stand_in_prompts_for_ids_of_a_class_label():
    features = Features({"kind": ClassLabel(names=["film", "paris"]), "target": Value("string")})
    dataset = Dataset.from_dict({"kind": [1, 0], "target": ["good", "bad"]}, features=features)
    rows = prepared(Task("say", "causal_lm", prompt="was {kind}"), dataset)
    assert texts(rows) == [("was paris", "good [SEP]"), ("was film", "bad [SEP]")]


def test_text_and_target_without_a_template():
    rows = prepared(Task("say", "causal_lm", label_column="t"), {"text": ["the film"], "t": ["good"]})
    assert texts(rows) == [("the film", "good [SEP]")]
    both = Task("say", "causal_lm", text_columns=("a", "b"), label_column="t")
    assert texts(prepared(both, {"a": ["the film"], "b": ["was"], "t": ["good"]})) == [("the film was", "good [SEP]")]


def test_a_text_as_a_whole():
    """Every token is predicted but the first, from nothing; the end is one of them."""
    task = Task("lm", "causal_lm")
    rows = prepared(task, {"text": ["the film was good", "a film"]})
    assert texts(rows) == [("the", "film was good [SEP]"), ("a", "film [SEP]")]
    assert task.weight == 0.1 and task.label_column is None
    assert rows.rows[0].column_names == ["input_ids", "labels_lm"]
    cut = prepared(task, {"text": ["the film was good and we saw it"]}, max_length=4)
    assert texts(cut) == [("the", "film was good")]  # a text that goes on has no end
    words = prepared(task, {"text": [["the", "film"]]})
    assert texts(words) == [("the", "film [SEP]")]


def test_a_chat_s_last_message_is_the_target():
    task = Task("talk", "causal_lm", text_columns="chat")
    rows = prepared(task, {"chat": [messages("was it good", "very"), messages("film", "paris", "and", "bad")]})
    tokens = [
        ("[CLS] [UNK] was it good [SEP] [CLS] [UNK]", "very [SEP]"),
        ("[CLS] [UNK] film [SEP] [CLS] [UNK] paris [SEP] [CLS] [UNK] and [SEP] [CLS] [UNK]", "bad [SEP]"),
    ]
    words = decoder_tokenizer().tokenize("user"), decoder_tokenizer().tokenize("assistant")
    assert words == (["u", "##s", "##e", "##r"], [*"a", *(f"##{c}" for c in "ssistant")])
    expected = []
    for prompt, target in tokens:
        for role in ("user", "assistant", "user", "assistant"):
            prompt = prompt.replace("[UNK]", " ".join(words[role == "assistant"]), 1)
        expected.append((prompt, target))
    assert texts(rows) == expected


def test_prompt_and_target_in_a_chat():
    """The same as messages of the user and the assistant."""
    said = prepared(
        Task("say", "causal_lm", prompt="was {text} good", chat=True), {"text": ["the film"], "target": ["very"]}
    )
    chat = prepared(Task("talk", "causal_lm", text_columns="chat"), {"chat": [messages("was the film good", "very")]})
    assert texts(said) == texts(chat)


def test_a_system_s_message_and_what_a_template_writes_behind_the_end():
    tokenizer = decoder_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("[SEP] {%", "[SEP] . {%")
    given = [{"role": "system", "content": "berlin"}, *messages("film", "good")]
    rows = prepared(Task("talk", "causal_lm", text_columns="chat"), {"chat": [given]}, tokenizer=tokenizer)
    ((prompt, target),) = texts(rows, tokenizer)
    assert "berlin [SEP] . [CLS]" in prompt and target == "good [SEP]"  # no mark behind its end


def test_tokenizers_that_put_tokens_around_a_text():
    """A first token begins every prompt; a last one stands behind the target only."""
    tokenizer = decoder_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    columns = {"text": ["the film"], "target": ["good"]}
    rows = prepared(Task("say", "causal_lm", prompt="{text} was"), columns, tokenizer=tokenizer)
    assert texts(rows, tokenizer) == [("[CLS] the film was", "good [SEP]")]
    whole = prepared(Task("lm", "causal_lm"), columns, tokenizer=tokenizer)
    assert texts(whole, tokenizer) == [("[CLS]", "the film [SEP]")]


@pytest.mark.parametrize("value", ["names", "ids", "class label", "other order"])
def test_a_closed_set_of_targets_by_name_or_id(value):
    task = Task("mood", "causal_lm", prompt="{text} was", labels=MOODS, label_column="label")
    names = list(reversed(MOODS)) if value == "other order" else list(MOODS)
    features = Features({"text": Value("string"), "label": Value("int64")})
    if value == "names":
        features["label"] = Value("string")
    elif value != "ids":
        features["label"] = ClassLabel(names=names)
    given = [MOODS[i] if value == "names" else names.index(MOODS[i]) for i in (1, 0)]
    rows = prepared(task, Dataset.from_dict({"text": ["it", "we"], "label": given}, features=features))
    words = {mood: " ".join(decoder_tokenizer().tokenize(mood)) for mood in MOODS}
    assert texts(rows) == [("it was", f"{words['positive']} [SEP]"), ("we was", f"{words['negative']} [SEP]")]
    assert rows.rows[0][ANSWER][:] == [1, 0]
    (spaced, _) = target_tokens(task, decoder_tokenizer())
    for row, answer in ((rows[0], 1), (rows[1], 0)):
        assert np.asarray(row["input_ids"])[row["labels_mood"] :].tolist() == spaced[answer]


def test_a_closed_set_in_a_chat_has_the_tokens_that_are_trained():
    task = Task("mood", "causal_lm", prompt="{text} was", labels=MOODS, label_column="label", chat=True)
    rows = prepared(task, {"text": ["it", "we"], "label": ["positive", "negative"]})
    (candidates,) = target_tokens(task, decoder_tokenizer())
    for row, answer in ((rows[0], 1), (rows[1], 0)):
        assert np.asarray(row["input_ids"])[row["labels_mood"] :].tolist() == candidates[answer]


def test_numbers_are_targets_too():
    task = Task("count", "causal_lm", prompt="{text}", label_column="n")
    tokenizer = decoder_tokenizer()
    for values, expected in (([3, -1], ["3", "-1"]), ([0.5, 2.0], ["0.5", "2"]), ([True, False], ["True", "False"])):
        rows = prepared(task, {"text": ["a", "b"], "n": values})
        for ids, start, text in zip(rows.rows[0]["input_ids"], rows.rows[0]["labels_count"], expected, strict=True):
            assert ids[start:] == [*tokenizer(text)["input_ids"], END]


# ---- which template ----


PROMPTS = ["{text} was", "we saw {text}", "{text} and {text}"]


def used(rows) -> list[str]:
    return [prompt for prompt, _ in texts(rows)]


def test_each_row_has_a_template_of_its_own_by_the_seed():
    task = Task("say", "causal_lm", prompt=PROMPTS)
    columns = {"text": ["film"] * 300, "target": ["good"] * 300}
    first = used(prepared(task, columns, seed=0))
    written = ["film was", "we saw film", "film and film"]
    counts = [first.count(text) for text in written]
    assert sum(counts) == 300 and min(counts) > 70  # 100, and 3.7 standard deviations
    assert used(prepared(task, columns, seed=0)) == first != used(prepared(task, columns, seed=1))
    other = Task("other", "causal_lm", prompt=PROMPTS, dataset="say")
    assert used(prepared(other, columns, seed=0)) != first
    # By the row's number: neither its content, nor those beside it, nor their number.
    short = {"text": ["paris"] * 40, "target": ["bad"] * 40}
    assert [text.replace("paris", "film") for text in used(prepared(task, short, seed=0))] == first[:40]


def test_the_trainer_s_seed_decides(tmp_path):
    task = Task("say", "causal_lm", prompt=PROMPTS)
    data = Dataset.from_dict({"text": ["film"] * 30, "target": ["good"] * 30})
    found = []
    for arguments in ({"seed": 1}, {"seed": 2, "data_seed": 1}, {"seed": 2}):
        trainer = MultiTaskTrainer(
            HardSharingModel.from_backbone(make_plain("llama, tied"), [task]),
            MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **arguments),
            train_dataset=data,
            processing_class=decoder_tokenizer(),
        )
        found.append(used(trainer.train_dataset))
    assert found[0] == found[1] != found[2]


# ---- in training as in use ----

KINDS = {
    "prompt": (Task("say", "causal_lm", prompt="was {text} good", label_column="t"), {}),
    "space behind": (Task("say", "causal_lm", prompt="{text} : ", label_column="t"), {}),
    "several": (Task("say", "causal_lm", prompt=PROMPTS, label_column="t"), {}),
    "plain": (Task("say", "causal_lm", label_column="t"), {}),
    "chat": (Task("say", "causal_lm", prompt="{text} ?", label_column="t", chat=True), {}),
    "messages": (Task("say", "causal_lm", text_columns="text"), {"messages": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_same_tokens_with_a_target_and_without(kind):
    task, options = KINDS[kind]
    draw = random.Random(0)
    given = [" ".join(draw.choices(["film", "paris", "it", "good"], k=draw.randint(1, 6))) for _ in range(12)]
    columns = {"text": given, "t": [draw.choice(["good", "very bad"]) for _ in given]}
    if options:
        columns["text"] = [messages(text, target) for text, target in zip(given, columns.pop("t"), strict=True)]
    whole = prepared(task, columns)
    alone = [prepared(task, columns, labels=False)]
    if options:
        alone.append(prepared(task, {"text": [chat[:-1] for chat in columns["text"]]}, labels=False))
        alone.append(prepared(task, {"text": [chat[:-1] for chat in columns["text"]]}, labels=False))
    else:
        alone.append(prepared(task, {"text": given}, labels=None))
    starts = whole.rows[0]["labels_say"][:]
    expected = [ids[:start] for ids, start in zip(whole.rows[0]["input_ids"], starts, strict=True)]
    for rows in alone:
        assert rows.rows[0].column_names == ["input_ids"] and rows.rows[0]["input_ids"][:] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_target(kind):
    task, options = KINDS[kind]
    columns = {"text": ["film", "paris was it", "good"], "t": ["good", "very bad", "a film"]}
    if options:
        columns = {"text": [messages(*pair) for pair in zip(columns["text"], columns["t"], strict=True)]}
    rows = prepared(task, columns)
    batch = DataCollatorForMultiTask(decoder_tokenizer(), [task])([rows[i] for i in range(3)])
    length = batch["input_ids"].shape[1]
    for row, (labels, places) in enumerate(zip(batch["labels"]["say"], batch["label_positions"]["say"], strict=True)):
        ids, start = rows.rows[0]["input_ids"][row], rows.rows[0]["labels_say"][row]
        kept = labels != -100
        assert labels[kept].tolist() == ids[start:] and ids[-1] == END
        assert (places[kept] - row * length).tolist() == list(range(start - 1, len(ids) - 1))
    assert batch["num_items"]["say"] == sum(len(ids) - s for ids, s in zip(*rows.rows[0][:].values(), strict=True))


# ---- rows that are too long ----


def test_the_longest_text_of_a_prompt_loses_its_end():
    """What the template asks stays, and so does the target."""
    task = Task("say", "causal_lm", prompt="we saw {a} and {b} . was it good", label_column="t")
    columns = {"a": ["film film film film film film paris"], "b": ["berlin"], "t": ["very bad"]}
    rows = prepared(task, columns, max_length=16)
    assert texts(rows) == [("we saw film film film film film and berlin . was it good", "very bad [SEP]")]
    assert len(rows.rows[0]["input_ids"][0]) == 16
    assert texts(prepared(task, columns)) == [
        ("we saw film film film film film film paris and berlin . was it good", "very bad [SEP]")
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_if_that_is_not_enough_a_prompt_loses_tokens_on_its_left(chat):
    task = Task("say", "causal_lm", prompt="we saw the film {text} was it good", label_column="t", chat=chat)
    columns = {"text": ["paris"], "t": ["very bad"]}
    whole = prepared(task, columns).rows[0]
    rows = prepared(task, columns, max_length=7).rows[0]
    assert rows["input_ids"][0] == whole["input_ids"][0][-7:] and rows["labels_say"][0] == 4
    talk = Task("talk", "causal_lm", text_columns="chat")
    columns = {"chat": [messages("film film film film", "it", "paris", "very bad")]}
    whole, rows = prepared(talk, columns).rows[0], prepared(talk, columns, max_length=9).rows[0]
    assert rows["input_ids"][0] == whole["input_ids"][0][-9:] and rows["labels_talk"][0] == 6


def test_a_task_s_own_length_holds():
    task = Task("say", "causal_lm", prompt="{text}", max_length=6)
    rows = prepared(task, {"text": ["film " * 20], "target": ["good"]})
    assert texts(rows) == [("film film film film", "good [SEP]")]


def long_targets(cut: int, rows: int, chat: bool = False) -> dict[str, list]:
    """Rows of which some have targets of nine tokens and an end, the others of as many as just fit into ten."""
    targets = ["film " * 10] * cut + ["film " * 8] * (rows - cut)
    return {"text": ["paris"] * rows, "target": [target.strip() for target in targets]}


@pytest.mark.parametrize(("cut", "rows", "fine"), [(0, 10, True), (1, 100, True), (2, 199, False), (1, 99, False)])
def test_targets_that_do_not_fit_are_counted_and_more_than_one_in_a_hundred_refused(cut, rows, fine):
    task = Task("say", "causal_lm", prompt="{text}")
    if not fine:
        message = (
            f"dataset 'say' \\(train\\): task 'say': {cut} of {rows} targets do not fit into max_length=10 tokens and "
            "would be cut; raise max_length"
        )
        with pytest.raises(ValueError, match=message):
            prepared(task, long_targets(cut, rows), max_length=10)
        return
    found = prepared(task, long_targets(cut, rows), max_length=10).rows[0]
    assert all(len(ids) == 10 for ids in found["input_ids"])
    assert [ids[-1] == END for ids in found["input_ids"]] == [False] * cut + [True] * (rows - cut)
    assert set(found["labels_say"]) == {1}


@pytest.mark.parametrize("chat", [False, True])
def test_targets_that_just_fit_are_none_that_were_cut(chat):
    """Of the prompt one token is left, and the target is whole."""
    task = Task("say", "causal_lm", prompt="{text} was it", chat=chat)
    columns = {"text": ["paris"] * 5, "target": [" ".join(["film"] * 8)] * 5}
    rows = prepared(task, columns, max_length=10).rows[0]
    assert all(ids[-1] == END and start == 1 for ids, start in zip(rows["input_ids"], rows["labels_say"], strict=True))
    with pytest.raises(ValueError, match="5 of 5 targets do not fit"):
        prepared(task, columns, max_length=9)


def test_one_token_is_too_little_for_any_target():
    with pytest.raises(ValueError, match="2 of 2 targets do not fit into max_length=1 "):
        prepared(Task("say", "causal_lm", prompt="{text}"), {"text": ["a", "b"], "target": ["a", "b"]}, max_length=1)


def stream(columns: dict[str, list]) -> IterableDataset:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return IterableDataset.from_generator(lambda: iter(rows))


def streamed(columns: dict[str, list], size: int):
    task = Task("say", "causal_lm", prompt="{text}")
    return prepare_streams(
        {"say": stream(columns)}, make_sources([task]), {"say": size}, decoder_tokenizer(), max_length=10
    )


def test_in_streams_targets_that_do_not_fit_are_refused_as_soon_as_it_can_be_told():
    with pytest.raises(ValueError, match=r"dataset 'say' .train.: task 'say': 5 of 32 targets do not fit"):
        streamed(long_targets(5, 200), 200)
    late = long_targets(0, 40)
    late = {key: value + long_targets(30, 30)[key] for key, value in late.items()}
    mixture = streamed(late, 70)
    mixture.__getitems__([0] * 40)
    with pytest.raises(ValueError, match=r"pass 0: task 'say': \d+ of \d+ targets do not fit"):
        for _ in range(30):
            mixture.__getitems__([0])
    one = {key: long_targets(1, 1)[key] + value for key, value in long_targets(0, 300).items()}
    assert len(streamed(one, 301).__getitems__([0] * 301)) == 301


# ---- what cannot be ----

GOOD = {"text": ["film", "paris"], "target": ["good", "bad"]}
BAD_TEMPLATES = {
    "{text.__class__}": "no plain name",
    "{text[0]}": "no plain name",
    "{text!r}": "no plain name",
    "{text:>10}": "no plain name",
    "{text:{width}}": "no plain name",
    "{0}": "no plain name",
    "{}": "no plain name",
    "{_}": "no plain name",
    "{a b}": "no plain name",
    "{text": "is no template",
    "text}": "is no template",
    "text": "names no column",
    "{{text}}": "names no column",
    "": "must be a template or a list of templates",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_that_are_none_are_refused(template):
    for prompt in (template, ["{text}", template]):
        with pytest.raises(ValueError, match=f"^task 'say': prompt .*{BAD_TEMPLATES[template]}"):
            Task("say", "causal_lm", prompt=prompt)


@pytest.mark.parametrize("prompt", [5, [], [None], [["{text}"]], {"a": "{text}"}, True])
def test_prompts_of_another_kind_are_refused(prompt):
    with pytest.raises(ValueError, match="^task 'say': prompt must be a template or a list of templates"):
        Task("say", "causal_lm", prompt=prompt)


def test_braces_around_other_signs_can_be_written():
    rows = prepared(Task("say", "causal_lm", prompt="{{ {text_1} }}"), {"text_1": ["film"], "target": ["good"]})
    assert rows.rows[0]["input_ids"][0][:3] == decoder_tokenizer()("{ film }")["input_ids"]


def bad(message: str, task: Task, columns, **options) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(task, columns, **options)


def test_columns_that_are_not_there_are_named():
    task = Task("say", "causal_lm", prompt="{text} {topic}")
    bad("task 'say': prompt asks for a column 'topic'; columns are text, target", task, GOOD)
    bad("task 'say': no column 'target' for the labels", Task("say", "causal_lm", prompt="{text}"), {"text": ["a"]})
    bad("task 'say': no text column 'text'; columns are body", Task("say", "causal_lm"), {"body": ["a"]})
    with pytest.raises(ValueError, match="task 'say': text_columns are those in the prompt, text; leave them out"):
        Task("say", "causal_lm", prompt="{text}", text_columns="body")
    with pytest.raises(ValueError, match="task 'say': column 'target' cannot be the text and the label at once"):
        Task("say", "causal_lm", prompt="{target}")


@pytest.mark.parametrize("target", ["", "  ", "\n", None])
def test_empty_targets_are_named(target):
    message = r"dataset 'say' .train.: task 'say': target .* in row 1 of column 'target' is empty; .* filter it out"
    bad(message, Task("say", "causal_lm", prompt="{text}"), {**GOOD, "target": ["good", target]})
    message = "row 1 of column 'chat' has an empty target; filter it out"
    chats = {"chat": [messages("film", "good"), messages("paris", target)]}
    bad(message, Task("talk", "causal_lm", text_columns="chat"), chats)


def test_texts_that_are_none_or_have_nothing_to_predict_are_named():
    task = Task("say", "causal_lm", prompt="{text}")
    bad("text None in row 1 of column 'text'; filter such rows out", task, {**GOOD, "text": ["film", None]})
    bad("row 1 has an empty prompt", task, {**GOOD, "text": ["film", ""]})
    bad("row 1 of column 'text' has no token to predict", Task("lm", "causal_lm"), {"text": ["film", ""]})
    no_end = decoder_tokenizer()
    no_end.eos_token = None
    bad("row 0 of column 'text' has no token to pre", Task("lm", "causal_lm"), {"text": ["film"]}, tokenizer=no_end)


def test_targets_outside_a_closed_set_are_named():
    task = Task("mood", "causal_lm", prompt="{text}", labels=MOODS)
    message = "task 'mood': target 'mixed' in row 1 of column 'target' is not one of its 2 labels; add it to Task"
    bad(message, task, {"text": ["a", "b"], "target": ["positive", "mixed"]})
    bad("task 'mood': target 2 in row 0 of column 'target' is not an id", task, {"text": ["a"], "target": [2]})
    bad("task 'mood': target -1 in row 0 of column 'target' is not an id", task, {"text": ["a"], "target": [-1]})
    features = Features({"text": Value("string"), "target": ClassLabel(names=list(MOODS))})
    unlabelled = Dataset.from_dict({"text": ["a"], "target": [-1]}, features=features)
    message = "target -1 in row 0 of column 'target' is not an id of its 2 labels .*rows without a target"
    bad(message, Task("mood", "causal_lm", prompt="{text}"), unlabelled)


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq_lm"])
def test_whole_numbers_are_names_where_labels_are_numbers(kind):
    """Labels 1 to 3 and a column of 1 to 3: read as ids, all would be shifted by one."""
    stars = Task("stars", kind, prompt="{text}", labels=(1, 2, 3))
    for target in ([1, 3], ["1", "3"], [1.0, 3.0]):
        rows = prepared(stars, {"text": ["a", "b"], "target": target})
        assert rows.rows[0][ANSWER][:] == [0, 2]
    bad(r"target 0 in row 1 .* is not one of \[1, 2, 3\]", stars, {"text": ["a", "b"], "target": [1, 0]})
    either = Task("stars", kind, prompt="{text}", labels=("1", "0"))
    bad("task 'stars': .*1 would be '0' as an id, '1' as a name", either, {"text": ["a"], "target": [1]})


@pytest.mark.parametrize("column", ["text", "target"])
def test_not_a_number_is_no_text(column):
    """Missing cells of a file's column of numbers come as NaN."""
    rows = {"text": [1.5, 2.0], "target": [3.0, 4.0]}
    rows[column][1] = float("nan")
    bad("nan in row 1 of column", Task("sum", "causal_lm", prompt="{text}"), rows)


def test_whole_numbers_that_are_ids_or_names_alike():
    from_0 = Task("stars", "causal_lm", prompt="{text}", labels=("0", "1"))
    assert prepared(from_0, {"text": ["a", "b"], "target": [1, 0]}).rows[0][ANSWER][:] == [1, 0]


def test_a_chat_must_end_with_the_assistant():
    task = Task("talk", "causal_lm", text_columns="chat")
    message = "row 1 of column 'chat' ends with a message of 'user'; the last message is the target, and must be the as"
    bad(message, task, {"chat": [messages("film", "good"), messages("film", "good", "paris", last="user")]})
    bad("row 0 of column 'chat' has no messages", task, {"chat": [[], messages("film", "good")]})


def test_a_tokenizer_must_have_what_a_task_needs():
    bare = decoder_tokenizer()
    bare.chat_template = None
    message = "task '{}': tokenizer .* has no chat template, which its chat messages need; set tokenizer.chat_template"
    chats = {"chat": [messages("film", "good")]}
    bad(message.format("talk"), Task("talk", "causal_lm", text_columns="chat"), chats, tokenizer=bare)
    bad(message.format("say"), Task("say", "causal_lm", prompt="{text}", chat=True), GOOD, tokenizer=bare)
    prepared(Task("say", "causal_lm", prompt="{text}"), GOOD, tokenizer=bare)
    no_end = decoder_tokenizer()
    no_end.eos_token = None
    message = "task 'say': tokenizer .* has no end-of-sequence token, so that no target would end; set tokenizer.eos_t"
    bad(message, Task("say", "causal_lm", prompt="{text}"), GOOD, tokenizer=no_end)
    bad(message, Task("say", "causal_lm", label_column="target"), GOOD, tokenizer=no_end)
    assert len(prepared(Task("lm", "causal_lm"), {"text": ["the film", "we saw"]}, tokenizer=no_end)) == 2
    with pytest.raises(ValueError, match="processing_class is missing"):
        prepare_sources(
            Dataset.from_dict(GOOD), make_sources([Task("lm", "causal_lm")]), "x", tokenizer=None, max_length=9
        )


def test_a_pad_token_must_be_there(tmp_path):
    no_pad = decoder_tokenizer()
    no_pad.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad token; set one before training, for example tokenizer.pad_token"):
        MultiTaskTrainer(
            HardSharingModel.from_backbone(make_plain("llama"), [Task("lm", "causal_lm")]),
            MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_dict(GOOD),
            processing_class=no_pad,
        )
    with pytest.raises(ValueError, match="has no pad token"):
        DataCollatorForMultiTask(no_pad, [Task("lm", "causal_lm")])


def test_a_chat_template_must_keep_prompt_and_target_apart():
    tokenizer = decoder_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 1 %}a {% endif %}" + CHAT_TEMPLATE
    message = "task 'say': the tokenizer's chat template writes the messages before an answer in another way"
    bad(message, Task("say", "causal_lm", prompt="{text}", chat=True), GOOD, tokenizer=tokenizer)


def test_what_would_not_be_read_is_refused():
    chats = {"chat": [messages("film", "good")], "target": ["good"], "text": ["film"]}
    message = "task 'talk': column 'chat' holds chat messages, the last of which is the target: 'target' would not be"
    bad(message, Task("talk", "causal_lm", text_columns="chat", label_column="target"), chats)
    message = "task 'talk': column 'chat' must hold texts, numbers or lists of words; it has the type"
    bad(message, Task("talk", "causal_lm", prompt="{chat}"), chats)
    bad(message, Task("talk", "causal_lm", prompt="{text} {chat}"), chats)
    message = "task 'talk': column 'chat' must hold texts, .*, or chat messages .dictionaries with role and content."
    bad(message, Task("talk", "causal_lm", text_columns="chat"), {"chat": [{"role": "user", "content": "film"}]})
    bad(message, Task("talk", "causal_lm", text_columns="chat"), {"chat": [[{"from": "user", "value": "film"}]]})
    message = "task 'say': chat=True needs a target for the assistant to say; give prompt or label_column"
    bad(message, Task("say", "causal_lm", chat=True), GOOD)
