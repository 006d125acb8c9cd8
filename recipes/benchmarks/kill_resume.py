"""Kill a run at a random moment, let it go on from the folder it left, and compare its end with the run never stopped.

    python recipes/benchmarks/kill_resume.py [--runs 20] [--write]

A small model trains on the quickstart's data with dropout, all tasks and a checkpoint every third step, on one and on
two processes in turn. Each run is killed (SIGKILL, all of its processes) after a random time, so that some die while
they write a checkpoint; then it is started again with `resume_from_checkpoint=True` until it is through. Final
weights, losses and the order of the rows must equal those of the uninterrupted run, bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLING = ("temperature", "annealed", "round_robin", "unimax")
STEPS, SAVE = 45, 3


def worker(folder: Path, sampling: str) -> None:
    """Train, going on from the folder where there is something to go on from; leave `end.json`."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, BertConfig, BertModel, TrainerCallback, set_seed

    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
    from hf_multitask.checkpointing import last_complete_checkpoint
    from hf_multitask.data.labels import infer_labels
    from hf_multitask.quickstart import backbone_folder, dataset_files

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    rows = {
        name: load_dataset("parquet", data_files=dataset_files(name), split=f"train[:{count}]")
        for name, count in (("vader", 200), ("bbc", 60), ("wnut16", 40))
    }
    classes = "single_label_classification"
    tasks = [
        Task("valence", "regression", dataset="vader", label_column="valence"),
        Task("source", classes, infer_labels(rows["vader"], "source"), "vader", label_column="source"),
        Task("topic", classes, infer_labels(rows["bbc"], "topic"), "bbc", label_column="topic"),
        Task(
            "tags", "token_classification", infer_labels(rows["wnut16"], "ner_tags"), "wnut16", label_column="ner_tags"
        ),
    ]
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    model = HardSharingModel.from_backbone(BertModel(config), tasks)

    class RowOrder(TrainerCallback):
        """Adds up what was read into one number per step, and writes it down before the step is over."""

        def on_step_end(self, args, state, control, **kwargs):
            if trainer.is_world_process_zero():
                if state.global_step == 1:
                    (folder / "first_step").touch()
                with open(folder / "rows.txt", "a", encoding="utf-8") as file:
                    file.write(f"{state.global_step} {trainer.last_rows}\n")

    class Trainer(MultiTaskTrainer):
        def get_batch_samples(self, *args):
            batches, window = super().get_batch_samples(*args)
            digest = hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in batches))
            self.last_rows = digest.hexdigest()[:16]
            return batches, window

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = MultiTaskTrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE,
        save_total_limit=2,
        max_length=32,
        task_sampling=sampling,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[RowOrder()])
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder, processes)[0] is not None or None)
    if trainer.is_world_process_zero():
        digest = hashlib.sha256()
        for _, parameter in sorted(model.named_parameters()):
            digest.update(parameter.detach().numpy().tobytes())
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        rows_read = dict(line.split() for line in (folder / "rows.txt").read_text().splitlines())
        end = {"weights": digest.hexdigest(), "losses": losses, "rows": rows_read, "seen": trainer.progress.rows_seen}
        (folder / "end.json").write_text(json.dumps(end))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def start(folder: Path, sampling: str, processes: int) -> list[subprocess.Popen]:
    """Start the processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--worker", str(folder), "--sampling", sampling]
    log = open(folder.with_suffix(".log"), "ab")  # noqa: SIM115 - the processes write to it
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    extra = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if processes > 1 else {}
    return [
        subprocess.Popen(
            command,
            env=base | extra | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if extra else {}),
            stdout=log,
            stderr=log,
        )
        for rank in range(processes)
    ]


def finish(runs: list[subprocess.Popen], folder: Path) -> None:
    """Wait for a run, and stop with its log if it failed."""
    if any([run.wait() for run in runs]):
        raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])


def main() -> None:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    parser.add_argument("--write", action="store_true", help="write kill_resume.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sampling", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.sampling)

    from common import describe, write_result

    from hf_multitask.checkpointing import incompleteness

    draw = random.Random(arguments.seed)
    home = Path(tempfile.mkdtemp())
    references: dict[tuple[str, int], dict] = {}
    moments: dict[tuple[str, int], tuple[float, ...]] = {}  # seconds to the first and to the last step
    equal, records = 0, []
    for number in range(arguments.runs):
        case = (SAMPLING[number // 2 % len(SAMPLING)], 1 + number % 2)
        if case not in references:
            folder = home / f"whole-{case[0]}-{case[1]}"
            folder.mkdir()
            begin = time.time()
            finish(start(folder, *case), folder)
            references[case] = json.loads((folder / "end.json").read_text())
            moments[case] = tuple((folder / name).stat().st_mtime - begin for name in ("first_step", "rows.txt"))
        folder = home / f"run-{number}"
        folder.mkdir()
        runs = start(folder, *case)
        time.sleep(draw.uniform(*moments[case]))
        for run in runs:
            run.send_signal(signal.SIGKILL)
        for run in runs:
            run.wait()
        reached = sorted(path.name for path in folder.glob("checkpoint-*"))
        broken = [name for name in reached if incompleteness(folder / name, case[1])]
        finish(start(folder, *case), folder)
        end = json.loads((folder / "end.json").read_text())
        same = end == references[case]
        equal += same
        record = {
            "sampling": case[0],
            "processes": case[1],
            "left": reached,
            "incomplete": broken,
            "bit-identical": same,
        }
        records.append(record)
        print(json.dumps(record), flush=True)
        shutil.rmtree(folder)
    result = {
        "bit-identical": f"{equal} of {arguments.runs}",
        "killed while a checkpoint was written": sum(bool(record["incomplete"]) for record in records),
        "runs": records,
        "setting": {"steps": STEPS, "a checkpoint every": SAVE, "seed": arguments.seed, **describe()},
    }
    write_result(__file__, result, arguments.write)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
