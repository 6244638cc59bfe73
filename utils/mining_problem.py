"""What mining starts from: the rows' queries, vectors, and which passages are known to answer each query."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.scores import scores_of


class Groups(NamedTuple):
    """Passages of each query: those of query i are ``rows[lims[i]:lims[i + 1]]``, ascending."""

    lims: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, groups: list[list[int]]) -> "Groups":
        return cls.cut(list(map(len, groups)), np.array([row for group in groups for row in sorted(group)], np.int64))

    @classmethod
    def cut(cls, sizes: Sequence[int] | np.ndarray, rows: np.ndarray) -> "Groups":
        """Of the groups' sizes, and the rows of all in turn."""
        return cls(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), rows)

    def __getitem__(self, i) -> np.ndarray:
        return self.rows[self.lims[i] : self.lims[i + 1]]

    def sizes(self) -> np.ndarray:
        return np.diff(self.lims)

    def members(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The groups of some queries in turn: the position of each passage's query among them, and the passages."""
        sizes = self.sizes()[queries]
        where = np.repeat(np.arange(len(queries)), sizes)
        offset = np.arange(len(where)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return where, self.rows[self.lims[queries][where] + offset]

    def members_in_parts(self, queries: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``members``, at most ``size`` of them at a time: a query may be there often, and its group be large."""
        first, ends = self.lims[queries], np.cumsum(self.sizes()[queries])
        begins = np.concatenate([[0], ends[:-1]])
        for start in range(0, int(ends[-1]) if len(ends) else 0, size):
            number = np.arange(start, min(start + size, ends[-1]))
            where = np.searchsorted(ends, number, side="right")
            yield where, self.rows[first[where] + number - begins[where]]

    def hold(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether each of ``rows``, int [b, k] (-1 is none), is in its query's group (int [b]); bool [b, k]."""
        where, members = self.members(queries)
        width = max(int(rows.max(initial=0)), int(members.max(initial=0))) + 1
        known = np.sort(where * width + members)
        if len(known) == 0:
            return np.zeros(rows.shape, bool)
        wanted = np.arange(len(queries))[:, None] * width + rows
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return (known[place] == wanted) & (rows >= 0)

    def lowest(self, values: np.ndarray) -> np.ndarray:
        """The lowest of each group's values, float64; infinity where a group is empty.

        Args:
            values: one for each of ``rows``.
        """
        lowest = np.full(len(self.lims) - 1, np.inf)
        filled = np.flatnonzero(self.sizes())
        if len(filled):
            lowest[filled] = np.minimum.reduceat(values, self.lims[filled])
        return lowest

    def highest(self, values: np.ndarray) -> np.ndarray:
        """As ``lowest``, the highest of each group's values; infinity where a group is empty."""
        highest = np.full(len(self.lims) - 1, np.inf)
        filled = np.flatnonzero(self.sizes())
        if len(filled):
            highest[filled] = np.maximum.reduceat(values, self.lims[filled])
        return highest

    def median(self, values: np.ndarray) -> np.ndarray:
        """As ``lowest``, the median of each group's values: the mean of the middle two where their number is even."""
        sizes = self.sizes()
        median = np.full(len(sizes), np.inf)
        filled = np.flatnonzero(sizes)
        ascending = values[np.lexsort((values, np.repeat(np.arange(len(sizes)), sizes)))].astype(np.float64)
        first, size = self.lims[filled], sizes[filled]
        median[filled] = (ascending[first + (size - 1) // 2] + ascending[first + size // 2]) / 2
        return median

    def one_of_each(self, values: np.ndarray, which: str) -> np.ndarray:
        """``lowest``, ``median`` or ``highest``, by name: what margins are measured from, float64 [groups]."""
        return {"lowest": self.lowest, "median": self.median, "highest": self.highest}[which](values)


@dataclass(frozen=True)
class Problem:
    """What mining starts from.

    Attributes:
        query_of_row: int64 [rows], each input row's query.
        query_vectors, passage_vectors: float32 [queries, dim] and [passages, dim].
        positives: each query's known positives.
        forbidden: each query's passages that must never be negatives; the positives are among them.
        n_candidates: passages from this row on are positives that may not be mined.
        unit: True if the vectors have length 1.
    """

    query_of_row: np.ndarray
    query_vectors: np.ndarray
    passage_vectors: np.ndarray
    positives: Groups
    forbidden: Groups
    n_candidates: int
    unit: bool = True

    def times_asked(self) -> np.ndarray:
        """How many rows ask each query, int64 [queries]."""
        return np.bincount(self.query_of_row, minlength=len(self.query_vectors))

    def cosines(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosines between passages, by their rows, float64; 0 of a passage whose vector is 0."""

        def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return scores_of(self.passage_vectors, a, self.passage_vectors, b)

        cosines = products(left, right)
        if self.unit:
            return cosines
        norms = np.sqrt(products(left, left)) * np.sqrt(products(right, right))
        return np.divide(cosines, norms, out=np.zeros_like(cosines), where=norms > 0)

    def positive_scores(self) -> np.ndarray:
        """The score of each query with each of its positives, float64, in the order of ``positives.rows``."""
        queries = np.repeat(np.arange(len(self.positives.lims) - 1), self.positives.sizes())
        return scores_of(self.query_vectors, queries, self.passage_vectors, self.positives.rows)

    def in_window(
        self, queries: np.ndarray, rows: np.ndarray, window: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of the queries' candidates (int [b], and int [b, k] best first) lie in the window.

        Forbidden ones take up no place in it.

        Returns:
            Those that do, bool [b, k]; the ranks, int [b, k], -1 of what has none; and how many before the window's
            end are forbidden to each query, int [b], however much further the lists go.
        """
        there = rows >= 0
        forbidden = self.forbidden.hold(queries, rows) & there
        open_ = there & ~forbidden
        n_open = np.cumsum(open_, axis=1)
        rank = np.where(open_, n_open - 1, -1)
        open_ &= (rank >= window[0]) & (rank < window[1])
        return open_, rank, (forbidden & (n_open < window[1])).sum(axis=1)
