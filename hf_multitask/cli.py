"""The command line, `hf-multitask`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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


class _SeveralValues(TyperCommand):
    """A command whose repeated options of numbers take several values at once: `--weights 0 0.1 0.2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write `--weights 0 0.1` as `--weights 0 --weights 0.1`."""
        repeated = {
            name for param in self.params if getattr(param, "multiple", False) for name in param.opts if name != "--set"
        }
        spread: list[str] = []
        option, is_first = "", False
        for arg in args:
            if arg.startswith("--"):
                option, is_first = arg.partition("=")[0], "=" not in arg
            elif not is_first and option in repeated and _is_number(arg):
                spread.append(option)
            else:
                option, is_first = option if is_first else "", False
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@app.command(cls=_SeveralValues)
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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeat for more."),
    ] = None,
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
    with _plain_errors():
        from accelerate import PartialState

        from .analysis.auxiliary import sweep_auxiliary
        from .analysis.sweep_result import check_picture

        if plot is not None:
            check_picture(plot)
        result = sweep_auxiliary(
            recipe,
            auxiliary,
            weights,
            seeds=seeds or None,
            settings=settings or [],
            output=output,
            primary=primary,
            say=lambda line: typer.echo(line, err=True),
        )
        if PartialState().is_main_process:
            typer.echo(str(result))
            if plot is not None:
                plot.parent.mkdir(parents=True, exist_ok=True)
                result.plot(plot)


class _SeveralWords(_SeveralValues):
    """A command whose options `--against` and `--critical` take several names at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write `--against uniform proportional` as `--against uniform --against proportional`; a file is no name."""
        spread: list[str] = []
        option, values = "", 0
        for arg in args:
            if arg.startswith("-"):
                option, values = arg.partition("=")[0], int("=" in arg)
            elif values and option in ("--against", "--critical") and not set("./") & set(arg):
                spread.append(option)
            values += not arg.startswith("-")
            spread.append(arg)
        return super().parse_args(ctx, spread)


@app.command(cls=_SeveralWords)
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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeat for more."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of runs and comparison.json; without it, runs/<recipe>-comparison.")
    ] = None,
) -> None:
    """Train a recipe and one single-task model for each task; tell whether multi-task training is worth it.

    Finished runs are kept: an interrupted comparison goes on when it is started again, a changed recipe trains again
    what the change reaches.
    """
    with _plain_errors():
        from datasets import disable_progress_bars
        from transformers.utils import logging

        from .analysis.comparison import compare as compare_recipe

        disable_progress_bars()
        logging.disable_progress_bar()
        result = compare_recipe(
            recipe,
            seeds=seeds or (0, 1, 2),
            settings=settings or [],
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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeat for more."),
    ] = None,
    budget_seconds: Annotated[float, typer.Option(help="Time for everything, in seconds.")] = 140.0,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write preflight.json and preflight.md into this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the page.")] = False,
) -> None:
    """Look at a recipe before its training: data, losses, sampling, memory, conflict, first steps, time.

    Exits with 1 if a finding is a failure.
    """
    with _plain_errors():
        from .analysis.preflight import preflight as look

        result = look(
            recipe,
            settings or [],
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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeat for more."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of grouping.json; without it, runs/<recipe>-grouping.")
    ] = None,
) -> None:
    """Train all tasks together once, and tell which to train together and which alone."""
    with _plain_errors():
        from .analysis.grouping_run import group_tasks

        options: dict[str, Any] = {"settings": settings or [], "output": output}
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
    with _plain_errors():
        from .analysis.report import write_report

        typer.echo(write_report(runs, output, say=lambda line: typer.echo(line, err=True)))


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
