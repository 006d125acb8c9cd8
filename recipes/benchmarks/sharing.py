"""What each sharing scheme costs: a training step beside hard sharing's, and parts of schemes beside other ways.

    python recipes/benchmarks/sharing.py [--rounds 7] [--write]

MiniLM, 32 rows of 64 tokens in all, in equal parts of T tasks; a step is forward, backward and AdamW. In every group
the candidates take turns in one process, and medians are compared:

- steps of all schemes over hard sharing's (T = 4);
- soft sharing with its penalty over the same without it (T = 4), and the penalty's value and gradient over those of a
  double loop over pairs of encoders;
- a mixed batch of T = 8 tasks x 4 rows with prefixes, and with adapters, over PEFT with one pass per task and
  `set_adapter` between them (forward, backward and AdamW);
- one of 8 experts in every second layer: forward and backward over the dense model's, and the experts alone over all
  experts on all tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import describe, write_result

ROWS, TOKENS = 32, 64
LEARNING_RATE = 1e-4
Step = Callable[[], Any]


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return the median seconds of each step; they take turns, and the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def make_batch(num_tasks: int) -> dict[str, Any]:
    """Return a batch of equal parts of all tasks, as the collator makes it."""
    from hf_multitask.models.passes import Segment

    torch.manual_seed(0)
    rows = ROWS // num_tasks
    names = [f"task{number}" for number in range(num_tasks)]
    return {
        "input_ids": torch.randint(1000, 20_000, (ROWS, TOKENS)),
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
        "segments": {name: Segment(i * rows, (i + 1) * rows, TOKENS) for i, name in enumerate(names)},
        "labels": {name: torch.randint(0, 3, (rows,)) for name in names},
    }


def make_model(scheme: str, num_tasks: int, **options: Any) -> Any:
    """Return a model of a scheme over MiniLM."""
    from hf_multitask import Task
    from hf_multitask.models.auto import SCHEMES
    from hf_multitask.quickstart import backbone_folder

    torch.manual_seed(0)
    names = [f"task{number}" for number in range(num_tasks)]
    tasks = [Task(name, "single_label_classification", labels=("a", "b", "c")) for name in names]
    return SCHEMES[scheme].from_backbone(str(backbone_folder()), tasks, **options).train()


def stepper(model: Any, batch: dict[str, Any]) -> Step:
    """Return a function that makes a training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> None:
        model(**batch, penalty_scale=0.0).loss.backward()
        model.finish_window()
        model.add_penalty_gradient()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_stepper(model: Any, batch: dict[str, Any], folder: Path) -> Step:
    """Return the same step by PEFT: a pass for each task's rows, with its adapter switched on."""
    from peft import PeftModel

    from hf_multitask.models.backbone import load_backbone
    from hf_multitask.quickstart import backbone_folder

    model.save_pretrained(folder)
    names = [task.name for task in model.tasks]
    backbone = load_backbone(str(backbone_folder()))
    peft = PeftModel.from_pretrained(backbone, folder / "adapters" / names[0], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(folder / "adapters" / name, name)
    for key, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in key or "prompt_encoder" in key)
    peft.train()
    heads = model.heads
    trained = [p for p in (*peft.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    weight = 1 / len(names)

    def step() -> None:
        for name, segment in batch["segments"].items():
            peft.set_adapter(name)
            rows = slice(segment.start, segment.stop)
            mask = batch["attention_mask"][rows]
            hidden = peft(input_ids=batch["input_ids"][rows], attention_mask=mask).last_hidden_state
            losses = heads[name].row_losses(heads[name](hidden, mask), batch["labels"][name])
            (weight * losses.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def double_loop(encoders: Any, factor: float) -> torch.Tensor:
    """Return the penalty as the formula says: one pair of encoders after the other."""
    models = list(encoders.values())
    total = torch.zeros(())
    for number, one in enumerate(models):
        for other in models[number + 1 :]:
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                total = total + factor * (a - b).pow(2).sum()
    return total


def measure_soft(rounds: int) -> dict[str, float]:
    """Compare soft sharing with and without its penalty, and the penalty with the double loop."""
    batch = make_batch(4)
    model = make_model("soft", 4)
    plain = stepper(model, batch)

    def without() -> None:
        model.config.penalty = 0.0
        plain()
        model.config.penalty = 0.01

    times = medians({"with": plain, "without": without}, rounds)

    def loop() -> None:
        double_loop(model.encoders, 0.01).backward()

    # Gradients are there already, as after a backward pass.
    loop()
    alone = medians({"ours": model.add_penalty_gradient, "loop": loop}, rounds)
    return {
        "step with the penalty over without": times["with"] / times["without"],
        "penalty alone over the step": alone["ours"] / times["without"],
        "double loop over the penalty": alone["loop"] / alone["ours"],
    }


def measure_peft(scheme: str, rounds: int) -> float:
    """Return a mixed batch's step over PEFT's with a pass per task."""
    import tempfile

    batch = make_batch(8)
    model = make_model(scheme, 8)
    with tempfile.TemporaryDirectory() as folder:
        times = medians({"ours": stepper(model, batch), "peft": peft_stepper(model, batch, Path(folder))}, rounds)
    return times["ours"] / times["peft"]


def measure_experts(rounds: int) -> dict[str, float]:
    """Compare one of 8 experts with the dense model, and with all experts on all tokens."""
    batch = make_batch(4)

    def passes(model: Any) -> Step:
        def step() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        return step

    dense, sparse = make_model("hard", 4), make_model("mixture_of_experts", 4, num_experts=8, experts_per_token=1)
    times = medians({"dense": passes(dense), "sparse": passes(sparse)}, rounds)
    layer = sparse.expert_layers()[0][1]
    hidden = torch.randn(ROWS * TOKENS, sparse.config.get_text_config().hidden_size, requires_grad=True)
    one = torch.randint(0, 8, (ROWS * TOKENS, 1))
    every = torch.arange(8).repeat(ROWS * TOKENS, 1)

    def experts(index: torch.Tensor) -> Step:
        weights = torch.full(index.shape, 1 / index.shape[1])

        def step() -> None:
            layer.experts(hidden, index, weights).sum().backward()
            layer.zero_grad()
            hidden.grad = None

        return step

    alone = medians({"one": experts(one), "every": experts(every)}, rounds)
    return {
        "forward and backward over the dense model": times["sparse"] / times["dense"],
        "one expert for each token over all experts": alone["one"] / alone["every"],
    }


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write sharing.json")
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    rounds = arguments.rounds
    schemes = ("hard", "conditioned", "prefix", "adapter", "soft", "mixture_of_experts")
    steps = {name: stepper(make_model(name, 4), make_batch(4)) for name in schemes}
    times = medians(steps, rounds)
    result: dict[str, Any] = {
        "step over hard sharing's, 4 tasks": {name: times[name] / times["hard"] for name in schemes},
        "seconds of hard sharing's step": times["hard"],
        "soft sharing, 4 tasks": measure_soft(rounds),
        "mixed batch of 8 tasks over PEFT's with a pass per task": {
            name: measure_peft(name, rounds) for name in ("prefix", "adapter")
        },
        "1 of 8 experts": measure_experts(rounds),
        "bounds": {
            "conditioned": 1.05,
            "prefix and adapter over hard sharing": 0.8,
            "step with the penalty over without": 1.1,
            "double loop over the penalty": 5.0,
            "mixed batch over PEFT's": 1.0,
            "forward and backward over the dense model": 1.5,
            "one expert for each token over all experts": 1 / 3,
        },
        "setting": {"rows": ROWS, "tokens per row": TOKENS, "rounds": rounds, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
