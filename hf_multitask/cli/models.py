"""Commands for trained models: `predict`, `export`, `push`, `manifest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, plain_errors

__all__ = ["export", "manifest", "predict", "push"]


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
    stride: Annotated[
        int | None,
        typer.Option(min=0, help="Read long texts in windows that share so many tokens. Without it they are cut."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Labels with their scores per task. Without it, the best.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ... Without it, a GPU if there is one.")
    ] = None,
) -> None:
    """Predict with a trained model; prints one line of JSON for each text, with null for NaN."""
    with plain_errors():
        inputs: list[Any] = list(text or [])
        if file is not None:
            inputs += _read_file(file)
        if not inputs:
            raise ValueError("no text: give --text or --file")
        from transformers.utils import logging

        from ..prediction import Predictor
        from ..prediction_answers import finite

        logging.disable_progress_bar()
        predictor = Predictor.from_pretrained(model, device)
        answers = predictor(inputs, task, batch_size, stride=stride, top_k=top_k)
        lost = 0
        for given, answer in zip(inputs, answers, strict=True):
            row = given if isinstance(given, dict) else {"text": given}
            line, count = finite({**row, **answer})
            lost += count
            typer.echo(json.dumps(line, ensure_ascii=False, allow_nan=False))
        if lost:
            typer.echo(f"Warning: {lost} numbers are NaN or infinite, which JSON lacks: they are null", err=True)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a trained model, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="A folder, or a file name that ends in .onnx.")],
    format_: Annotated[str, typer.Option("--format", help="What to write: onnx.")] = "onnx",
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task to export; repeat for more. Without it, every task.")
    ] = None,
) -> None:
    """Write a trained model for another runtime, all tasks in one graph, and compare the two."""
    with plain_errors():
        if format_ != "onnx":
            raise ValueError(f"format {format_!r} is not known; it must be onnx")
        from transformers.utils import logging

        from ..hub.onnx import export_onnx
        from ..prediction import load_model

        logging.disable_progress_bar()
        loaded, tokenizer = load_model(model)
        path = export_onnx(loaded, output, tasks=task, tokenizer=None if output.suffix == ".onnx" else tokenizer)
        typer.echo(str(path))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a trained model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="NAME or OWNER/NAME; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if there is none.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    include_code: Annotated[
        bool, typer.Option("--include-code", help="Let the modelling code go along, for trust_remote_code=True.")
    ] = False,
    handler: Annotated[
        bool, typer.Option("--handler", help="Let a handler.py for Inference Endpoints go along.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and what not; send nothing.")] = False,
) -> None:
    """Push a trained model to the Hub, in one commit; a model card is written if there is none.

    An interrupted push goes on when it is started again: what has arrived is not sent twice.
    """
    with plain_errors():
        from transformers.utils import logging

        from ..hub.push import prepare_push, push_folder

        logging.disable_progress_bar()
        parts: dict[str, Any] = {"include_code": include_code, "include_handler": handler}
        if dry_run:
            with prepare_push(folder, repo_id=repo_id, **parts) as plan:
                typer.echo(str(plan))
            return
        options: dict[str, Any] = {"private": private or None, "revision": revision, "message": message}
        typer.echo(push_folder(folder, repo_id, **parts, **options).commit_url)


@app.command()
def manifest(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model, or a checkpoint.")],
    check: Annotated[bool, typer.Option("--check", help="Only list the files that have changed.")] = False,
) -> None:
    """Record the files of a saved model as they are now, after some were changed on purpose."""
    with plain_errors():
        from ..models.manifest import MANIFEST_NAME, changed_files, write_manifest

        if check:
            if not (folder / MANIFEST_NAME).is_file():
                raise FileNotFoundError(f"{str(folder)!r} has no {MANIFEST_NAME}: there is nothing to compare with")
            faults = changed_files(folder)
            if faults:
                raise ValueError("\n".join([f"{len(faults)} files of {str(folder)!r} differ:", *faults.values()]))
            typer.echo("every recorded file is as it was saved")
            return
        changed = write_manifest(folder)
        typer.echo("\n".join(f"recorded {name}" for name in changed) or "nothing has changed")


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
