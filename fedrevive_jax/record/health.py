"""Whether a run still makes sense, judged from the rows of its record alone.

A run that is continued reads its rows again and comes to the same judgement.
"""

import math
import statistics
from collections import Counter, deque
from typing import Any

from fedrevive_jax.dfkd import loss_guard
from fedrevive_jax.errors import UserError

# Losses in a row that are not finite before a run counts as diverged.
DIVERGED_AFTER = 10
# The uploads among which `reject_limit` counts.
RECENT = 100


class DivergenceError(UserError):
    """Training has diverged."""


class RejectLimitError(UserError):
    """Too many uploads were rejected."""


class Health:
    """Watches losses and rejections.

    Attributes:
      trouble: why the run has to stop; None as long as all is well.
      skipped: syntheses and distillations that were due and moved nothing, because they were not
        finite or the loss guard rejected every step.
    """

    def __init__(self, reject_limit: float):
        self._reject_limit = reject_limit
        self._broken: Counter[str] = Counter()
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._reasons: Counter[str] = Counter()
        self.trouble: UserError | None = None
        self.skipped = {"synthesis": 0, "distillation": 0}
        self._arrivals = self._revived = 0
        self._shares: dict[str, list[float]] = {term: [] for term in loss_guard.TERMS}

    @property
    def rejected_terms(self) -> dict[str, float]:
        """The share of its steps in which the loss guard rejected a term, of terms that had any."""
        return {term: statistics.fmean(own) for term, own in self._shares.items() if own}

    @property
    def revived(self) -> float:
        """The share of the arrivals into which a distilled update was blended."""
        return self._revived / max(self._arrivals, 1)

    def arrival(self, row: dict[str, Any]) -> None:
        """Takes note of a row of arrivals.jsonl, in memory or as it was read."""
        self._arrivals += 1
        self._loss("training", row)
        self._recent.append(row["rejected"] is not None)
        if row["rejected"] is not None:
            self._reasons[row["rejected"]] += 1
        bad = sum(self._recent)
        if len(self._recent) == RECENT and bad / RECENT > self._reject_limit:
            reasons = ", ".join(f"{count} {name}" for name, count in self._reasons.items())
            self._stop(
                RejectLimitError(
                    f"reject_limit={self._reject_limit:g}: {bad} of the last {RECENT} uploads up "
                    f"to version {row['version']} were rejected (in the whole run {reasons}); at "
                    f"most {self._reject_limit * RECENT:g} may be"
                )
            )

    def metrics(self, row: dict[str, Any]) -> None:
        """Takes note of a row of metrics.jsonl, in memory or as it was read."""
        if row["kind"] == "evaluation":
            self._loss("evaluation", row)
        self._revived += row.get("distillation_skipped") == 0
        for part in self.skipped:
            self.skipped[part] += row.get(f"{part}_skipped") == 1
        for term, own in self._shares.items():
            share = row.get(f"{term}_rejected")
            if share is not None and _is_finite(share):
                own.append(share)

    def _loss(self, kind: str, row: dict[str, Any]) -> None:
        self._broken[kind] = 0 if _is_finite(row["loss"]) else self._broken[kind] + 1
        if self._broken[kind] == DIVERGED_AFTER:
            self._stop(
                DivergenceError(
                    f"training has diverged: the last {DIVERGED_AFTER} {kind} losses up to version "
                    f"{row['version']} are not finite; try a smaller `client_lr` or `server_lr`"
                )
            )

    def _stop(self, trouble: UserError) -> None:
        self.trouble = self.trouble or trouble


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
