"""A `handler.py` for Inference Endpoints: the service that runs a model repository with code of its own.

The service imports `handler.py` from the repository, makes one `EndpointHandler` of the repository's folder, and calls
it with the JSON of each request. [`write_handler`] writes that file, and `requirements.txt`, by which the service
installs this library. A request:

    {"inputs": "Maria liked the film.", "parameters": {"tasks": ["tone"], "top_k": 2}}

`inputs` is a text, a row (`{"text", "text_pair"}` for a pair, or the tasks' columns) or a list of these; `parameters`
are the options of [`hf_multitask.hub.pipeline`], each of which may be left out. The response is a list, with one
dictionary of answers by task for each input; one that cannot be read has `{"error": "..."}` in its place, and the
others are answered. Errors in a request as a whole are `ValueError`s, which the service returns as such: among them
more than 1,024 inputs, or more than 4,000,000 characters. Numbers that are not finite are null.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..models.limits import shown
from ..models.task import closest
from ..prediction_answers import finite
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


_MOST_INPUTS = 1024
_MOST_CHARACTERS = 4_000_000  # of all inputs and parameters together
_MOST_ROWS = 512  # of a pass of the encoder


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
            ValueError: The request is too large, something is missing or unknown, or a parameter is not of its type.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError(
                f'a request must be a JSON object with "inputs" and perhaps "parameters", got {shown(data)}'
            )
        if unknown := sorted(map(str, set(data) - {"inputs", "parameters"})):
            raise ValueError(
                f'a request has "inputs" and "parameters", not {shown(unknown[0])}; options go in "parameters"'
            )
        inputs, parameters = data["inputs"], data.get("parameters")
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, Mapping):
            raise ValueError(f'"parameters" must be a JSON object, got {shown(parameters)}')
        inputs = inputs if isinstance(inputs, list) else [inputs]
        if len(inputs) > _MOST_INPUTS:
            raise ValueError(f"a request may have {_MOST_INPUTS:,} inputs, this one has {len(inputs):,}")
        if _characters([inputs, parameters], _MOST_CHARACTERS) > _MOST_CHARACTERS:
            raise ValueError(f"a request may have {_MOST_CHARACTERS:,} characters, this one has more")
        options = _check_parameters(parameters)
        with self._turn:
            list(self._pipeline([], **options))  # a parameter that does not fit is no fault of an input
            try:
                answers = self._pipeline(inputs, **options)
            except (ValueError, TypeError):
                answers = [self._answer(one, options) for one in inputs]
        return finite(answers)[0]

    def _answer(self, one: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._pipeline([one], **options)[0]
        except (ValueError, TypeError) as error:
            return {"error": str(error)}


def _characters(value: Any, most: int) -> int:
    """Return the characters of all texts in a JSON value, one more for each value; no further than `most`."""
    total, left = 0, [value]
    while left and total <= most:
        one = left.pop()
        total += 1 + (len(one) if isinstance(one, str) else 0)
        if isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            left += one
    return total


def _check_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a request that were given.

    Raises:
        ValueError: A name is unknown, or a value is not of its type.
    """
    for name, value in parameters.items():
        if name not in OPTIONS:
            raise ValueError(f"no parameter {shown(name)}{closest(name, OPTIONS)}; parameters are {', '.join(OPTIONS)}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = {
            "tasks": isinstance(value, list) and all(isinstance(one, str) for one in value),
            "batch_size": whole and 1 <= value <= _MOST_ROWS,
            "stride": whole and value >= 0,
            "top_k": whole and value >= 1,
            "generate_kwargs": isinstance(value, Mapping),
        }
        wanted = {
            "tasks": "a list of names",
            "batch_size": f"a whole number from 1 to {_MOST_ROWS}",
            "stride": "a whole number of at least 0",
            "top_k": "a whole number of at least 1",
            "generate_kwargs": "a JSON object",
        }
        if value is not None and not fits[name]:
            raise ValueError(f"parameter {name!r} must be {wanted[name]}, got {shown(value)}")
    return {name: value for name, value in parameters.items() if value is not None}


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
