"""The command line, `hf-multitask`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Train one model on many tasks, and use it.\n\n"
        "A recipe is a YAML file with three parts: the model (a pretrained backbone and how its parameters are "
        "shared), the tasks (each with its type, dataset and columns) and the training arguments."
    ),
    epilog="Example: hf-multitask train recipes/quickstart.yaml --set training.max_steps=10",
)


@app.callback()
def _commands() -> None:
    """Keep `train` and `predict` as commands of their own."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Show a mistake in the input as one message, without the way the program took to find it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (ValueError, TypeError, OSError)) and not type(error).__module__.startswith(
            "hf_multitask"
        ):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeat for more."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
) -> None:
    """Train a recipe's model; write it, its metrics and results.json to the output folder."""
    with _plain_errors():
        from .running import run_recipe

        if table := run_recipe(recipe, settings or [], resume=resume):
            typer.echo(table)


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
    with _plain_errors():
        inputs: list[Any] = list(text or [])
        if file is not None:
            inputs += _read_file(file)
        if not inputs:
            raise ValueError("no text: give --text or --file")
        from transformers.utils import logging

        from .prediction import Predictor

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


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-multitask")


if __name__ == "__main__":
    main()
