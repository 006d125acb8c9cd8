"""What all commands share: the application, how errors are shown, and options that take several values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["Settings", "SeveralValues", "SeveralWords", "TrustRemoteCode", "app", "main", "plain_errors"]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeat for more."),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow code from elsewhere: a model's own from the Hub, kernels."),
]

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
def commands() -> None:
    """Keep `train` and `predict` as commands of their own."""


@contextmanager
def plain_errors() -> Iterator[None]:
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


class SeveralValues(TyperCommand):
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


class SeveralWords(SeveralValues):
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


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-multitask")
