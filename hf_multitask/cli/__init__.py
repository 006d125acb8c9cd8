"""The command line, `hf-multitask`."""

from . import training, models, analysis  # noqa: F401, I001  (each adds its commands; help lists them in this order)
from .app import main

__all__ = ["main"]
