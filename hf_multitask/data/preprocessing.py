"""Text and labels → model inputs.

A source ([`hf_multitask.data.sources.Source`]) is what some tasks read together. Its rows are tokenized once, travel
once and go through the encoder once, however many tasks read them. Prepared, it is a `datasets.Dataset` with the
columns `input_ids`, `token_type_ids` where they say something, and `labels_<task>` for each task. Preparing goes
through `Dataset.map`, so it is cached on disk by content and can use several processes.
"""

from __future__ import annotations

from typing import Any, cast

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.backbone import usable_positions
from ..models.heads import IGNORE_INDEX
from ..models.scheme import SharingScheme
from ..models.task import TaskType
from .all_rows import make_row_encoder
from .labels import LabelError
from .packing import keeps_rows_apart
from .row_encoding import Labels, RowEncoder
from .sources import Source, label_key

__all__ = [
    "check_added_tokens",
    "check_held_out",
    "check_packing",
    "check_something_left",
    "check_tokenizer",
    "longest_input",
    "prepare",
]

logger = logging.get_logger(__name__)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> None:
    """Check that a tokenizer fits a model.

    Raises:
        ValueError: There is none, it has no pad token, or it has more tokens than the model has embeddings.
    """
    if tokenizer is None:
        raise ValueError("processing_class is missing: pass the backbone's tokenizer, it knows how to pad")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no pad token; set one before training, for example "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
    embeddings = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the backbone embeddings for {embeddings}: they do not belong "
            "together, or tokens were added; then call model.resize_token_embeddings(len(tokenizer))"
        )


def check_added_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Check that tokens which were added to a tokenizer are trained, unless the backbone knows them.

    `resize_token_embeddings` gives a new token the mean of all rows, save a trifle; a row that is still there has never
    been trained, and under frozen embeddings it never will be.

    Raises:
        ValueError: The sharing scheme freezes the embeddings of such tokens. Where the user froze them, it is a warning
            in the log: they may come loose later.
    """
    table = cast(Tensor, model.get_input_embeddings().weight)
    added = {i: token for token, i in tokenizer.get_added_vocab().items() if tokenizer.vocab_size <= i < len(table)}
    if not added or table.requires_grad:
        return
    new: list[str] = []
    with torch.no_grad():
        first = min(added)
        known = table[:first].float()
        total, count = known.sum(0), first
        typical = (known[:: max(first // 1000, 1)] - known.mean(0)).norm(dim=-1).median()
        for number in range(first, max(added) + 1):  # the first ones may be rows that the backbone had to spare
            row = table[number].float()
            if number in added and (row - total / count).norm() < 1e-3 * typical:
                new.append(added[number])
            else:
                total, count = total + row, count + 1
    if not new:
        return
    what = (
        f"the tokenizer has {len(new)} added token(s) that the backbone never saw, such as {new[0]!r}, and the "
        "embeddings are frozen: these would stay untrained; train the embeddings too, "
        "model.get_input_embeddings().weight.requires_grad_(True), or take a sharing scheme that trains the backbone"
    )
    if getattr(model, "freezes_backbone", False):
        raise ValueError(what)
    logger.warning(what)


def check_packing(model: Any, packing: bool) -> None:
    """Check that short rows can stand together in long sequences.

    Raises:
        ValueError: No task is one over whole texts, or the model cannot keep apart what stands in one sequence.
    """
    if not packing:
        return
    if not any(task.type is TaskType.CAUSAL_LM for task in model.tasks):
        raise ValueError("packing=True is for causal_lm tasks, and there is none: other rows are not packed")
    if not model.supports_packing:
        raise ValueError(
            f"packing=True does not go with {type(model).__name__}, which cannot keep the rows of a sequence apart; "
            "use hard sharing, soft sharing or adapters, or leave packing out"
        )
    if not keeps_rows_apart(model):
        raise ValueError(
            f"packing=True does not go with backbone {model.config.backbone_config.model_type!r}, whose attention does "
            "not keep apart the texts of a sequence by their positions; leave packing out, or take another backbone"
        )


def check_held_out(model: Any) -> None:
    """Check that tasks that are held out have nothing of their own, which would stay untrained.

    Raises:
        ValueError: The sharing scheme gives each task parameters that it computes with from the beginning.
    """
    held_out = [task.name for task in model.tasks if task.held_out]
    if held_out and not model.untrained_tasks_are_plain:
        raise ValueError(
            f"held_out tasks ({', '.join(held_out)}) do not go with {type(model).__name__}, where each task computes "
            "with parameters of its own, which nothing would train; use hard sharing, or adapters with a shared one"
        )


def longest_input(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int | None = None, whose: str = ""
) -> int:
    """Return the longest input in tokens: `max_length`, or what tokenizer and backbone allow.

    Args:
        tokenizer: The backbone's tokenizer.
        model: The model.
        max_length: The length that was asked for.
        whose: Whose it is, for messages.

    Raises:
        ValueError: `max_length` exceeds the backbone's positions.
    """
    positions = usable_positions(model)
    if positions is not None and isinstance(model, SharingScheme):
        positions -= model.reserved_positions
    if max_length is not None:
        if positions is not None and max_length > positions:
            raise ValueError(f"{whose}max_length={max_length} exceeds the backbone's {positions} positions")
        return max_length
    # Tokenizers without a limit of their own say 10^30.
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit is not None and limit < 10**9]
    return min(limits, default=512)


def prepare(
    dataset: Dataset,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    split: str = "train",
    num_proc: int | None = None,
    labels: bool | None = True,
    seed: int = 0,
) -> Dataset:
    """Return a source's rows as model inputs and encoded labels; the given dataset stays as it is.

    Args:
        dataset: Rows of text and labels, or already tokenized (a column `input_ids`).
        source: The tasks that read them.
        tokenizer: The backbone's tokenizer.
        max_length: Longest input in tokens, where the tasks set none; longer ones are truncated.
        split: Name of the split, for messages.
        num_proc: Number of processes.
        labels: Whether the label columns must be there; None takes those that are, and leaves out, with a message in
            the log, those of tasks whose labels cannot be used (-1, None or NaN in a split to be predicted).
        seed: Seed of which of several prompts a row gets.

    Raises:
        TypeError: It is not a `datasets.Dataset`.
        ValueError: The dataset is empty, a column is missing, a text or a label is bad, or nothing of any row is
            left after truncation. The message names dataset, split, column and row.
    """
    where = f"dataset {source.dataset!r} ({split})"
    if isinstance(dataset, IterableDataset):
        dataset = read_stream(dataset)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{where} must be a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{where} has no rows")
    if dataset.format["type"] == "custom":
        raise ValueError(f"{where} has a transform, which would be passed over; apply it with .map(...)")
    dataset = dataset.with_format(None)
    if labels is not None:
        return _prepare(dataset, source, tokenizer, max_length, split, num_proc, labels, seed)
    wanted = frozenset(task.name for task in source.tasks)
    while True:
        try:
            return _prepare(dataset, source, tokenizer, max_length, split, num_proc, wanted, seed)
        except LabelError as error:
            if error.task not in wanted:
                raise
            wanted -= {error.task}
            logger.warning(f"{error}; {error.task!r} is predicted without labels, and so without metrics")


def _prepare(
    dataset: Dataset,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    split: str,
    num_proc: int | None,
    labels: Labels,
    seed: int,
) -> Dataset:
    where = f"dataset {source.dataset!r} ({split})"
    try:
        encoder = make_row_encoder(dataset.features, source, tokenizer, max_length, labels, seed)
        prepared = dataset.map(
            encoder,
            with_indices=True,
            batched=True,
            remove_columns=dataset.column_names,
            features=encoder.features,
            num_proc=num_proc if len(dataset) >= 1000 else None,
            new_fingerprint=encoder.fingerprint(dataset),
            desc=f"Preparing {source.name} ({split})",
        )
        check_something_left(prepared.data, encoder)
        encoder.check(prepared.data)
    except LabelError as error:
        hint = "; to evaluate, rows need labels; to predict, they do not" if labels is True and split != "train" else ""
        raise LabelError(f"{where}: {error}{hint}", error.task) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return prepared


def read_stream(dataset: IterableDataset) -> Dataset:
    """Return all rows of a stream as a dataset in memory: what is evaluated must have an end."""
    parts = []
    features = dataset.features
    for batch in dataset.with_format(None).iter(batch_size=1000):
        parts.append(Dataset.from_dict(batch, features=features))
        features = parts[0].features
    return concatenate_datasets(parts) if parts else Dataset.from_dict({})


def check_something_left(rows: Any, encoder: RowEncoder) -> None:
    """Raise a `ValueError` unless a row of a prepared table has a token, and, for tasks that label words, a label."""
    length = encoder.max_length
    lengths = pc.list_value_length(rows.column("input_ids"))
    if pc.max(lengths).as_py() <= encoder.special_tokens:
        raise ValueError(f"no row has a token left at max_length={length} (or all texts are empty)")
    for task in encoder.labelled:
        if task.type is TaskType.TOKEN_CLASSIFICATION:
            labels = pc.list_flatten(rows.column(label_key(task.name)))
            if not pc.any(pc.not_equal(labels, IGNORE_INDEX)).as_py():
                raise LabelError(
                    f"task {task.name!r}: no row has a labelled word left at max_length={length} (or all labels are "
                    f"{IGNORE_INDEX})",
                    task.name,
                )
