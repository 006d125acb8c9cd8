"""The command line, `hf-multitask`."""

from . import training, models, analysis  # noqa: F401, I001  (each adds its commands; help lists them in this order)
from .app import app

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-multitask")
