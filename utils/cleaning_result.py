"""What a cleaning decided, and how a person reads it."""

from dataclasses import dataclass, field

import numpy as np

from utils import cleaning_examples, report
from utils.records import RecordError

REASONS = ("exact", "similar", "leakage")
# What the name of the file with the rows that are set aside adds to the main output's.
HOLDOUT = ".holdout.jsonl"


@dataclass(slots=True)
class Removed:
    """A removed row: ``row`` and ``kept_row`` count from 0 among the good rows of their files.

    ``score`` is NaN for an exact copy in other letters (width, white space), which is not compared by the model.
    """

    row: int
    kept_row: int
    score: float
    reason: str  # "exact", "similar" or "leakage" (then kept_row is a row of the reference file)


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
        lines += cleaning_examples.lines(self.report["closest_removals"], self.report["nearest_kept"])
        return "\n".join(lines)
