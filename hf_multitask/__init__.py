"""Multi-task learning in the Hugging Face ecosystem: one model, many tasks, a drop-in `Trainer`.

Importing the package registers its models with `AutoConfig` and `AutoModel`; everything else is loaded on first use.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .models.auto import AutoModelForMultiTask

__version__ = version("hf_multitask")

if TYPE_CHECKING:
    from .analysis.conflict import gradient_conflicts
    from .data.collator import DataCollatorForMultiTask
    from .models.hard_sharing import HardSharingConfig, HardSharingModel
    from .models.task import Task, TaskType
    from .trainer import MultiTaskSeq2SeqTrainer, MultiTaskTrainer, MultiTaskTrainerMixin
    from .training_args import MultiTaskSeq2SeqTrainingArguments, MultiTaskTrainingArguments

_HOMES = {
    "DataCollatorForMultiTask": "data.collator",
    "HardSharingConfig": "models.hard_sharing",
    "HardSharingModel": "models.hard_sharing",
    "MultiTaskSeq2SeqTrainer": "trainer",
    "MultiTaskSeq2SeqTrainingArguments": "training_args",
    "MultiTaskTrainer": "trainer",
    "MultiTaskTrainerMixin": "trainer",
    "MultiTaskTrainingArguments": "training_args",
    "Task": "models.task",
    "TaskType": "models.task",
    "gradient_conflicts": "analysis.conflict",
}

__all__ = [
    "AutoModelForMultiTask",
    "DataCollatorForMultiTask",
    "HardSharingConfig",
    "HardSharingModel",
    "MultiTaskSeq2SeqTrainer",
    "MultiTaskSeq2SeqTrainingArguments",
    "MultiTaskTrainer",
    "MultiTaskTrainerMixin",
    "MultiTaskTrainingArguments",
    "Task",
    "TaskType",
    "gradient_conflicts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
