"""Multi-task learning in the Hugging Face ecosystem: one model, many tasks, a drop-in `Trainer`.

Importing the package registers its models with `AutoConfig` and `AutoModel`, and its pipeline as "multi-task";
everything else is loaded on first use.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers.pipelines import PIPELINE_REGISTRY

from .models.auto import AutoModelForMultiTask

__version__ = version("hf_multitask")

# By its path, as Transformers names its own: `register_pipeline` would have to load the class, and would make
# `save_pretrained` ask for `trust_remote_code` when the pipeline is loaded again.
PIPELINE_REGISTRY.supported_tasks["multi-task"] = {
    "impl": f"{__name__}.hub.pipeline.MultiTaskPipeline",
    "pt": (AutoModelForMultiTask,),
    "type": "text",
}

if TYPE_CHECKING:
    from .analysis.advisor import advise
    from .analysis.comparison import compare
    from .analysis.conflict import gradient_conflicts
    from .analysis.grouping_run import group_tasks
    from .analysis.preflight import preflight
    from .analysis.routing import routing
    from .data.collator import DataCollatorForMultiTask
    from .models.adapter import AdapterConfig, AdapterModel
    from .models.conditioned import ConditionedConfig, ConditionedModel
    from .models.hard_sharing import HardSharingConfig, HardSharingModel
    from .models.mixture_of_experts import MixtureOfExpertsConfig, MixtureOfExpertsModel
    from .models.prefix import PrefixConfig, PrefixModel
    from .models.soft_sharing import SoftSharingConfig, SoftSharingModel
    from .models.task import Task, TaskType
    from .trainer import MultiTaskSeq2SeqTrainer, MultiTaskTrainer, MultiTaskTrainerMixin
    from .training_args import MultiTaskSeq2SeqTrainingArguments, MultiTaskTrainingArguments

_HOMES = {
    "AdapterConfig": "models.adapter",
    "AdapterModel": "models.adapter",
    "ConditionedConfig": "models.conditioned",
    "ConditionedModel": "models.conditioned",
    "DataCollatorForMultiTask": "data.collator",
    "HardSharingConfig": "models.hard_sharing",
    "HardSharingModel": "models.hard_sharing",
    "MixtureOfExpertsConfig": "models.mixture_of_experts",
    "MixtureOfExpertsModel": "models.mixture_of_experts",
    "MultiTaskSeq2SeqTrainer": "trainer",
    "MultiTaskSeq2SeqTrainingArguments": "training_args",
    "MultiTaskTrainer": "trainer",
    "MultiTaskTrainerMixin": "trainer",
    "MultiTaskTrainingArguments": "training_args",
    "PrefixConfig": "models.prefix",
    "PrefixModel": "models.prefix",
    "SoftSharingConfig": "models.soft_sharing",
    "SoftSharingModel": "models.soft_sharing",
    "Task": "models.task",
    "TaskType": "models.task",
    "advise": "analysis.advisor",
    "compare": "analysis.comparison",
    "gradient_conflicts": "analysis.conflict",
    "group_tasks": "analysis.grouping_run",
    "preflight": "analysis.preflight",
    "routing": "analysis.routing",
}

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "AutoModelForMultiTask",
    "ConditionedConfig",
    "ConditionedModel",
    "DataCollatorForMultiTask",
    "HardSharingConfig",
    "HardSharingModel",
    "MixtureOfExpertsConfig",
    "MixtureOfExpertsModel",
    "MultiTaskSeq2SeqTrainer",
    "MultiTaskSeq2SeqTrainingArguments",
    "MultiTaskTrainer",
    "MultiTaskTrainerMixin",
    "MultiTaskTrainingArguments",
    "PrefixConfig",
    "PrefixModel",
    "SoftSharingConfig",
    "SoftSharingModel",
    "Task",
    "TaskType",
    "advise",
    "compare",
    "gradient_conflicts",
    "group_tasks",
    "preflight",
    "routing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
