"""A `handler.py` for Inference Endpoints: the service that runs a model repository with code of its own.

The service imports `handler.py` from the repository, makes one `EndpointHandler` of the repository's folder, and calls
it with the JSON of each request. [`write_handler`] writes that file, and `requirements.txt`, by which the service
installs this library. A request:

    {"inputs": "Maria liked the film.", "parameters": {"tasks": ["tone"], "top_k": 2}}

`inputs` is a text, a row (`{"text", "text_pair"}` for a pair, or the tasks' columns) or a list of these; `parameters`
are the options of [`hf_multitask.hub.pipeline`], each of which may be left out. The response is a list, with one
dictionary of answers by task for each input. Errors in a request are `ValueError`s, which the service returns as such.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..models.task import closest
from .pipeline import OPTIONS

__all__ = ["RequestHandler", "write_handler"]

_HANDLER = '''"""Answers requests to an Inference Endpoint: every task of the model in this repository."""

from typing import Any

from hf_multitask.hub.handler import RequestHandler


class EndpointHandler:
    """Made once from the repository's folder, called with each request."""

    def __init__(self, path: str = "") -> None:
        self.answer = RequestHandler(path)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answers to {"inputs": text, row or list of these, "parameters": {"tasks": [...], ...}}."""
        return self.answer(data)
'''


class RequestHandler:
    """Answers requests with one model; calls from several threads take turns, so that one batch at a time needs memory.

    Args:
        path: The model's folder, its tokenizer included, or a Hub id.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import pipeline

        self._pipeline: Any = pipeline("multi-task", model=str(path) or ".")  # type: ignore[call-overload]
        self._turn = threading.Lock()

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return one dictionary of answers by task for each input of a request.

        Args:
            data: `inputs`, and if wanted `parameters`, as they come from JSON.

        Raises:
            ValueError: Something is missing, unknown or no text.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError(f'a request must be a JSON object with "inputs" and perhaps "parameters", got {data!r}')
        if unknown := sorted(set(data) - {"inputs", "parameters"}):
            raise ValueError(f'a request has "inputs" and "parameters", not {unknown[0]!r}; options go in "parameters"')
        inputs, parameters = data["inputs"], data.get("parameters")
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, Mapping):
            raise ValueError(f'"parameters" must be a JSON object, got {parameters!r}')
        for name in parameters:
            if name not in OPTIONS:
                raise ValueError(f"no parameter {name!r}{closest(name, OPTIONS)}; parameters are {', '.join(OPTIONS)}")
        with self._turn:
            return self._pipeline(inputs if isinstance(inputs, list) else [inputs], **parameters)


def write_handler(folder: str | Path) -> list[Path]:
    """Write `handler.py` and `requirements.txt` into the folder of a saved model.

    Args:
        folder: The folder.

    Returns:
        The paths of the two files.

    Raises:
        FileNotFoundError: There is no such folder, or no model in it.
        FileExistsError: A file of that name is there and says something else: it is not replaced.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no model: it has no {CONFIG_NAME}; save one there first")
    contents = {"handler.py": _HANDLER, "requirements.txt": f"hf_multitask=={version('hf_multitask')}\n"}
    for name, content in contents.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise FileExistsError(f"{path} is there already and says something else; delete or rename it first")
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
