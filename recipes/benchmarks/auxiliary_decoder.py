"""A causal objective of weight 0.1 beside a classifier, on a small decoder: both learn, and it still writes.

    python recipes/benchmarks/auxiliary_decoder.py [--steps 40] [--write]

SmolLM2-135M-Instruct, all of its parameters trained: where a sentence comes from (4 classes, the last token's hidden
state), and, as an auxiliary task, the next token of the same texts. Losses are those of fixed validation rows before
and after; what the model writes for a few prompts, greedily, is recorded before and after as well.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from common import describe, write_result

PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
VALIDATION_ROWS = 128


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write auxiliary_decoder.json")
    arguments = parser.parse_args()

    from datasets import load_dataset
    from transformers import AutoTokenizer, set_seed

    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
    from hf_multitask.data.labels import infer_labels
    from hf_multitask.quickstart import backbone_folder, dataset_files

    rows = load_dataset("parquet", data_files=dataset_files("vader"))
    folder = backbone_folder("SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = [
        Task(
            "source",
            "single_label_classification",
            dataset="vader",
            labels=infer_labels(rows["train"], "source"),
            label_column="source",
        ),
        Task("text", "causal_lm", dataset="vader", auxiliary=True),
    ]
    assert tasks[1].weight == 0.1
    set_seed(0)
    model = HardSharingModel.from_backbone(str(folder), tasks)

    def write(model: Any) -> dict[str, str]:
        written = {}
        for prompt in PROMPTS:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
            tokens = model.generate(**inputs, task="text", max_new_tokens=24, do_sample=False)
            written[prompt] = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return written

    with tempfile.TemporaryDirectory() as output:
        trainer = MultiTaskTrainer(
            model=model,
            args=MultiTaskTrainingArguments(
                output,
                max_steps=arguments.steps,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=16,
                learning_rate=3e-5,
                head_learning_rate=1e-3,
                warmup_steps=0.1,
                max_length=64,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset={"vader": rows["train"]},
            eval_dataset={"vader": rows["validation"].select(range(VALIDATION_ROWS))},
            processing_class=tokenizer,
        )
        keys = ("eval_source_loss", "eval_source_accuracy", "eval_text_loss", "eval_text_perplexity")
        measured = {}
        for when in ("before", "after"):
            if when == "after":
                trainer.train()
            metrics = trainer.evaluate()
            measured[when] = {key: metrics[key] for key in keys} | {"written": write(trainer.model)}
    result = {
        **measured,
        "both losses fall": all(measured["after"][key] < measured["before"][key] for key in (keys[0], keys[2])),
        "setting": {"steps": arguments.steps, "rows per step": 8, "weight of the causal objective": 0.1, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
