"""Commands for trained models: `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, plain_errors

__all__ = ["predict"]


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a trained model, or a Hub id.")],
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task to predict; repeat for more. Without it, every task.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; repeat for more.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="A file of texts, one per line; or .jsonl, rows with the tasks' text columns."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per pass of the encoder.")] = 32,
) -> None:
    """Predict with a trained model; prints one line of JSON for each text."""
    with plain_errors():
        inputs: list[Any] = list(text or [])
        if file is not None:
            inputs += _read_file(file)
        if not inputs:
            raise ValueError("no text: give --text or --file")
        from transformers.utils import logging

        from ..prediction import Predictor

        logging.disable_progress_bar()
        predictor = Predictor.from_pretrained(model)
        for given, answer in zip(inputs, predictor(inputs, task, batch_size), strict=True):
            row = given if isinstance(given, dict) else {"text": given}
            typer.echo(json.dumps({**row, **answer}, ensure_ascii=False))


def _read_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"file {str(path)!r} does not exist")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        return lines
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
    return rows
