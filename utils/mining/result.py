"""What a mining decided, and how a person reads it."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import report
from ..files.written import Written
from . import formats
from .sampling import Choice

SHORT = ".short.jsonl"
_RARE = {
    "rejected": "rejected", "short": "short of negatives", "without_negatives": "without any negative",
    "dropped_short": "set aside as short", "backfilled": "random negatives (backfill)",
    "kept": "negatives of the rows' own",
}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Where each row was written.

    ends: int64 [rows], the byte after its lines; they begin where those of the row before it in that file end.
    set_aside: bool [rows], the rows in ``<output>.short.jsonl``; the others are in ``<output>``.
    """

    ends: np.ndarray
    set_aside: np.ndarray

    def of(self, row: int) -> tuple[int, int]:
        """Its first byte, and the byte after its last."""
        before = np.flatnonzero(self.set_aside[:row] == self.set_aside[row])
        return int(self.ends[before[-1]]) if len(before) else 0, int(self.ends[row])


@dataclass
class MiningResult(Choice):
    """``negatives[i]`` belongs to row i. short_queries: the rows with fewer than asked for, before any backfill."""

    report: dict = field(repr=False)
    output: Path = field(repr=False)
    places: Places = field(repr=False)

    def negatives_of(self, row: int) -> list[str]:
        """The texts of ``negatives[row]``, read from the output.

        Raises:
            IndexError: there is no such row.
            FileNotFoundError, ValueError: the output is gone, or has been replaced.
        """
        row = range(len(self.negatives))[row]
        n = len(self.negatives[row])
        written = Written(self.output, self.report)
        if self.places.set_aside[row]:
            return formats.negatives_in(written.between(*self.places.of(row), SHORT), n, "list")
        form = self.report["arguments"]["output_format"]
        return formats.negatives_in(written.between(*self.places.of(row)), n, form)

    def summary(self) -> str:
        """A short table for a person."""
        counts, about = self.report["counts"], self.report["arguments"]
        rows = [("rows in", f"{counts['input']:,}"), ("written", f"{counts['written']:,}")]
        rows += [(name, f"{counts[key]:,}") for key, name in _RARE.items() if counts[key]]
        rows += [("passages to mine from", f"{counts['candidates']:,}"), ("negatives", f"{counts['negatives']:,}")]
        rows += [(f"dropped, {reason}", f"{count:,}") for reason, count in self.drops_by_reason.items() if count]
        further = self.report.get("queries_searched_further")
        if further:
            rows += [("queries searched further", f"{max(further.values()):,}")]
        if about["relative_margin"] == "auto":
            rows += [("relative margin, measured", f"{self.report['relative_margin']['measured']:.2f}")]
        rows += [("background, query and passage", f"{self.report['background']['query_passage']['mean']:.3f}")]
        rows += [("seconds", f"{self.report['seconds']['total']:.1f}")]
        return report.table(rows, f"{about['input_data_path']} -> {about['output_data_path']}")

    def __repr__(self) -> str:
        return self.summary()
