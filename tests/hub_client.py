"""Processes that talk to the Hub of the tests: one imports everything once, and forks a new one for each program.

`HF_ENDPOINT` is read when huggingface_hub is imported, so clients are processes of their own. A fork is a new process
that has loaded the libraries and no model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from conftest import BACKBONES, make_tasks, make_tokenizer
from hub_server import Hub

from hf_multitask.models.auto import SCHEMES

TESTS = Path(__file__).parent

# Imports what others have made; hf_multitask is imported by the programs, where they may.
SERVE = """
import gc, json, os, sys, torch, traceback
import accelerate, datasets, peft, scipy.stats, seqeval.metrics, sklearn.metrics, typer.testing
import transformers.models.bert.modeling_bert
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_multitask":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert not any(name.split(".")[0] == "hf_multitask" for name in sys.modules)
torch.set_num_threads(1)
# Loading a model compiles many expressions, once in a process and its forks.
small = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
BertModel.from_pretrained(None, config=small.config, state_dict=small.state_dict())
logging.disable_progress_bar()
gc.freeze()  # what is shared with the forks stays shared
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
print(json.dumps("ready"), file=replies, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if (child := os.fork()) == 0:
        scope = {"torch": torch, "AutoModel": AutoModel, **asked["values"]}
        os.environ.update(asked["env"])
        if not asked["package"]:
            sys.meta_path.insert(0, Missing())
        try:
            exec(compile(asked["code"], "program", "exec"), scope)
            reply = {"result": scope.get("result")}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


class ClientError(Exception):
    """A program ended with an exception: its text is `Type: message`."""


class Client:
    """Runs programs, each in a new process.

    Args:
        url: Address of the Hub.
        home: A folder for caches.
        token: The token, or none.
    """

    def __init__(self, url: str, home: Path, token: str = "writer") -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
        self.env = {
            **kept,
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        }
        self.errors = (home / "client.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env=self.env,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self._ready = False

    def run(self, code: str, /, env: dict[str, str] | None = None, package: bool = True, **values: Any) -> Any:
        """Return what a program leaves in `result`; `values` are its variables.

        Without `package`, importing hf_multitask fails as it does where it is not installed.

        Raises:
            ClientError: It ended with an exception.
        """
        if not self._ready:
            self._ready = self._reply() == "ready"
        assert self._process.stdin is not None
        asked = {"code": dedent(code), "values": values, "env": env or {}, "package": package}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if "error" in reply:
            raise ClientError(reply["error"]) from Exception(reply["trace"])
        return reply["result"]

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise AssertionError(f"the client ended:\n{self.errors.read()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)
        self.errors.close()


# ---- models to push ----

INPUT_IDS = [[1, 6, 7, 8, 2], [1, 9, 10, 11, 2]]

LOGITS = """
def logits_of(model):
    with torch.inference_mode():
        return {name: value.tolist() for name, value in model.eval()(input_ids=torch.tensor(input_ids)).logits.items()}
"""


def logits_of(model: Any) -> dict[str, Any]:
    """Return the logits of a few rows; as numbers, which JSON keeps to the last bit."""
    scope: dict[str, Any] = {"torch": torch, "input_ids": INPUT_IDS}
    exec(LOGITS, scope)
    return scope["logits_of"](model)


def save_model(sharing: str, folder: Path, seed: int = 0, tasks: Any = None, **options: Any) -> Any:
    """Save a model of a scheme and its tokenizer; all its parameters are at random, adapters too."""
    torch.manual_seed(seed)
    model = SCHEMES[sharing].from_backbone(BACKBONES["bert"](), tasks or make_tasks(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def hub():
    with Hub({"writer": {"me"}, "other": {"else"}}, readers=("reader",)) as server:
        yield server


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    made = Client(hub.url, tmp_path_factory.mktemp("client"))
    yield made
    made.close()
