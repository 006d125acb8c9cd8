"""Model cards: only facts, each where it belongs, and nothing that breaks out of its place."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer
from hub_server import card_errors
from huggingface_hub import ModelCard
from language_models import make_plain
from questions import question_tasks

from hf_multitask import HardSharingModel, Task
from hf_multitask.analysis.comparison_result import Comparison, TaskComparison
from hf_multitask.analysis.conflict_result import GradientConflicts
from hf_multitask.hub.card_facts import CardFacts, DatasetFacts, TaskFacts, training_values
from hf_multitask.hub.card_metadata import TASK_TYPES, card_metadata, eval_results
from hf_multitask.hub.card_sources import facts_of_folder, facts_of_result, last_evaluation
from hf_multitask.hub.code import write_code
from hf_multitask.hub.model_card import main, make_model_card, recipe_cards, write_model_card
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.task import TaskType

ROOT = Path(__file__).parents[2]
NASTY = "a|b\n---\n<script>x</script> `c` **d** [e](f) \\ _g_ # é"


def rich_facts(**changes) -> CardFacts:
    reviews = DatasetFacts("reviews", "me/reviews", "english", "a1b2")
    tasks = [
        TaskFacts("tone", "single_label_classification", reviews, ("negative", "positive"), primary="accuracy"),
        TaskFacts("source", "single_label_classification", reviews, ("web", "press"), primary="accuracy"),
        TaskFacts("who", "token_classification", DatasetFacts("names"), ("O", "B-person"), primary="f1"),
        TaskFacts("words", "masked_lm", DatasetFacts("text"), auxiliary=True, weight=0.1),
    ]
    for number, task in enumerate(tasks):
        task.metrics = {
            "validation": {str(task.primary or "perplexity"): 0.5 + number / 10, "loss": 0.25},
            "test": {str(task.primary or "perplexity"): 0.4 + number / 10},
        }
        task.rows_seen = 1000 * (number + 1)
    methods, arguments = training_values(
        {"learning_rate": 1e-3, "seed": 3, "task_sampling": "capped", "task_sampling_kwargs": {"cap": 9}}
    )
    values = dict(
        name="model",
        location="me/model",
        tasks=tasks,
        sharing="adapter",
        options={"rank": 4},
        backbone="someone/encoder",
        backbone_type="bert",
        parameters=1234567,
        longest=77,
        averages={"validation": 0.6, "test": 0.5},
        methods=methods,
        arguments=arguments,
        steps=321,
        seconds=12.5,
        device="cuda:0",
        versions={"torch": "9.9.9"},
        emissions=1.25,
        has_code=True,
        license="mit",
        languages=("en",),
        tags=("demo",),
    )
    return CardFacts(**{**values, **changes})


def metadata_of(card: str) -> dict:
    assert card_errors(card) == []
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def code_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.M | re.S)


# ---- the cards of the recipes ----


def test_the_cards_of_the_recipes_are_those_of_their_recorded_results(tmp_path):
    cards = recipe_cards(ROOT / "recipes")
    assert "quickstart" in cards
    assert {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "model_cards").glob("*")} == cards
    for name, card in cards.items():
        results = json.loads((ROOT / "recipes" / f"{name}.json").read_text())
        found = ModelCard(card).data.eval_results
        for task, values in results["tasks"].items():
            for split in {"validation", "test"} & set(values):
                own = {r.metric_name: r.metric_value for r in found if (r.task_name, r.dataset_split) == (task, split)}
                assert own == {key: value for key, value in values[split].items() if key != "loss"}
    main(str(ROOT / "recipes"), str(tmp_path / "cards"))
    assert {path.stem for path in (tmp_path / "cards").iterdir()} == set(cards)


def test_a_result_that_is_no_json_is_named(tmp_path):
    (tmp_path / "job.yaml").write_text("")
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ValueError, match=r"job.json' is no JSON"):
        recipe_cards(tmp_path)


# ---- metadata ----


def test_the_metadata_is_accepted_and_comes_back_as_it_was(tmp_path):
    facts = rich_facts()
    card = make_model_card(facts)
    (tmp_path / "README.md").write_text(card)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.eval_results == [one for task in facts.tasks for one in eval_results(task)]
    assert loaded.data.model_name == "model" and loaded.data.base_model == "someone/encoder"
    data = metadata_of(card)
    assert data["co2_eq_emissions"] == {"emissions": 1.25, "source": "codecarbon"}
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["en"], ["me/reviews"])
    assert data["tags"] == ["multi-task-learning", "text-classification", "token-classification", "demo"]
    assert "pipeline_tag" not in data, "no single one fits"
    assert card_metadata(rich_facts(tasks=facts.tasks[:2]))["pipeline_tag"] == "text-classification"


def test_every_result_is_the_tasks_own_where_two_tasks_read_the_same_rows():
    results = metadata_of(make_model_card(rich_facts()))["model-index"][0]["results"]
    found = {(one["task"]["name"], one["dataset"]["split"]): one for one in results}
    assert len(found) == len(results) == 6
    assert found["tone", "test"]["metrics"] == [{"type": "accuracy", "value": 0.4, "name": "accuracy"}]
    assert found["source", "test"]["metrics"] == [{"type": "accuracy", "value": 0.5, "name": "accuracy"}]
    named = {"name": "reviews", "type": "me/reviews", "config": "english", "split": "test", "revision": "a1b2"}
    assert found["source", "test"]["dataset"] == named
    assert found["who", "test"]["dataset"] == {"name": "names", "type": "local:names", "split": "test"}
    assert not any(task == "words" for task, _ in found), "what is not answered has no results"


def test_every_type_of_task_has_a_name_on_the_hub():
    assert set(TASK_TYPES) == {kind.value for kind in TaskType}


# ---- text ----


def test_the_text_says_what_is_known():
    card = make_model_card(rich_facts())
    for part in (
        *("# model", "made from [someone/encoder](https://huggingface.co/someone/encoder)", "1,234,567 parameters"),
        "| `tone` | `single_label_classification` | negative, positive "
        "| [me/reviews](https://huggingface.co/datasets/me/reviews) (`english`) |",
        "| `words` | `masked_lm` (auxiliary) | - | `text` |",
        *(
            "not answered: `words`",
            "| `tone` | `accuracy` | **0.5000** | **0.4000** |",
            "| `tone` | `loss` | 0.2500 | - |",
        ),
        *("| mean of the primary metrics |  | 0.6000 | 0.5000 |", "cut to 77 tokens", "| `learning_rate` | 0.001 |"),
        *('| sampling of the tasks | `capped` {"cap": 9} |', "| loss weighting | `static` |", "| its `rank` | 4 |"),
        *("| training time | 12.5 s on `cuda:0` |", "| `who` | 1 | 3,000 |", "- `torch` 9.9.9", "1.25 g of CO₂"),
        *(
            "It answers `tone`, `source`, `who`, and nothing else.",
            "trust_remote_code=True",
            "| optimizer steps | 321 |",
        ),
    ):
        assert part in card, part


ABSENT = {
    "sharing": (None, "sharing scheme"),
    "backbone": (None, "someone/encoder"),
    "parameters": (None, "parameters."),
    "longest": (None, "are cut to"),
    "averages": ({}, "mean of the primary metrics"),
    "methods": ({}, "loss weighting"),
    "arguments": ({}, "learning_rate"),
    "steps": (None, "optimizer steps"),
    "seconds": (None, "training time"),
    "versions": ({}, "## Versions"),
    "emissions": (None, "CO₂"),
    "has_code": (False, "trust_remote_code"),
    "license": (None, "license:"),
    "languages": ((), "language:"),
    "tags": ((), "demo"),
    "options": ({}, "its `rank`"),
    "tasks": ([], "## Tasks"),
}


@pytest.mark.parametrize("field", ABSENT)
def test_a_field_without_a_fact_is_absent(field):
    nothing, trace = ABSENT[field]
    assert trace in make_model_card(rich_facts())
    card = make_model_card(rich_facts(**{field: nothing}))
    assert trace not in card
    metadata_of(card)


def test_a_model_of_which_nothing_is_known_has_a_card_all_the_same():
    card = make_model_card(CardFacts("model", "me/model"))
    assert metadata_of(card) == {"library_name": "hf_multitask", "tags": ["multi-task-learning"]}
    assert not re.search(r"None|nan|null|\{\}|\[\]", card) and "## Training" not in card and "## Results" not in card


@pytest.mark.parametrize("sharing", SCHEMES)
def test_every_scheme_is_described(sharing):
    row = re.search(r"^\| sharing scheme \| (.*) \|$", make_model_card(rich_facts(sharing=sharing)), flags=re.M)
    assert row and len(row[1]) > 40


def test_names_and_labels_break_out_of_nothing():
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tasks = [
        TaskFacts("tone", "single_label_classification", DatasetFacts(NASTY), (NASTY, "```", "---"), (NASTY,)),
        TaskFacts("two", "regression", DatasetFacts("plain"), text_columns=(NASTY, "b", "c")),
    ]
    tasks[0].metrics = {"validation": {NASTY: 0.5}}
    facts = CardFacts(
        NASTY,
        'x")\n```\nimport os',
        tasks,
        options={NASTY: NASTY},
        versions={NASTY: NASTY},
        tags=(NASTY,),
        license=NASTY,
        languages=(NASTY,),
        conflicts={"pairs": [{"a": NASTY, "b": "two", "cosine": 0.5, "verdict": NASTY}]},
        comparison={"tasks": {NASTY: {"single": 1, "multi": 2, "difference": 1, "interval": [0, 2], "metric": NASTY}}},
        device=NASTY,
        seconds=1.0,
    )
    card = make_model_card(facts)
    data = metadata_of(card)
    one_line = " ".join(NASTY.split())
    assert data["license"] == one_line and data["model-index"][0]["name"] == one_line
    assert ModelCard(card).data.eval_results == eval_results(tasks[0])
    body = card.split("\n---\n", 1)[1]
    tokens = parser.parse(body)
    assert not [token for token in tokens if token.type in ("html_block", "hr")]
    inline = [child for token in tokens for child in token.children or ()]
    assert not [child for child in inline if child.type in ("html_inline", "link_open") or child.tag == "em"]
    shown = ["".join(child.content for child in token.children or ()) for token in tokens if token.type == "inline"]
    assert f"{one_line}, ```, ---" in shown and one_line in shown
    rows = parser.render(body).split("<tr>")[1:]
    first = [row.count("<td") for row in rows if "tone" in row and "classification" in row]
    assert first == [4]
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
    blocks = code_of(card)
    assert len(blocks) == 2
    for block in blocks:
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        given = [a for call in calls for a in [*call.args, *(k.value for k in call.keywords)]]
        strings = [value.value for value in given if isinstance(value, ast.Constant)]
        assert 'x")\n```\nimport os' in strings


# ---- code that runs ----


def served_models():
    torch.manual_seed(0)
    tasks = [*make_tasks(), Task("pairs", "regression", text_columns=("first", "second")), Task("words", "masked_lm")]
    yield "classifiers", HardSharingModel.from_backbone(make_plain("bert"), tasks)
    yield "questions", HardSharingModel.from_backbone(BACKBONES["bert"](), question_tasks())
    prompts = ["{question} {hint} {text}"]
    writing = [
        Task("write", "causal_lm", generation={"max_new_tokens": 2}),
        Task("pick", "causal_lm", prompt=prompts, labels=("good", "bad")),
    ]
    yield "writers", HardSharingModel.from_backbone(make_plain("llama"), writing)


@pytest.mark.parametrize("kind", ["classifiers", "questions", "writers"])
def test_the_code_of_a_card_runs_as_it_stands(tmp_path, monkeypatch, capsys, kind):
    model = dict(served_models())[kind]
    model.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "model")
    if kind == "classifiers":
        write_code(tmp_path / "model")
    write_model_card(tmp_path / "model", tmp_path / "README.md", location="model")
    card = (tmp_path / "README.md").read_text()
    metadata_of(card)
    monkeypatch.chdir(tmp_path)
    blocks = code_of(card)
    assert len(blocks) == (3 if kind == "classifiers" else 2)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "card", "exec"), scope)
    answers = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    wanted = {task.name for task in model.tasks if task.type is not TaskType.MASKED_LM}
    assert {name for answer in answers for name in answer} == wanted
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card


# ---- where facts come from ----


def test_a_folder_tells_of_its_training_and_of_what_was_found_out(model, tmp_path):
    model.config.max_input_length = 33
    model.save_pretrained(tmp_path)
    state = {
        "global_step": 12,
        "log_history": [
            {"step": 6, "eval_tone_accuracy": 0.1, "eval_average": 0.1},
            {"step": 12, "eval_tone_accuracy": 0.8, "eval_tone_loss": 0.3, "eval_runtime": 1.0},
            {"step": 12, "eval_tone_accuracy": 0.9, "eval_names_f1": float("nan"), "eval_average": 0.7},
            {"step": 12, "train_runtime": 4.5},
        ],
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "emissions.csv").write_text("timestamp,emissions\n1,0.5\n2,0.001\n")
    eye = np.array([[1.0, -0.4], [-0.4, 1.0]])
    found = GradientConflicts(("tone", "strength"), eye, eye - 0.1, eye + 0.1, *[np.ones(2)] * 3, {"0": eye}, 8)
    found.save(tmp_path / "gradient_conflicts.json")
    values = dict(difference=0.08, interval=(0.05, 0.11), interval_over_examples=(0.05, 0.11), by_seed={"0": 0.08})
    compared = TaskComparison(
        **values,
        seed_spread=None,
        margin=0.01,
        task="tone",
        metric="accuracy",
        greater_is_better=True,
        multi=0.9,
        single=0.82,
        multi_by_seed={"0": 0.9},
        single_by_seed={"0": 0.82},
        examples=100,
        budget={},
    )
    delta = {"value": 0.1, "interval": [0.05, 0.15]}
    Comparison((compared,), (0,), delta, ("tone",), {}, settings={"confidence": 0.9}).save(tmp_path / "comparison.json")
    facts = facts_of_folder(tmp_path, "mine")
    assert facts.tasks[0].metrics == {"validation": {"accuracy": 0.9}} and facts.averages == {"validation": 0.7}
    assert (facts.steps, facts.seconds, facts.emissions, facts.longest) == (12, 4.5, 1.0, 33)
    assert facts.tasks[3].labels == ("O", "B-person", "B-place") and facts.sharing == "hard"
    card = make_model_card(facts)
    assert "| `tone` | `strength` | -0.400 | -0.50 to -0.30 | negative |" in card
    assert "| `tone` | `accuracy` | 0.8200 | 0.9000 | +0.0800 | +0.0500 to +0.1100 | better |" in card
    assert "90% interval" in card and "+10.0% (+5.0% to +15.0%), over 1 seed." in card
    assert "There is no measurement of `strength`, `traits`, `names`." in card

    results = facts_of_result({"recipe": {"model": {"sharing": "hard"}}}, "x")
    assert results.tasks == [] and "task_sampling" not in results.methods
    (tmp_path / "results.json").write_text(json.dumps({"recipe": {}, "tasks": {}, "steps": 99}))
    assert facts_of_folder(tmp_path).steps == 99, "the result comes before the log"
    for name, content, part in (
        ("comparison.json", "[", "comparison.json' is no JSON"),
        ("trainer_state.json", "[]", "trainer_state.json' holds no JSON object"),
        ("emissions.csv", "a,b\n1,2\n", "no number in the column 'emissions'"),
    ):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=part):
            facts_of_folder(tmp_path)
        (tmp_path / name).write_text(kept)


def test_the_name_of_a_task_may_begin_with_that_of_another():
    history = [{"eval_tone_f1": 0.1, "eval_tone_a_f1": 0.2, "eval_tone_a_loss": 1.0, "eval_other_f1": 0.3}]
    assert last_evaluation(history, ["tone", "tone_a"]) == {"tone": {"f1": 0.1}, "tone_a": {"f1": 0.2, "loss": 1.0}}
    assert last_evaluation([], ["tone"]) == {}


DATASETS = {
    "me/reviews": DatasetFacts("me/reviews", "me/reviews"),
    "quickstart:bbc": DatasetFacts("bbc", registry=True),
    "data/rows-{split}.parquet": DatasetFacts("tone"),
    "/home/me/rows.jsonl": DatasetFacts("tone"),
    "data/rows.csv": DatasetFacts("tone"),
    '{"path": "me/glue", "name": "sst2", "revision": "v1"}': DatasetFacts("me/glue", "me/glue", "sst2", "v1"),
    '{"path": "json", "data_files": "/home/me/x.json"}': DatasetFacts("tone"),
    '{"path": "me/glue", "data_files": "x.json"}': DatasetFacts("tone"),
    '{"path": "/home/me/folder"}': DatasetFacts("tone"),
}


@pytest.mark.parametrize("text", DATASETS)
def test_datasets_of_the_hub_are_linked_and_files_of_a_machine_are_not_named(text):
    given = json.loads(text) if text.startswith("{") else text
    found = DatasetFacts.from_recipe(given, "tone")
    assert found == DATASETS[text] and (":" in found.type) == (found.hub_id is None)
    assert "/home/me" not in make_model_card(rich_facts(tasks=[replace(rich_facts().tasks[0], dataset=found)]))


def test_rows_know_where_on_the_hub_they_came_from():
    rows = make_datasets()["reviews"]
    assert DatasetFacts.from_rows("reviews", rows) == DatasetFacts("reviews")
    address = "hf://datasets/me/reviews@0123abc/data/train.parquet"
    rows.info.download_checksums = {address: {"num_bytes": 1, "checksum": None}}
    rows.info.config_name = "english"
    assert DatasetFacts.from_rows("reviews", rows) == DatasetFacts("reviews", "me/reviews", "english", "0123abc")


def test_a_trainer_writes_the_card_of_what_it_did(make_trainer, model, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("hf_multitask.hub.trainer_push.logger.warning", said.append)
    rows = make_datasets()
    rows["reviews"].info.download_checksums = {"hf://datasets/me/reviews@0123abc/x": {"num_bytes": 1, "checksum": None}}
    trainer = make_trainer(
        model, rows, make_datasets(1), max_steps=2, task_sampling="capped", task_sampling_kwargs={"cap": 9}, seed=5
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(license="mit", language="en", tags="demo", finetuned_from="me/bert", dataset="x")
    assert len(said) == 1 and "dataset are not used" in said[0]
    card = Path(trainer.args.output_dir, "README.md").read_text()
    data = metadata_of(card)
    assert (data["license"], data["language"], data["base_model"]) == ("mit", ["en"], "me/bert")
    assert "demo" in data["tags"] and data["datasets"] == ["me/reviews"]
    for result in ModelCard(card).data.eval_results:
        assert result.metric_value == metrics[f"eval_{result.task_name}_{result.metric_name}"]
        assert result.dataset_split == "validation"
    assert '`capped` {"cap": 9}' in card and "| `seed` | 5 |" in card and "| optimizer steps | 2 |" in card
    for name, seen in trainer.progress.rows_seen.items():
        assert f"| `{name}` | 1 | {seen:,} |" in card


def test_a_plain_model_gets_the_card_of_trainer(tmp_path):
    from transformers import BertForSequenceClassification, TrainingArguments

    from hf_multitask import MultiTaskTrainer

    plain = BertForSequenceClassification(BACKBONES["bert"]().config)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    MultiTaskTrainer(plain, args).create_model_card(model_name="plain")
    assert "hf_multitask" not in (tmp_path / "README.md").read_text()


# ---- code ----


def test_code_is_written_for_models_of_this_library_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        write_code(tmp_path)
    BACKBONES["bert"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'bert'; code is written for 'hf_multitask_hard_sharing'"):
        write_code(tmp_path)


def test_code_that_is_written_again_leaves_no_module_of_another_version(tmp_path):
    dict(served_models())["classifiers"].save_pretrained(tmp_path)
    written = write_code(tmp_path)
    (tmp_path / "hf_multitask_models" / "old.py").write_text("import nothing")
    assert write_code(tmp_path) == written
    assert sorted(written) == sorted(
        f"hf_multitask_models/{p.name}" for p in (tmp_path / "hf_multitask_models").iterdir()
    )
