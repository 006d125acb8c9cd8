"""The thresholds of preflight's findings, in one table, each with its reason.

A number beyond `warn` is worth a look, one beyond `fail` makes a long run pointless or its result wrong. Thresholds are
rules of thumb; the findings show the numbers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIMITS", "Limit"]


@dataclass(frozen=True)
class Limit:
    """Thresholds of one number.

    Args:
        warn: Beyond it a finding is a warning; None for never.
        fail: Beyond it a finding is a failure; None for never.
        reason: Why there.
        below: Whether small numbers are the bad ones: "beyond" then means below.
    """

    warn: float | None
    fail: float | None
    reason: str
    below: bool = False

    def level(self, value: float) -> str:
        """Return `ok`, `warn` or `fail` for a number.

        Example:
            >>> [Limit(0.05, 0.5, "").level(value) for value in (0.05, 0.06, 0.6)]
            ['ok', 'warn', 'fail']
        """
        for level, bound in (("fail", self.fail), ("warn", self.warn)):
            if bound is not None and (value < bound if self.below else value > bound):
                return level
        return "ok"


LIMITS: dict[str, Limit] = {
    # ---- data ----
    "training_rows": Limit(50, None, "with fewer rows a head of a few thousand weights is fitted by heart", below=True),
    "evaluation_rows": Limit(50, None, "the standard error of an accuracy is up to 7 points with 50 rows", below=True),
    "rarest_label": Limit(5, None, "fewer examples than that can all fall into one batch, or be errors", below=True),
    "majority_label": Limit(
        0.9, 0.999, "always answering it gives an accuracy of 0.9; with one label nothing is learned"
    ),
    "majority_word_label": Limit(0.99, 0.9999, "most words carry no label in many tasks, but one in a hundred must"),
    "truncated": Limit(
        0.1, None, "of every tenth text the end is not read; where the beginning says all, that is fine"
    ),
    "empty": Limit(0.0, 0.1, "an empty text says nothing about its label; a tenth of them is a wrong column"),
    "repeated": Limit(0.05, None, "texts that come again count several times, and make intervals too narrow"),
    "leaked": Limit(0.0, 0.01, "a row that was trained on measures memory; 1 % moves a metric as much as most methods"),
    "leaked_between": Limit(0.0, None, "another task has trained the encoder on the text, though not on this label"),
    "contradicted": Limit(0.0, 0.05, "of two labels for one text, one is counted wrong whatever the model answers"),
    # ---- losses ----
    "start_over_chance": Limit(
        3.0, None, "a fresh head should guess; steps go into unlearning what it answers instead"
    ),
    "loss_ratio": Limit(10.0, 100.0, "the larger loss makes nearly the whole gradient: with 100, all but 1 % of it"),
    "loss_rise": Limit(1.0, 3.0, "the loss on rows that are trained on should fall; three times the start diverges"),
    # ---- sampling ----
    "passes_per_epoch": Limit(
        4.0,
        20.0,
        "repeats are nearly as good as new rows up to 4 passes, and worth little beyond 16 (Muennighoff 2023)",
    ),
    "passes": Limit(16.0, None, "as above, over the whole training"),
    "unseen": Limit(0.5, None, "more than half of the rows that are there are never read"),
    "rows_per_step": Limit(0.2, None, "the task is absent from four steps of five, and its gradient noise", below=True),
    "share_error": Limit(1.0, None, "the schedule keeps each share to within one row at every point"),
    # ---- machine ----
    "memory": Limit(0.8, 1.0, "estimated need over what is there; what is freed late and fragments take the rest"),
}
"""By the name of a check. A value must exceed (or, where small is bad, fall below) the bound."""
