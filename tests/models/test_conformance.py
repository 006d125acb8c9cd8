"""Every model passes the tests that Transformers has for its own models: its `ModelTesterMixin`, where it applies.

The mixin is no part of Transformers' wheel. It is taken from the source archive of exactly the version that is
installed, which pip downloads once into the cache.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import transformers
from conftest import BACKBONES, PAD_ID, make_tasks
from transformers import PreTrainedModel, set_seed

import hf_multitask.models
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.configuration import MultiTaskConfig
from hf_multitask.models.manifest import write_manifest
from hf_multitask.quickstart import cache_folder

# An encoder, one whose configuration has names of its own, one with two kinds of layers, a decoder.
TESTED_BACKBONES = ("bert", "distilbert", "modernbert", "llama")
FEWEST = 60  # tests that must have made a model and passed; others end early, finding nothing to test

ONE_TENSOR = "wants a tensor as first output; ours is a dictionary of logits, tested below with these joined into one"
EXCEPTIONS = {
    "test_determinism": ONE_TENSOR,
    "test_retain_grad_hidden_states_attentions": ONE_TENSOR,
    "test_can_init_all_missing_weights[modernbert]": "for classes that are not its own, Transformers' loader takes a "
    "module without tensors of its own for initialised; ModernBERT scales deviations in such modules, so weights that "
    "a checkpoint lacks start with the plain deviation",
}
"""Reason by name of a test, or by `name[backbone]`, for every scheme. An exception must fail, else it is none."""

ELSEWHERE = "adapters are not in model.safetensors, but in folders of their own; tests of the schemes save them"
OF_SCHEMES = {
    "prefix": {
        "test_attention_outputs": "every row has the keys of its prefix as well",
        "test_model_weights_reload_no_missing_tied_weights": ELSEWHERE,
        "test_attn_implementation_composite_models[distilbert]": "attention layers have our function, with a prefix",
        "test_attn_implementation_composite_models[modernbert]": "attention layers have our function, with a prefix",
    },
    "soft": {
        "test_tp_plan_matches_params[llama]": "encoders lie in a dictionary of modules, where Transformers "
        "looks for no plan of tensor parallelism"
    },
    "adapter": {"test_model_weights_reload_no_missing_tied_weights": ELSEWHERE},
}
"""The same for single schemes."""

# Only models in a table of Transformers' own are held to these. Ours keep to them as well.
OF_BASE_MODELS = ("test_inputs_embeds_matches_input_ids", "test_model_forward_default_config_values")

OPTIONS = {
    ("hf_multitask_adapter", "distilbert"): {"target_modules": ["q_lin", "v_lin"]},
    ("hf_multitask_adapter", "modernbert"): {"target_modules": ["Wqkv", "Wo"]},
}
"""What a scheme has to be told about a backbone."""

PACKAGE = "_transformers_tests"
SOURCE = "tests/test_modeling_common.py"
# Bases for exporting and generating, which the archive leaves out, by their modules.
STUBS = {
    "exporters": None,
    "exporters.test_export": "ExportTesterMixin",
    "generation": None,
    "generation.test_utils": "GenerationTesterMixin",
}


def fetch_tests(version: str) -> Path:
    """Return the folder with the mixin's module of that version; the first call downloads it."""
    folder = cache_folder() / "transformers_tests" / version
    target = folder / Path(SOURCE).name
    if target.is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", f"transformers=={version}", f"--dest={scratch}"]
        command += ["--no-deps", "--no-binary=transformers", "--no-input", "--progress-bar=off", "--retries=1"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            pytest.skip(f"pip cannot download the source archive of transformers {version}; it said: {last}")
        (archive,) = Path(scratch).iterdir()
        with tarfile.open(archive) as members:
            # Two files are read by their names; nothing is unpacked to a path that the archive chooses.
            information, source = (
                members.extractfile(f"transformers-{version}/{name}").read() for name in ("PKG-INFO", SOURCE)
            )
    assert f"Version: {version}" in information.decode().splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}.partial"
    partial.write_bytes(source)
    partial.replace(target)
    return folder


@pytest.fixture(scope="module")
def common(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Transformers' `tests.test_modeling_common`, imported under a name that no other test sees."""
    folder = fetch_tests(transformers.__version__)
    for mark in set(re.findall(r"\bmark\.(\w+)", (folder / Path(SOURCE).name).read_text(encoding="utf-8"))):
        request.config.addinivalue_line("markers", f"{mark}: of Transformers")
    modules = {name: ModuleType(name) for name in (PACKAGE, *(f"{PACKAGE}.{name}" for name in STUBS))}
    modules[PACKAGE].__path__ = [str(folder)]
    for name, base in STUBS.items():
        if base:
            setattr(modules[f"{PACKAGE}.{name}"], base, type(base, (), {}))
    sys.modules.update(modules)
    try:
        with mock.patch.dict(os.environ, TRANSFORMERS_TEST_DEVICE="cpu"):
            module = importlib.import_module(f"{PACKAGE}.test_modeling_common")
            write = module.safe_save_file

            def write_on_purpose(tensors, path, **options):
                """Replace the weights of a saved model as the tests do, and record the change as a user has to."""
                write(tensors, path, **options)
                write_manifest(Path(path).parent)

            module.safe_save_file = write_on_purpose
            yield module
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]


class ModelTester:
    """What the mixin wants to know of a model, and inputs for it."""

    batch_size, seq_length = 5, 7
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training = True

    def __init__(self, model_class: type[MultiTaskModel], backbone: str) -> None:
        self.model_class, self.backbone = model_class, backbone

    def get_config(self) -> MultiTaskConfig:
        tasks = [task.to_dict() for task in make_tasks()]
        config = BACKBONES[self.backbone]().config
        options = OPTIONS.get((self.model_class.config_class.model_type, self.backbone), {})
        return self.model_class.config_class(backbone_config=config, tasks=tasks, **options)

    def prepare_config_and_inputs_for_common(self) -> tuple[MultiTaskConfig, dict]:
        ids = torch.randint(5, 90, (self.batch_size, self.seq_length))
        mask = (torch.arange(self.seq_length) < torch.tensor([7, 5, 7, 2, 6]).unsqueeze(1)).long()
        return self.get_config(), {"input_ids": ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}

    def labels(self) -> dict[str, torch.Tensor]:
        rows = self.batch_size
        return {
            "tone": torch.ones(rows, dtype=torch.long),
            "strength": torch.ones(rows, 1),
            "traits": torch.ones(rows, 3),
            "names": torch.ones(rows, self.seq_length, dtype=torch.long),
        }


def make_case(common: ModuleType, model_class: type[MultiTaskModel], backbone: str) -> type[unittest.TestCase]:
    class Conformance(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        model_tester = ModelTester(model_class, backbone)
        test_can_init_all_missing_weights_before_2023 = True  # no matter how old

        @property
        def _is_composite(self) -> bool:
            # The model has a configuration within its own, but one backbone: it passes both kinds of tests.
            return self._testMethodName != "test_sdpa_can_dispatch_non_composite_models"

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class)
            return {**inputs, "labels": self.model_tester.labels()} if return_labels else inputs

    return Conformance


def run(common: ModuleType, case: type[unittest.TestCase], name: str) -> str | None:
    """Run one test; return why it skipped itself, or None. It raises as it fails."""
    tester = case.model_tester
    as_base = {tester.get_config().model_type: tester.model_class.__name__} if name in OF_BASE_MODELS else {}
    set_seed(0)
    with mock.patch.dict(common.MODEL_MAPPING_NAMES, as_base):
        try:
            case(name).debug()
        except unittest.SkipTest as skipped:
            return str(skipped)
    return None


def is_exception(name: str, scheme: str, backbone: str) -> bool:
    known = EXCEPTIONS | OF_SCHEMES.get(scheme, {})
    return name in known or f"{name}[{backbone}]" in known


def cases() -> list:
    """Every scheme over every backbone; the schemes beside hard sharing over one of them by default."""
    slow = pytest.mark.slow
    return [
        pytest.param(
            scheme, backbone, marks=() if scheme == "hard" or (scheme, backbone) == ("adapter", "bert") else slow
        )
        for scheme in SCHEMES
        for backbone in TESTED_BACKBONES
    ]


@pytest.mark.registry
@pytest.mark.parametrize(("scheme", "backbone"), cases())
@pytest.mark.sample(11)
def test_models_pass_the_tests_of_transformers(common, subtests, monkeypatch, scheme, backbone):
    model_class, made = SCHEMES[scheme], []
    initialise = model_class.__init__

    @functools.wraps(initialise)
    def noted(self, *args, **kwargs):
        made.append(type(self))
        initialise(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "__init__", noted)
    case = make_case(common, model_class, backbone)
    names = unittest.TestLoader().getTestCaseNames(case)
    foreign = {key.split("[")[0] for key in EXCEPTIONS}.union(OF_BASE_MODELS) - set(names)
    assert not foreign, f"Transformers {transformers.__version__} has no tests named {sorted(foreign)}"
    passed, idle, skipped, excepted = [], [], [], []
    for name in names:
        made.clear()
        skips, error = False, None
        try:
            skips = run(common, case, name) is not None
        except Exception as raised:
            error = raised
        if is_exception(name, scheme, backbone):
            excepted.append(name)
            with subtests.test(f"{name} is an exception"):
                assert error, f"{name} does not fail: take it out of EXCEPTIONS"
        elif skips:
            skipped.append(name)
        elif made or error:
            with subtests.test(name):
                if error:
                    raise error
                passed.append(name)
        else:  # most of these found no model of the kind that they are for
            idle.append(name)
    print(
        f"{scheme}, {backbone}: {len(passed)} passed, {len(idle)} passed without making a model, "
        f"{len(skipped)} skipped themselves, {len(excepted)} excepted: {excepted}"
    )
    assert len(passed) >= FEWEST


@pytest.mark.registry
@pytest.mark.parametrize("name", [name for name, reason in EXCEPTIONS.items() if reason == ONE_TENSOR])
@pytest.mark.parametrize("backbone", TESTED_BACKBONES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_joined_logits_pass_what_wants_one_tensor(common, scheme, backbone, name):
    class Joined(SCHEMES[scheme]):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output["logits"] = torch.cat([logits.flatten() for logits in output.logits.values()])
            return output

    case = make_case(common, Joined, backbone)
    if SCHEMES[scheme].freezes_backbone and name == "test_retain_grad_hidden_states_attentions":
        with pytest.raises((RuntimeError, AssertionError)):  # a frozen backbone's first hidden state has no gradient
            run(common, case, name)
        return
    assert run(common, case, name) is None


def test_every_model_of_the_package_is_tested():
    for module in pkgutil.walk_packages(hf_multitask.models.__path__, "hf_multitask.models."):
        importlib.import_module(module.name)

    def below(parent: type) -> Iterator[type]:
        for child in parent.__subclasses__():
            yield child
            yield from below(child)

    ours = {model for model in below(PreTrainedModel) if model.__module__.startswith("hf_multitask.")}
    assert {model for model in ours if not inspect.isabstract(model)} == set(SCHEMES.values())
    assert {key.partition("[")[2].rstrip("]") for key in EXCEPTIONS} <= {"", *TESTED_BACKBONES}
