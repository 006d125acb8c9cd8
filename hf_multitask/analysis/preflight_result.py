"""What a preflight gave: findings with their numbers, tables, advice; as a page, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .advisor import Advice
from .preflight_page import markdown_page, text_page

__all__ = ["LEVELS", "Finding", "Preflight"]

LEVELS = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what came out.

    Args:
        level: `ok`, `warn` (worth a look) or `fail` (mend it before a long run).
        section: Part of the preflight: `setup`, `data`, `losses`, `conflict`, `plan`, `memory`, `trial` or `time`.
        check: What was checked, a short name such as `leaked`.
        about: The task, the dataset or the pair of tasks that it is about; empty for the whole recipe.
        message: What was found, with the number.
        numbers: The numbers it rests on.
        advice: What to do; empty if there is nothing to do.
    """

    level: str
    section: str
    check: str
    about: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)
    advice: str = ""

    def __post_init__(self) -> None:
        """Check the level."""
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is not one of {', '.join(LEVELS)}")


@dataclass(frozen=True, eq=False)
class Preflight:
    """Findings about a recipe before its training; see [`hf_multitask.preflight`].

    Args:
        name: Name of the recipe.
        findings: All findings, in the order of the sections.
        sections: By section, what was measured, as plain JSON types.
        advice: What follows for sharing, sampling, weighting and combination.
        seconds: By section, how long it took.
        settings: The arguments of the preflight.
    """

    name: str
    findings: tuple[Finding, ...]
    sections: dict[str, Any]
    advice: Advice
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no finding is a failure."""
        return not self.of_level("fail")

    def of_level(self, level: str) -> tuple[Finding, ...]:
        """Return the findings of a level.

        Raises:
            ValueError: There is no such level.
        """
        if level not in LEVELS:
            raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
        return tuple(finding for finding in self.findings if finding.level == level)

    def find(self, check: str, about: str | None = None) -> tuple[Finding, ...]:
        """Return the findings of a check, about everything or about one task or dataset."""
        return tuple(f for f in self.findings if f.check == check and about in (None, f.about))

    def table(self, levels: Sequence[str] = LEVELS) -> list[dict[str, Any]]:
        """Return a row for each finding of some levels, the worst first."""
        return [asdict(f) for level in reversed(LEVELS) if level in levels for f in self.of_level(level)]

    def text(self) -> str:
        """Return the page for a terminal."""
        return text_page(self.to_dict())

    def markdown(self) -> str:
        """Return the page in Markdown."""
        return markdown_page(self.to_dict())

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "name": self.name,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "advice": self.advice.to_dict(),
            "sections": self.sections,
            "seconds": self.seconds,
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preflight:
        """Make the object from the dictionary that [`to_dict`] gave."""
        return cls(
            name=values["name"],
            findings=tuple(Finding(**finding) for finding in values["findings"]),
            sections=dict(values["sections"]),
            advice=Advice.from_dict(values["advice"]),
            seconds=dict(values["seconds"]),
            settings=dict(values["settings"]),
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Preflight:
        """Read a file that [`save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, folder: str | Path) -> None:
        """Write `preflight.json` and `preflight.md` into a folder, which is made if it is not there.

        Raises:
            ValueError: The folder is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {str(folder)!r} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "preflight.json")
        (folder / "preflight.md").write_text(self.markdown() + "\n", encoding="utf-8")
