"""What an evaluation found, and how a person reads it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..files.written import Written
from .tables import tables


class Miss(NamedTuple):
    """A query for which a metric is 0, the texts of its right passages, and of those that were found first."""

    query: str
    right: list[str]
    found: list[str]


class EvaluationResult(dict[str, float]):
    """Each metric's mean over the queries, at the largest dimension; ``report`` is what the report file holds."""

    def __init__(self, values: dict[str, float], report: dict, output: Path):
        super().__init__(values)
        self.report, self.output = report, output

    def summary(self) -> str:
        """Tables for a person: values with intervals, the comparison, and the curve over dimensions."""
        return tables(self.report)

    def __repr__(self) -> str:
        return self.summary()

    def misses(self, metric: str | None = None) -> Iterator[Miss]:
        """The queries for which a metric is 0, one by one, read from ``<output>``: as many passages as
        ``top_passages``.

        Args:
            metric: such as ``hit_rate@1``; default: the first.

        Raises:
            ValueError: that was not computed, or the output has been replaced.
            FileNotFoundError: it is gone.
        """
        name = next(iter(self)) if metric is None else metric
        if name not in self:
            raise ValueError(f"metric is {name!r}; expected one of {', '.join(self)}")
        rows = Written(self.output, self.report).rows()
        return (_miss(row) for row in rows if row[name] == 0)


def _miss(row: dict) -> Miss:
    passages = row["passages"]
    lower = [*row["right_below"], *row["not_found"]]
    right = [passage["text"] for passage in [*passages, *lower] if passage["grade"] >= 1]
    return Miss(row["query"], right, [passage["text"] for passage in passages])
