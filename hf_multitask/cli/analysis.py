"""Commands that tell whether to train on many tasks, and how: `preflight`, `compare`, `group`, `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Settings, SeveralWords, TrustRemoteCode, app, plain_errors

__all__ = ["compare", "group", "preflight", "report"]


@app.command(cls=SeveralWords)
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; name it first.")],
    seeds: Annotated[
        list[int] | None, typer.Option(metavar="SEED...", help="Seeds of all runs: --seeds 0 1 2, the default.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MIXING...", help="Run these mixings as well: --against uniform proportional"),
    ] = None,
    critical: Annotated[
        list[str] | None, typer.Option(metavar="TASK...", help="Tasks that must not lose; without it, all.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Differences up to this part of a metric do not matter.")] = 0.02,
    resamples: Annotated[int, typer.Option(help="Draws of the validation rows.")] = 1000,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of runs and comparison.json; without it, runs/<recipe>-comparison.")
    ] = None,
) -> None:
    """Train a recipe and one single-task model for each task; tell whether multi-task training is worth it.

    Finished runs are kept: an interrupted comparison goes on when it is started again, a changed recipe trains again
    what the change reaches.
    """
    with plain_errors():
        from datasets import disable_progress_bars
        from transformers.utils import logging

        from ..analysis.comparison import compare as compare_recipe

        disable_progress_bars()
        logging.disable_progress_bar()
        result = compare_recipe(
            recipe,
            seeds=seeds or (0, 1, 2),
            settings=settings or [],
            trust_remote_code=trust_remote_code,
            output=output,
            against=against or [],
            critical_tasks=critical or None,
            margin=margin,
            resamples=resamples,
            say=lambda line: typer.echo(line, err=True),
        )
        typer.echo(str(result))


@app.command()
def preflight(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    budget_seconds: Annotated[float, typer.Option(help="Time for everything, in seconds.")] = 140.0,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write preflight.json and preflight.md into this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the page.")] = False,
) -> None:
    """Look at a recipe before its training: data, losses, sampling, memory, conflict, first steps, time.

    Exits with 1 if a finding is a failure.
    """
    with plain_errors():
        from ..analysis.preflight import preflight as look

        result = look(
            recipe,
            settings or [],
            trust_remote_code=trust_remote_code,
            budget_seconds=budget_seconds,
            output=output,
            progress=lambda section: typer.echo(f"{section} ...", err=True),
        )
        typer.echo(json.dumps(result.to_dict(), indent=1, ensure_ascii=False) if as_json else result.text())
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def group(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    groups: Annotated[int, typer.Option(metavar="G", help="The most groups, each of which is a model.")] = 2,
    method: Annotated[str, typer.Option(help="affinity (losses after steps), or conflict (cosines).")] = "affinity",
    steps: Annotated[int | None, typer.Option(help="Steps to train; without it, the recipe's.")] = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of grouping.json; without it, runs/<recipe>-grouping.")
    ] = None,
) -> None:
    """Train all tasks together once, and tell which to train together and which alone."""
    with plain_errors():
        from ..analysis.grouping_run import group_tasks

        options: dict[str, Any] = {"settings": settings or [], "output": output, "trust_remote_code": trust_remote_code}
        options["say"] = lambda line: typer.echo(line, err=True)
        typer.echo(str(group_tasks(recipe, groups, method=method, steps=steps, **options)))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, comparisons, preflights, sweeps.")
    ],
    output: Annotated[Path, typer.Option(help="The HTML page; one in Markdown is written beside it.")] = Path(
        "report.html"
    ),
) -> None:
    """Make a page of one run or several: metrics against baselines, curves, conflicts, routing, cost."""
    with plain_errors():
        from ..analysis.report import write_report

        typer.echo(write_report(runs, output, say=lambda line: typer.echo(line, err=True)))
