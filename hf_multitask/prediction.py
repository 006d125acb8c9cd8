"""Raw text in, readable answers out: every task of a saved model from one pass of the encoder.

A [`Predictor`] is what `hf-multitask predict` and `pipeline("multi-task")` run. Answers by task type:

| type | answer |
|---|---|
| `single_label_classification` | `{"label": ..., "score": ...}` |
| `multi_label_classification` | `[{"label": ..., "score": ...}, ...]`, those above 0.5 |
| `regression` | a number, or `{name: number}` where the task names several values |
| `token_classification` | entities `[{"label", "text", "start", "end", "score"}, ...]` |
| `question_answering` | `{"answer", "start", "end", "score"}`; an empty answer from 0 to 0 where there is none |
| `multiple_choice` | `{"label", "choice", "score"}`, the number of the choice and its text |
| `causal_lm`, `seq2seq_lm` | `{"text"}`, what is written; `{"label", "score"}` where targets are a closed set |

Scores are probabilities in [0, 1], an entity's is that of its least certain word; `start` and `end` count characters
of the text (words, for input that is a list of words). Where tags are no BIO scheme, every word is listed. With
`top_k`, tasks that choose among labels or choices answer with a list of the k likeliest instead, best first, however
likely they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import CONFIG_NAME, logging

from .data.preprocessing import check_tokenizer, longest_input
from .generation import check_generation
from .models.auto import AutoModelForMultiTask
from .models.base import MultiTaskModel
from .models.configuration import MultiTaskConfig
from .models.manifest import changed_files, check_named
from .models.task import Task, TaskType, closest
from .prediction_answers import find_entities, text_answer
from .prediction_inputs import Reading, Text, check_options, read_input
from .prediction_windows import Window, cut_into_windows, mean_logits, run_windows, word_probabilities
from .row_prediction import predict_rows, reads_own_rows
from .text_prediction import predict_texts, writes

__all__ = ["Predictor", "load_model"]

logger = logging.get_logger(__name__)

# Batches whose texts are sorted by length together: of a stream one, so that answers come with the texts.
_SORTED_BATCHES = 16


def load_model(folder: str | Path) -> tuple[MultiTaskModel, Any]:
    """Load a model and its tokenizer from a folder or a Hub id.

    Raises:
        FileNotFoundError: It looks like a folder and there is none.
        ValueError: It is no multi-task model.
    """
    name = str(folder)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"model folder {name!r} does not exist")
    check_named(name, [CONFIG_NAME])
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, MultiTaskConfig):
        raise ValueError(f"{name!r} holds a {config.model_type!r} model, which is no multi-task model")
    return AutoModelForMultiTask.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def _warn_of_changes(tokenizer: Any) -> None:
    """Warn where a tokenizer's files are not those that were saved with the model: people may have changed them."""
    folder = str(getattr(tokenizer, "name_or_path", ""))
    if not os.path.isdir(folder):
        return
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    faults = changed_files(folder, [*names, *type(tokenizer).vocab_files_names.values()])
    if faults:
        logger.warning(
            f"the tokenizer in {folder!r} is not the one that was saved with the model, so predictions may differ: "
            f"{'; '.join(faults.values())}. If the change is meant, record it: hf-multitask manifest {folder}"
        )


class Predictor:
    """Predicts the tasks of a multi-task model for raw text.

    Args:
        model: The model.
        tokenizer: Its tokenizer, a fast one.
        max_length: Longest input in tokens; longer texts are cut or read in windows, contexts of questions read in
            windows in any case (default: what the model was trained on).

    Raises:
        ValueError: It is no multi-task model; the tokenizer is missing, belongs to another model, cannot pad or cannot
            tell where its tokens lie in the text; or all tasks are `masked_lm`, which has no answers.
    """

    def __init__(self, model: MultiTaskModel, tokenizer: Any, max_length: int | None = None) -> None:
        if not isinstance(model, MultiTaskModel):
            raise ValueError(
                f"{type(model).__name__} is no multi-task model; load one with AutoModelForMultiTask.from_pretrained"
            )
        if tokenizer is None:
            raise ValueError("there is no tokenizer: give the one that the model was trained with")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} has no offsets; a fast tokenizer is needed")
        check_tokenizer(tokenizer, model)
        check_options(max_length=(max_length, 1))
        _warn_of_changes(tokenizer)
        self.model = model.eval()
        self.tokenizer = tokenizer
        # Words that nobody hid are not looked for.
        able = [task for task in model.tasks if not task.auxiliary and task.type is not TaskType.MASKED_LM]
        self.tasks = {task.name: task for task in able}
        if not able:
            raise ValueError("none of the model's tasks says something about a text: they are masked_lm")
        self.max_length = longest_input(tokenizer, model, max_length or model.config.max_input_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Load model and tokenizer from a folder or a Hub id.

        Raises:
            FileNotFoundError: It looks like a folder and there is none.
            ValueError: It is no multi-task model, or the device is not known.
        """
        model, tokenizer = load_model(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = cast(Any, model).to(device)
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).splitlines() or ["it is not there"])[0]
            raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error
        return cls(model, tokenizer)

    def __call__(
        self,
        texts: Iterable[Text],
        tasks: Sequence[str] | None = None,
        batch_size: int = 32,
        *,
        stride: int | None = None,
        top_k: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield one dictionary of answers by task for each text.

        Texts of a list are checked before the first is predicted; a stream is read batch by batch. Where texts are cut,
        one message in the log tells how many.

        Args:
            texts: Strings; pairs of strings as a tuple (question and context); lists of words; texts and a list of
                choices as a tuple; rows with the tasks' columns; or rows of `text` and `text_pair`.
            tasks: Names of the tasks (default: all that can read the text and are not auxiliary).
            batch_size: Texts per pass of the encoder.
            stride: Read a text that is too long in windows that share so many tokens, and put the answers together
                (see [`hf_multitask.prediction_windows`]); by default its end is cut off. Of questions it takes the
                place of the task's own. Prompts and choices are cut as in training in any case.
            top_k: Return so many labels or choices with their scores, best first; more than there are gives all.
            generate_kwargs: Arguments of `generate` for tasks that write; they go before `Task(generation=...)`.

        Raises:
            ValueError: A task or an option is unknown or out of range, or a text is of no form that it can read.
        """
        if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
            raise ValueError(f"texts must be a list or another iterable of texts, got {texts!r}; put one into a list")
        check_options(batch_size=(batch_size, 1), stride=(stride, 0), top_k=(top_k, 1))
        chosen = self._choose(tasks, stride, generate_kwargs)
        readings: Iterator[list[Reading]] = (
            read_input(text, chosen, number, not tasks, self.max_length) for number, text in enumerate(texts)
        )
        if isinstance(texts, (list, tuple)):
            readings = iter(list(readings))
        size = batch_size * (_SORTED_BATCHES if isinstance(texts, Sized) else 1)
        names = [task.name for task in chosen]
        done, cut = 0, 0
        while part := list(islice(readings, size)):
            answers, lost = self._predict(part, done, batch_size, stride, top_k)
            done, cut = done + len(part), cut + lost
            for answer in answers:
                yield {name: answer[name] for name in names if name in answer}
        if cut:
            logger.warning(
                f"{cut} of {done} texts were cut to what their tasks read, at most {self.max_length} tokens; with "
                "stride=... they are read whole, in windows that share so many tokens"
            )

    def _choose(
        self, names: Sequence[str] | None, stride: int | None, generate_kwargs: Mapping[str, Any] | None
    ) -> list[Task]:
        """Return the tasks that are wanted, with what the call changes of them."""
        if isinstance(names, str):
            raise ValueError(f"tasks must be a list of names, got {names!r}; write [{names!r}]")
        for name in names or ():
            if name not in self.tasks:
                raise ValueError(f"no task {name!r}{closest(name, self.tasks)}; tasks are {', '.join(self.tasks)}")
        chosen = [self.tasks[name] for name in dict.fromkeys(names or self.tasks)]
        if generate_kwargs:
            if not any(map(writes, chosen)):
                raise ValueError(
                    f"generate_kwargs is for tasks that write, and none of {', '.join(t.name for t in chosen)} does"
                )
            chosen = [
                replace(task, generation={**(task.generation or {}), **generate_kwargs}) if writes(task) else task
                for task in chosen
            ]
            check_generation([task for task in chosen if writes(task)], False)
        if stride is not None:
            chosen = [
                replace(task, stride=stride) if task.type is TaskType.QUESTION_ANSWERING else task for task in chosen
            ]
        return chosen

    def _predict(
        self, inputs: Sequence[Sequence[Reading]], first: int, batch_size: int, stride: int | None, top_k: int | None
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the answers for some inputs, and how many of these were cut; `first` is the number of the first."""
        answers: list[dict[str, Any]] = [{} for _ in inputs]
        groups: dict[tuple, tuple[list[int], list[Reading]]] = {}
        for place, readings in enumerate(inputs):
            for one in readings:
                # What goes through tokenizer and encoder together has one form: single or pair, text or words.
                form = tuple(task.name for task in one.tasks), one.length, len(one.texts), isinstance(one.texts[0], str)
                places, members = groups.setdefault(form, ([], []))
                places.append(place)
                members.append(one)
        windows: dict[tuple, Window] = {}
        reads: list[tuple[int, Reading, list[Window]]] = []
        cut: set[int] = set()
        for places, members in groups.values():
            numbers = [first + place for place in places]
            texts = [one.texts for one in members]
            task, length = members[0].tasks[0], members[0].length
            if reads_own_rows(task):
                answer_rows = predict_texts if task.type.generates else predict_rows
                found = answer_rows(self.model, self.tokenizer, task, texts, numbers, length, batch_size, top_k)
                for place, answer in zip(places, found, strict=True):
                    answers[place][task.name] = answer
                continue
            parts = cut_into_windows(self.tokenizer, texts, length, stride, numbers)
            for place, one, own in zip(places, members, parts, strict=True):
                # Tasks with other columns or lengths may see the same tokens; these take one row.
                shared = [windows.setdefault((place, window.key), window) for window in own]
                for window in shared:
                    window.tasks.update((task.name, task) for task in one.tasks)
                reads.append((place, one, shared))
                if any(window.cut for window in own):
                    cut.add(place)
        run_windows(self.model, self.tokenizer, windows.values(), batch_size)
        for place, one, own in reads:
            for task in one.tasks:
                answers[place][task.name] = _answer(task, own, one.texts[0], top_k)
        return answers, len(cut)


def _answer(task: Task, windows: Sequence[Window], text: Any, top_k: int | None) -> Any:
    if task.type is TaskType.TOKEN_CLASSIFICATION:
        return find_entities(task, text, *word_probabilities(windows, text, task))
    return text_answer(task, mean_logits(windows, task.name), top_k)
