"""What a cleaning decided, and how a person reads it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import report
from ..files.jsonl import RecordError
from ..files.written import Written
from . import examples

REASONS = ("exact", "similar", "leakage")
# What the names of the files with the rows that are set aside, and that are removed, add to the main output's.
HOLDOUT = ".holdout.jsonl"
REMOVED = ".removed.jsonl"


@dataclass(slots=True)
class Removed:
    """A removed row: ``row`` and ``kept_row`` count from 0 among the good rows of their files.

    ``score`` is NaN for an exact copy in other letters (width, white space), which is not compared by the model.
    """

    row: int
    kept_row: int
    score: float
    reason: str  # "exact", "similar" or "leakage" (then kept_row is a row of the reference file)


class RemovedPair(NamedTuple):
    """A removed row's query, and that of the row that was kept for it (for a leak, in the reference file).

    score, reason: as of ``Removed``, but None for NaN.
    """

    query: str
    kept_query: str
    score: float | None
    reason: str


@dataclass
class CleaningResult:
    """What a cleaning run decided. Rows count from 0 among the input's good rows.

    ``kept_rows`` are those of ``<output>``, ``held_rows`` those that ``holdout`` set aside; both int64, ascending.
    """

    kept_rows: np.ndarray
    removed: list[Removed]
    rejected: list[RecordError]
    threshold: float
    report: dict = field(repr=False)
    held_rows: np.ndarray
    output: Path

    def removed_pairs(self) -> Iterator[RemovedPair]:
        """The texts of the rows ``removed``, one by one, read from ``<output>.removed.jsonl``.

        Raises:
            FileNotFoundError, ValueError: that is gone, or has been replaced.
        """
        return map(_pair, Written(self.output, self.report).rows(REMOVED))

    def summary(self) -> str:
        """A short table for a person."""
        counts = self.report["counts"]
        rows = [("rows in", f"{counts['input']:,}"), ("kept", f"{counts['kept']:,}")]
        if "holdout" in self.report:
            about = self.report["holdout"]
            rows += [("held out", f"{counts['held_out']:,}")]
            rows += [("leaks, near duplicates", f"{about['near_duplicates_across']:,}")]
            rows += [("leaks, answers", f"{about['answers_across']:,}")]
        has_reference = self.report["arguments"]["reference_data_path"] is not None
        checked = [reason for reason in REASONS if reason != "leakage" or has_reference]
        rows += [(f"removed, {reason}", f"{counts['removed_' + reason]:,}") for reason in checked]
        rows += [("rejected", f"{counts['rejected']:,}")] if counts["rejected"] else []
        found = self.report["answers"]
        if found["different"]:
            rows += [("answers in no kept row", f"{found['in_no_kept_row']:,} of {found['different']:,}")]
        rows += [("threshold", f"{self.threshold:g}")]
        if "threshold_of_other_answers" in self.report:
            rows += [("threshold, other answers", f"{self.report['threshold_of_other_answers']:g}")]
        rows += [("seconds", f"{self.report['seconds']['total']:.1f}")]
        title = f"{self.report['arguments']['input_data_path']} -> {self.report['arguments']['output_data_path']}"
        lines = [report.table(rows, title)]
        lines += examples.lines(self.report["closest_removals"], self.report["nearest_kept"])
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()


def _pair(entry: dict) -> RemovedPair:
    kept = entry["reference_query" if entry["reason"] == "leakage" else "kept_query"]
    return RemovedPair(entry["row"]["query"], kept, entry["cosine"], entry["reason"])
