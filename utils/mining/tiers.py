"""Each query's candidates, best first: as many as its window needs beyond the passages that it must not get.

A query that thousands of rows ask has thousands of positives, all of which may rank above its window. So queries fall
into tiers by how many passages are forbidden to them, and lists are as long as their tier needs: together they hold a
small multiple of what the windows and the forbidden passages come to, however few queries have most of these.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..files.ragged import Ragged
from ..search.scores import Neighbors

# Queries with at most so many forbidden passages share a tier; those with more, one for each doubling.
_FEW_FORBIDDEN = 64
# Candidates that are handed out together.
_CANDIDATES = 1 << 20


class Tier(NamedTuple):
    """Queries (int64 [q], ascending) whose lists are as long as each other; the most that is forbidden to one."""

    queries: np.ndarray
    most_forbidden: int

    def depth(self, window_end: int, n_candidates: int) -> int:
        """How many candidates reach to the window's end, whichever of them are forbidden."""
        return min(window_end + self.most_forbidden, n_candidates)


def tiers_of(forbidden: Ragged, asked: np.ndarray | None = None) -> list[Tier]:
    """Queries, in tiers that depend on nothing but how many passages are forbidden to each.

    Args:
        asked: int64, ascending, the queries; all if None.
    """
    sizes = forbidden.sizes()
    asked = np.arange(len(sizes)) if asked is None else asked
    sizes = sizes[asked]
    level = np.ceil(np.log2(np.maximum(sizes / _FEW_FORBIDDEN, 1)))
    return [Tier(asked[level == one], int(sizes[level == one].max())) for one in np.unique(level)]


class Rankings:
    """Lists of candidates, by tier.

    Args:
        n: how many queries there are.
        lists: for each tier its queries, and their candidates (``rows`` may be whole numbers in float64, and both
            memory-mapped). A query's last one counts.
        stops: int64 [n], where each query's window ends, if not all are the same.
    """

    def __init__(self, n: int, lists: Sequence[tuple[np.ndarray, Neighbors]], stops: np.ndarray | None = None):
        self.n_queries, self._given, self._stops = n, list(lists), stops
        self._lists = [neighbors for _, neighbors in lists]
        self._tier, self._place = np.zeros(n, np.int8), np.zeros(n, np.int64)
        for number, (queries, _) in enumerate(lists):
            self._tier[queries] = number
            self._place[queries] = np.arange(len(queries))

    @classmethod
    def of(cls, neighbors: Neighbors) -> "Rankings":
        """Of one list for each query, all of one length."""
        n = len(neighbors.rows)
        return cls(n, [(np.arange(n), neighbors)])

    def stops(self, queries: np.ndarray, usual: int) -> np.ndarray:
        """Where the windows of some queries end, int64 [q]."""
        return np.full(len(queries), usual) if self._stops is None else self._stops[queries]

    def further(self, lists: Sequence[tuple[np.ndarray, Neighbors]], stop: int, usual: int) -> "Rankings":
        """The same, but with other lists for some queries, whose windows end at ``stop``."""
        stops = self.stops(np.arange(self.n_queries), usual).copy()
        for queries, _ in lists:
            stops[queries] = stop
        return Rankings(self.n_queries, [*self._given, *lists], stops)

    def parts(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, Neighbors]]:
        """The lists of some queries (int64 [q]), a bounded number of candidates at a time.

        Yields:
            The positions of some of them, ascending, and their lists; each position once, in any order.
        """
        tier = self._tier[queries]
        for number, lists in enumerate(self._lists):
            positions = np.flatnonzero(tier == number)
            size = max(1, _CANDIDATES // max(1, lists.rows.shape[1]))
            for start in range(0, len(positions), size):
                some = positions[start : start + size]
                places = self._place[queries[some]]
                yield some, Neighbors(lists.scores[places], lists.rows[places].astype(np.int64))
