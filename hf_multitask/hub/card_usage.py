"""How to use a model, as code that runs: one example for each way in which its tasks read texts."""

from __future__ import annotations

import json
from typing import Any

from .card_facts import CardFacts, TaskFacts

__all__ = ["usage_section"]

_TEXT = "It was a good film."
_SECOND = "Maria saw it."
_CHOICES = ["we saw it", "it was sad"]


def usage_section(facts: CardFacts) -> str:
    """Return the section on using the model."""
    place = _literal(facts.location)
    answered = [task for task in facts.tasks if task.served]
    parts = ["## How to use"]
    if answered:
        texts = [_example(task) for task in answered]
        texts = [text for i, text in enumerate(texts) if text not in texts[:i]]
        listed = ",\n".join(f"    {_literal(text)}" for text in texts)
        parts.append(
            _block(
                "import hf_multitask",
                "from transformers import pipeline",
                "",
                f'ask = pipeline("multi-task", model={place})',
                f"texts = [\n{listed},\n]",
                "for answers in ask(texts):",
                "    print(answers)",
            )
        )
        if len(answered) > 1:
            parts.append(f"`ask(texts, tasks=[{_literal(answered[0].name)}])` answers some of the tasks only.")
    parts.append("The model itself, with all logits by task:")
    parts.append(
        _block(
            "from hf_multitask import AutoModelForMultiTask",
            "",
            f"model = AutoModelForMultiTask.from_pretrained({place})",
        )
    )
    if facts.has_code:
        parts.append("Without `hf_multitask`, by the code that lies beside the weights:")
        parts.append(
            _block(
                "from transformers import AutoModel",
                "",
                f"model = AutoModel.from_pretrained({place}, trust_remote_code=True)",
            )
        )
    return "\n\n".join(parts)


def _example(task: TaskFacts) -> Any:
    """Return an input of the form that a task reads."""
    count = len(task.text_columns)
    if count > 2 or (count == 2 and task.choice_columns):
        row: dict[str, Any] = {column: _TEXT for column in task.text_columns}
        return row | ({task.choice_columns[0]: _CHOICES} if task.choice_columns else {})
    texts = (_TEXT, _SECOND)[:count]
    if task.choice_columns:
        return (*texts, _CHOICES)
    return texts if count == 2 else texts[0]


def _literal(value: Any) -> str:
    """Return a value as code, strings in double quotes and on one line."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(one)}' for key, one in value.items())}}}"
    return json.dumps(value)


def _block(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
