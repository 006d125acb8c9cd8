"""A recipe is data: it runs code from elsewhere only where the one who runs it allows that, at every entrance."""

from __future__ import annotations

import json

import pytest
import yaml
from test_cli import invoke
from test_recipe import folder  # noqa: F401

from hf_multitask.analysis.auxiliary import sweep_auxiliary
from hf_multitask.analysis.comparison import compare
from hf_multitask.analysis.grouping_run import group_tasks
from hf_multitask.analysis.preflight import preflight
from hf_multitask.models.backbone import load_backbone
from hf_multitask.recipe import Recipe, build, load_recipe
from hf_multitask.running import run_recipe

_KERNEL = "someone/kernels@main:attend"
ASKING = {
    "code of the backbone": "model.backbone_kwargs.trust_remote_code=true",
    "code of the backbone, as a word": "model.backbone_kwargs.trust_remote_code=yes",
    "code of the tokenizer": "model.tokenizer_kwargs.trust_remote_code=true",
    "code of a revision": "model.backbone_kwargs.code_revision=main",
    "a kernel": f'model.backbone_kwargs.attn_implementation="{_KERNEL}"',
    "a kernel by part": 'model.backbone_kwargs.attn_implementation={text_config: "kernels-community/flash-attn2"}',
    "a kernel in its configuration": 'model.backbone_kwargs.config={_attn_implementation: "a/b"}',
    "a kernel behind a prefix": 'model.backbone_kwargs.attn_implementation="paged|kernels-community/flash-attn2"',
    "what falls back to a kernel": "model.backbone_kwargs.attn_implementation=flash_attention_2",
    "experts": f'model.backbone_kwargs.experts_implementation="{_KERNEL}"',
    "kernels of all layers": "model.backbone_kwargs.use_kernels=true",
    "a mapping of kernels": "model.backbone_kwargs.kernel_config={RMSNorm: a/b}",
    "a map of classes": "model.tokenizer_kwargs.auto_map={AutoTokenizer: [evil.T, null]}",
    "quantization with kernels": "model.backbone_kwargs.quantization_config={quant_method: mxfp4}",
    "deep in an argument": "training.accelerator_config={a: [{trust_remote_code: true}]}",
}
ENTRANCES = {
    "train": (lambda path, **more: run_recipe(path, **more), ["train"]),
    "preflight": (preflight, ["preflight"]),
    "compare": (compare, ["compare"]),
    "group": (group_tasks, ["group"]),
    "sweep": (
        lambda path, **more: sweep_auxiliary(path, "tone", [0, 0.1], **more),
        ["sweep", "--auxiliary", "tone", "--weights", "0", "0.1"],
    ),
}


@pytest.mark.parametrize("case", ASKING)
def test_a_recipe_that_asks_for_code_is_refused_by_name(folder, case):  # noqa: F811
    key = ASKING[case].partition("=")[0].split(".")[2 if case != "deep in an argument" else 1]
    with pytest.raises(ValueError, match=f"{key}.*--trust-remote-code.*trust_remote_code=True"):
        load_recipe(folder / "job.yaml", [ASKING[case]])
    content = yaml.safe_load((folder / "job.yaml").read_text())
    trusted = load_recipe(folder / "job.yaml", [ASKING[case]], trust_remote_code=True)
    assert trusted.trust_remote_code
    made = Recipe("made", trusted.model, content["tasks"], trusted.training)
    with pytest.raises(ValueError, match="--trust-remote-code"):
        build(made)


@pytest.mark.parametrize(
    "setting",
    [
        "model.backbone_kwargs={trust_remote_code: false, attn_implementation: sdpa, use_kernels: false}",
        "model.backbone_kwargs={attn_implementation: eager, quantization_config: {load_in_4bit: true}}",
    ],
)
def test_what_runs_no_code_is_no_matter_of_trust(folder, setting):  # noqa: F811
    assert not load_recipe(folder / "job.yaml", [setting]).trust_remote_code


@pytest.fixture
def own_code(folder):  # noqa: F811
    """The recipe's backbone with code of its own, which leaves a mark when it runs."""
    backbone, mark = folder / "backbone", folder / "it-ran"
    config = json.loads((backbone / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (backbone / "config.json").write_text(json.dumps(config))
    (backbone / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    return folder, mark


@pytest.mark.parametrize("name", ENTRANCES)
def test_no_entrance_runs_a_backbones_code_unless_it_is_told_to(own_code, name, monkeypatch):
    # On a terminal Transformers would ask; nobody is to be asked.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    place, mark = own_code
    function, command = ENTRANCES[name]
    recipe = yaml.safe_load((place / "job.yaml").read_text())
    if name == "sweep":
        recipe["tasks"][0]["auxiliary"] = True
    for asking in (False, True):
        if asking:
            recipe["model"]["backbone_kwargs"] = {"trust_remote_code": True}
        (place / "job.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises((ValueError, OSError), match="trust_remote_code|contains custom code"):
            function(place / "job.yaml")
        result = invoke(command[0], place / "job.yaml", *command[1:])
        assert result.exit_code == 1 and "trust" in result.output
    assert not mark.exists()
    assert "--trust-remote-code" in invoke(command[0], "--help").output


def test_told_to_it_runs_the_code_and_says_so_in_the_result(own_code):
    place, mark = own_code
    trained = invoke("train", place / "job.yaml", "--set", "training.max_steps=1", "--trust-remote-code")
    assert trained.exit_code == 0, trained.output
    assert mark.exists()
    results = json.loads((place / "out" / "results.json").read_text())
    assert results["recipe"]["model"]["backbone_kwargs"] == {"trust_remote_code": True}


def test_a_backbones_configuration_cannot_ask_for_a_kernel(folder):  # noqa: F811
    file = folder / "backbone" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "kernels-community/attend"}))
    with pytest.raises(ValueError, match="attn_implementation='kernels-community/attend'.*code on the Hub"):
        load_backbone(str(folder / "backbone"))


def test_results_hold_no_token(folder):  # noqa: F811
    recipe = load_recipe(folder / "job.yaml", ["model.backbone_kwargs.token=hf_secret", "training.hub_token=hf_secret"])
    assert "hf_secret" not in json.dumps(recipe.to_dict()) and recipe.model["backbone_kwargs"]["token"] == "hf_secret"
