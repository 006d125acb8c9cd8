"""Commands that train a recipe: `train`, `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Settings, SeveralValues, TrustRemoteCode, app, plain_errors

__all__ = ["sweep", "train"]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint of this run in the output folder.")
    ] = False,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changes",
            metavar="NAME",
            help="With --resume, a training argument that may differ from the checkpoint's, such as learning_rate; "
            "may be given several times.",
        ),
    ] = None,
) -> None:
    """Train a recipe's model; write it, its metrics and results.json to the output folder."""
    with plain_errors():
        from ..running import run_recipe

        options: dict[str, Any] = {"allow_changes": allow_changes or [], "trust_remote_code": trust_remote_code}
        if table := run_recipe(recipe, settings or [], resume=resume, **options):
            typer.echo(table)


@app.command(cls=SeveralValues)
def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    auxiliary: Annotated[str, typer.Option(metavar="TASK", help="The auxiliary task whose weight is varied.")],
    weights: Annotated[
        list[float], typer.Option(metavar="WEIGHT...", help="Its weights, 0 among them: --weights 0 0.1 0.2 0.3")
    ],
    seeds: Annotated[
        list[int] | None,
        typer.Option(metavar="SEED...", help="Train with each of these seeds; without it, with the recipe's alone."),
    ] = None,
    primary: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="The task whose metric counts; without it, the recipe's primary_task, or the mean over the tasks.",
        ),
    ] = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs and of sweep.json; without it, runs/<recipe>-sweep.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the metrics over the weights (.svg, .png, .pdf).")
    ] = None,
) -> None:
    """Train a recipe once for each weight of an auxiliary task; tell where it saturates, and where it harms.

    An interrupted sweep goes on when it is started again; runs whose settings have changed are made anew.
    """
    with plain_errors():
        from accelerate import PartialState

        from ..analysis.auxiliary import sweep_auxiliary
        from ..analysis.sweep_result import check_picture

        if plot is not None:
            check_picture(plot)
        result = sweep_auxiliary(
            recipe,
            auxiliary,
            weights,
            seeds=seeds or None,
            settings=settings or [],
            trust_remote_code=trust_remote_code,
            output=output,
            primary=primary,
            say=lambda line: typer.echo(line, err=True),
        )
        if PartialState().is_main_process:
            typer.echo(str(result))
            if plot is not None:
                plot.parent.mkdir(parents=True, exist_ok=True)
                result.plot(plot)
