"""The part of the trainer that pushes: the whole model at every `hub_strategy`, with a card of its own.

`Trainer` copies the flat files of a checkpoint into the output folder before it pushes them; the parts of tasks, which
lie in folders, go along here. A push in the background that failed is told of, where `Trainer` is silent. What is
published holds no name of a folder of this machine: a frozen backbone that came from one is saved with the model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..models.manifest import record_copies
from ..models.task import Task
from .card_sources import facts_of_trainer
from .code import CODE_FOLDER, write_code
from .model_card import make_model_card
from .push import readable_errors
from .push_files import is_local_folder

__all__ = ["MultiTaskPushing"]

logger = logging.get_logger(__name__)

# What a checkpoint has and a model has not, and what `Trainer` writes anew.
_ONLY_HERE = (
    *("trainer_state.json", "multitask_state.json", "streams_*", "rng_state*", "optimizer*", "scheduler.pt"),
    *("scaler.pt", "pytorch_model*", "global_step*", "training_args.bin", "*.distcp", "*/.metadata"),
    *("latest", "zero_to_fp32.py"),
)
_PART_FOLDERS = ("adapters", "shared_adapter", CODE_FOLDER)


class MultiTaskPushing(Trainer):
    """The part of [`MultiTaskTrainer`] that pushes to the Hub and writes the model card."""

    args: Any
    tasks: list[Task]
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, as `Trainer` does."""
        if not self.tasks:
            return super().init_hf_repo(token, private)
        config = self.accelerator.unwrap_model(self.model).config
        if is_local_folder(getattr(config, "backbone_name", None)):
            logger.warning(
                f"the backbone came from the folder {config.backbone_name!r}, where nobody else finds it: it is saved "
                "and pushed with the model"
            )
            config.backbone_name = None
        if is_local_folder(getattr(config.backbone_config, "_name_or_path", None)):
            config.backbone_config._name_or_path = ""
        with readable_errors(self._repo_name(), constants.ENDPOINT):
            super().init_hf_repo(token, private)

    def _repo_name(self) -> str:
        return str(self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name)

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **kwargs: Any) -> Any:
        """Save and push the model, its tokenizer and a model card; arguments and result are those of `Trainer`."""
        if not self.tasks:
            return super().push_to_hub(commit_message, *args, **kwargs)
        with readable_errors(self._repo_name(), constants.ENDPOINT):
            return super().push_to_hub(commit_message, *args, **kwargs)

    def create_model_card(
        self,
        language: Any = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: Any = None,
        dataset_args: Any = None,
    ) -> None:
        """Write `README.md` into the output folder, of what the trainer knows (see [`hf_multitask.hub.model_card`]).

        Args:
            language: Language or languages of the texts.
            license: The model's licence.
            tags: Further tags.
            model_name: The model's name (default: that of the repository, or of the output folder).
            finetuned_from: Hub id of the backbone (default: what it was loaded from).
            tasks: Not used with a multi-task model, whose tasks have datasets and metrics of their own; nor are the
                following.
            dataset_tags: Not used.
            dataset: Not used.
            dataset_args: Not used.
        """
        if not self.tasks:
            return super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        if not self.is_world_process_zero():
            return None
        unused = {"tasks": tasks, "dataset_tags": dataset_tags, "dataset": dataset, "dataset_args": dataset_args}
        if given := [name for name, value in unused.items() if value is not None]:
            logger.warning(f"the model card has each task with its own dataset; {', '.join(given)} are not used")
        facts = facts_of_trainer(self, model_name)
        facts.languages = [language] if isinstance(language, str) else list(language or facts.languages)
        facts.license = license
        facts.tags = [tags] if isinstance(tags, str) else list(tags or ())
        facts.backbone = finetuned_from or facts.backbone
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(make_model_card(facts), encoding="utf-8")
        return None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model as `Trainer` does, and the modelling code if it was asked for."""
        super()._save(output_dir, state_dict)
        if self.tasks and self.args.hub_include_code:
            write_code(output_dir if output_dir is not None else self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what a checkpoint holds, the parts of tasks among it, and a model card."""
        if self.tasks and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            running = self.push_in_progress is not None and not self.push_in_progress.is_done()
            if self.args.hub_always_push or not running:
                self._tell_of_failed_pushes()
                record_copies(checkpoint_folder, self.args.output_dir, _ONLY_HERE)
                if Path(checkpoint_folder, SAFE_WEIGHTS_INDEX_NAME).is_file():  # else the older file would be loaded
                    Path(self.args.output_dir, SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
                for name in _PART_FOLDERS:
                    if Path(checkpoint_folder, name).is_dir():
                        shutil.copytree(
                            Path(checkpoint_folder, name), Path(self.args.output_dir, name), dirs_exist_ok=True
                        )
                self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Wait for pushes in the background, and tell if one failed."""
        super()._finish_current_push()
        if self.tasks:
            self._tell_of_failed_pushes()

    def _tell_of_failed_pushes(self) -> None:
        pushing = getattr(self, "push_in_progress", None)
        jobs = [] if pushing is None else pushing.jobs
        for job in list(jobs):
            if job.done() and job.exception() is not None:
                jobs.remove(job)
                try:
                    with readable_errors(self._repo_name(), constants.ENDPOINT):
                        raise job.exception()
                except Exception as error:
                    logger.warning(f"a push in the background failed, training goes on: {error}")
