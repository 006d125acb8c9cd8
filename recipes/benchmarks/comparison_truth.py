"""Are the verdicts of `compare` right? Synthetic pairs of tasks of which the truth is known, twenty times each.

    python recipes/benchmarks/comparison_truth.py [--repetitions 20] [--pairs helpful harmful unrelated] [--write]

Every word of a small language has hidden numbers, and what is to be predicted of a text are sums of its words' numbers,
or their signs. Three pairs of tasks, each trained from scratch over three seeds by `hf_multitask.compare` with its
defaults:

- helpful: `small` has 32 texts with the sign of a sum, too few to learn what the words mean; `large` has 3,000 texts
  with the sum itself. Truth: `small` is better; `large`, which has nothing to learn from 32 texts, is equal.
- harmful: each task has 3,000 texts with 32 sums of its own, over a backbone 32 numbers wide, which is enough for one
  of them and not for both (80 would be: with them multi-task training loses less than 0.01). Truth: both are worse.
- unrelated: each task has 3,000 texts with the sign of a sum of its own, for which the same backbone is wide enough.
  Truth: both are equal.

Settings were chosen on repetitions 0 to 5. With twice the learning rate one seed in a few fails to learn a task, alone
or not, and the verdict is `undecided`, as it should be; of `unrelated`, repetitions 200 to 204 showed that (4 of 5
right): the run was stopped, its rate halved too, and it began anew at 300. The others begin at 200.

Each repetition draws a language and texts anew, and its own seeds. A verdict counts as right only if it is the truth:
`undecided` is wrong here. A repetition is right if both of its verdicts are.
"""

from __future__ import annotations

import argparse
import gc
import json
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
CLEARLY = 0.5  # how far from 0 a sum is whose sign is to be predicted
SUMS = 32
PAIRS: dict[str, dict[str, Any]] = {
    "helpful": {
        "truth": {"small": "better", "large": "equal"},
        "width": 32,
        "tasks": {"small": {"rows": 32, "signs": True, "sums": [0]}, "large": {"rows": 3000, "sums": [0]}},
        "training": {"max_steps": 200, "per_device_train_batch_size": 32, "learning_rate": 5e-3},
    },
    "harmful": {
        "truth": {"first": "worse", "second": "worse"},
        "width": SUMS,
        "tasks": {
            "first": {"rows": 3000, "sums": list(range(SUMS))},
            "second": {"rows": 3000, "sums": list(range(SUMS, 2 * SUMS))},
        },
        "training": {"max_steps": 150, "per_device_train_batch_size": 64, "learning_rate": 2e-2},
    },
    "unrelated": {
        "truth": {"first": "equal", "second": "equal"},
        "width": 32,
        "tasks": {
            "first": {"rows": 3000, "signs": True, "sums": [0]},
            "second": {"rows": 3000, "signs": True, "sums": [SUMS]},
        },
        "training": {"max_steps": 250, "per_device_train_batch_size": 64, "learning_rate": 5e-3},
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


def write_rows(file: str, draw: np.random.Generator, meaning: np.ndarray, signs: bool, rows: int) -> None:
    """Write texts with the sums of their words' numbers, or with the sign of the only sum."""
    texts = draw.integers(0, WORDS, (2 * rows, LENGTH))
    sums = meaning[texts].sum(1)
    if signs:
        clear = np.abs(sums[:, 0]) > CLEARLY
        texts, sums = texts[clear], sums[clear]
    texts, sums = texts[:rows], sums[:rows]
    lines = [" ".join(f"w{word}" for word in text) for text in texts]
    labels = ["up" if value > 0 else "down" for value in sums[:, 0]] if signs else sums.tolist()
    Dataset.from_dict({"text": lines, "label": labels}).to_parquet(file)


def repeat(name: str, number: int, folder: Path) -> dict[str, Any]:
    """Draw one language with its tasks, compare, and return the verdicts beside the truth."""
    pair = PAIRS[name]
    draw = np.random.default_rng([list(PAIRS).index(name), number])
    meaning = draw.normal(size=(WORDS, 2 * SUMS))
    write_backbone(folder / "backbone", pair["width"], number)
    tasks = []
    for task, about in pair["tasks"].items():
        signs = about.get("signs", False)
        for split, rows in (("train", about["rows"]), ("validation", VALIDATION)):
            write_rows(str(folder / f"{task}-{split}.parquet"), draw, meaning[:, about["sums"]], signs, rows)
        kind: dict[str, Any] = {"type": "single_label_classification"}
        if not signs:
            kind = {"type": "regression", "labels": [f"sum{number}" for number in about["sums"]]}
        dataset = str(folder / f"{task}-{{split}}.parquet")
        tasks.append({"name": task, **kind, "dataset": dataset, "head": "linear"})
    model = {"backbone": str(folder / "backbone"), "sharing": "hard", "head_dropout": 0.0}
    recipe = Recipe(name, model, tasks, {**TRAINING, **pair["training"], "output_dir": str(folder / "out")})
    found = compare(recipe, seeds=[3 * number, 3 * number + 1, 3 * number + 2], output=folder / "compared")
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
    parser.add_argument("--first", type=int, default=200, help="number of the first repetition")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--write", action="store_true", help="write comparison_truth.json")
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    gc.freeze()  # what is loaded by now stays: looking through it before every run would take longer than the run
    known = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}  # of pairs that are left out
    for name in arguments.pairs:
        repetitions, begin = [], time.time()
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
            "first": arguments.first,
            "seconds": round(time.time() - begin),
            "repetitions": repetitions,
        }
        write_result(__file__, result | {"training": TRAINING, "setting": describe()}, arguments.write)


if __name__ == "__main__":
    main()
