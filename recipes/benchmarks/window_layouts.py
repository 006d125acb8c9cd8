"""How far apart the weights end up when the same rows per optimizer step are cut in many ways.

    python recipes/benchmarks/window_layouts.py [--write]

MiniLM with a row-level and a token-level task, 32 rows per step, three steps of SGD without dropout, float32. Each
layout is (rows of a micro-batch, accumulated micro-batches, processes); the difference is the largest one in any
tensor, relative to that tensor's largest weight, against the first layout of its composition.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

LAYOUTS = {
    "mixed": [(32, 1, 1), (16, 2, 1), (4, 8, 1), (1, 32, 1), (16, 1, 2), (4, 4, 2), (2, 8, 2)],
    # All rows of a micro-batch come from one dataset: layouts with micro-batches of one size have the same windows.
    "single_task": [(4, 8, 1), (4, 4, 2)],
}
STEPS = 3


def worker(out: str, composition: str, reduction: str, rows: int, accumulation: int) -> None:
    """Train in one layout and save the weights."""
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, set_seed

    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
    from hf_multitask.data.labels import infer_labels
    from hf_multitask.quickstart import backbone_folder, dataset_files

    disable_progress_bars()
    datasets = {
        name: load_dataset("parquet", data_files=dataset_files(name), split="train[:400]")
        for name in ("vader", "wnut16")
    }
    tags = infer_labels(datasets["wnut16"], "ner_tags")
    set_seed(0)
    model = HardSharingModel.from_backbone(
        backbone_folder(),
        [
            Task("valence", "regression", dataset="vader", label_column="valence"),
            Task("entities", "token_classification", labels=tags, dataset="wnut16", label_column="ner_tags"),
        ],
        head_dropout=0.0,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = MultiTaskTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        batch_composition=composition,
        loss_reduction=reduction,
        learning_rate=0.1,
        optim="sgd",
        max_length=48,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = MultiTaskTrainer(
        model, args, train_dataset=datasets, processing_class=AutoTokenizer.from_pretrained(backbone_folder())
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, out)
    trainer.end()


def run(out: Path, composition: str, reduction: str, layout: tuple[int, int, int]) -> dict:
    """Start the processes of one layout and return the weights."""
    import torch

    rows, accumulation, processes = layout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--worker", str(out), composition, reduction, str(rows), str(accumulation)]
    extra = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if processes > 1 else {}
    environment = os.environ | {"OMP_NUM_THREADS": "1" if processes > 1 else "2", "CUDA_VISIBLE_DEVICES": ""} | extra
    runs = [
        subprocess.Popen(
            command,
            env=environment | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if extra else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate()[0] for process in runs]
    if any(process.returncode for process in runs):
        raise SystemExit("\n".join(outputs)[-4000:])
    return torch.load(out, weights_only=True)


def main() -> None:
    """Measure all layouts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write window_layouts.json")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        out, composition, reduction, rows, accumulation = arguments.worker
        return worker(out, composition, reduction, int(rows), int(accumulation))

    from common import describe, write_result

    out = Path(tempfile.mkdtemp(), "weights.pt")
    table = []
    for composition, layouts in LAYOUTS.items():
        for reduction in ("rows", "tasks") if composition == "mixed" else ("rows",):
            reference = run(out, composition, reduction, layouts[0])
            for layout in layouts[1:] if reduction == "rows" else [layouts[2], layouts[5]]:
                weights = run(out, composition, reduction, layout)
                worst = max(
                    ((weights[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
                    for name, value in reference.items()
                )
                row = dict(zip(("rows", "accumulation", "processes"), layout, strict=True))
                row |= {"composition": composition, "reduction": reduction, "against": layouts[0]}
                table.append(row | {"largest relative difference": worst})
                print(table[-1], flush=True)
    largest = max(row["largest relative difference"] for row in table)
    result = {
        "largest relative difference": largest,
        "bound": 1e-5,
        "layouts": table,
        "setting": {"steps": STEPS, "rows per step": 32, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
