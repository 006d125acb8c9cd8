"""Are the verdicts of `compare` right? Synthetic pairs of tasks of which the truth is known, twenty times each.

    python recipes/benchmarks/comparison_truth.py [--repetitions 20] [--pairs helpful harmful unrelated] [--write]

Every word of a small language has hidden numbers, and a text's labels follow from the sums of its words' numbers. Three
pairs of tasks, each trained from scratch over some seeds by `hf_multitask.compare` with its defaults:

- helpful: `small` has 32 texts, too few to learn what the words mean; `large` has 3,000 texts whose score follows from
  the same numbers. Truth: `small` is better; `large`, which has nothing to learn from 32 texts, is equal.
- harmful: two tasks of eight labels each that follow from different numbers, over a backbone eight numbers wide, which
  is enough for one of them and not for both. Truth: both are worse. A backbone as small as this ends up in another
  place with every seed, so there are five of them: with three, some of the verdicts stay undecided.
- unrelated: two tasks that follow from different numbers, over a backbone wide enough for both. Truth: both are equal.

Each repetition draws a language, texts and labels anew, and its own seeds. A verdict counts as right only if it is the
truth: `undecided` is wrong here. A repetition is right if both of its verdicts are.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, write_result
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_multitask import compare
from hf_multitask.recipe import Recipe

WORDS, LENGTH, VALIDATION = 60, 6, 2000
CLEARLY = 1.0  # by how much the sum of a text's label exceeds all others
SUMS = 8  # hidden numbers of a word for each of two tasks
PAIRS: dict[str, dict[str, Any]] = {
    "helpful": {
        "truth": {"small": "better", "large": "equal"},
        "width": 32,
        "tasks": {"small": {"rows": 32, "labels": 2, "from": 0}, "large": {"rows": 3000, "labels": 1, "from": 0}},
        "training": {"max_steps": 120, "per_device_train_batch_size": 32, "learning_rate": 1e-2},
        "seeds": 3,
    },
    "harmful": {
        "truth": {"first": "worse", "second": "worse"},
        "width": 8,
        "tasks": {
            "first": {"rows": 3000, "labels": SUMS, "from": 0},
            "second": {"rows": 3000, "labels": SUMS, "from": SUMS},
        },
        "training": {"max_steps": 200, "per_device_train_batch_size": 64, "learning_rate": 2e-2},
        "seeds": 5,
    },
    "unrelated": {
        "truth": {"first": "equal", "second": "equal"},
        "width": 32,
        "tasks": {"first": {"rows": 3000, "labels": 2, "from": 0}, "second": {"rows": 3000, "labels": 2, "from": SUMS}},
        "training": {"max_steps": 200, "per_device_train_batch_size": 64, "learning_rate": 1e-2},
        "seeds": 3,
    },
}
TRAINING: dict[str, Any] = {"per_device_eval_batch_size": 500, "warmup_steps": 0.1, "use_cpu": True}


def write_backbone(folder: Path, width: int, seed: int) -> None:
    """Write a small encoder that has learned nothing, and its tokenizer."""
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=2 * width,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)


def write_rows(file: str, draw: np.random.Generator, meaning: np.ndarray, labels: int, rows: int) -> None:
    """Write texts with a label each: a sum for `labels` 1, its sign for 2, else the largest of that many sums."""
    texts = draw.integers(0, WORDS, (8 * rows, LENGTH))
    sums = meaning[texts].sum(1)
    if labels == 2:
        sums = np.stack([sums[:, 0], -sums[:, 0]], 1)
    if labels > 1:
        ordered = np.sort(sums[:, :labels], 1)
        clear = ordered[:, -1] - ordered[:, -2] > CLEARLY
        texts, sums = texts[clear], sums[clear]
    texts, sums = texts[:rows], sums[:rows]
    found = sums[:, 0].tolist() if labels == 1 else [f"l{i}" for i in sums[:, :labels].argmax(1)]
    lines = [" ".join(f"w{word}" for word in text) for text in texts]
    Dataset.from_dict({"text": lines, "label": found}).to_parquet(file)


def repeat(name: str, number: int, folder: Path) -> dict[str, Any]:
    """Draw one language with its tasks, compare, and return the verdicts beside the truth."""
    pair = PAIRS[name]
    draw = np.random.default_rng([list(PAIRS).index(name), number])
    meaning = draw.normal(size=(WORDS, 2 * SUMS))
    write_backbone(folder / "backbone", pair["width"], number)
    tasks = []
    for task, about in pair["tasks"].items():
        for split, rows in (("train", about["rows"]), ("validation", VALIDATION)):
            part = meaning[:, about["from"] : about["from"] + SUMS]
            write_rows(str(folder / f"{task}-{split}.parquet"), draw, part, about["labels"], rows)
        kind = "regression" if about["labels"] == 1 else "single_label_classification"
        dataset = str(folder / f"{task}-{{split}}.parquet")
        tasks.append({"name": task, "type": kind, "dataset": dataset, "head": "linear"})
    model = {"backbone": str(folder / "backbone"), "sharing": "hard", "head_dropout": 0.0}
    recipe = Recipe(name, model, tasks, {**TRAINING, **pair["training"], "output_dir": str(folder / "out")})
    seeds = range(pair["seeds"] * number, pair["seeds"] * (number + 1))
    found = compare(recipe, seeds=list(seeds), output=folder / "compared")
    return {
        "right": found.verdicts == pair["truth"],
        "deploy": found.deploy,
        "tasks": {
            task.task: {
                "verdict": task.verdict,
                "single": round(task.single, 4),
                "difference": round(task.difference, 4),
                "interval": [round(end, 4) for end in task.interval],
                "margin": round(task.margin, 4),
            }
            for task in found.tasks
        },
    }


def main() -> None:
    """Run the pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first repetition")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--write", action="store_true", help="write comparison_truth.json")
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    gc.freeze()  # what is loaded by now stays: looking through it before every run would take longer than the run
    result: dict[str, Any] = {}
    begin = time.time()
    for name in arguments.pairs:
        repetitions = []
        for number in range(arguments.first, arguments.first + arguments.repetitions):
            with tempfile.TemporaryDirectory() as folder:
                repetitions.append(repeat(name, number, Path(folder)))
            print(name, number, repetitions[-1], flush=True)
        verdicts = [task["verdict"] for one in repetitions for task in one["tasks"].values()]
        result[name] = {
            **PAIRS[name],
            "right": sum(one["right"] for one in repetitions),
            "of": len(repetitions),
            "undecided verdicts": verdicts.count("undecided"),
            "of verdicts": len(verdicts),
            "repetitions": repetitions,
        }
    result["seconds"] = round(time.time() - begin)
    write_result(__file__, result | {"training": TRAINING, "setting": describe()}, arguments.write)


if __name__ == "__main__":
    main()
