"""What mining starts from: the rows' queries, vectors, and which passages are known to answer each query."""

from dataclasses import dataclass

import numpy as np

from ..files.ragged import Ragged
from ..search.scores import scores_of

# Pairs of passages that are compared at a time.
_PAIRS = 1 << 18


# Where no window is given, no query's goes further than this.
FURTHEST = 800


@dataclass(frozen=True)
class Problem:
    """What mining starts from.

    Attributes:
        query_of_row: int64 [rows], each input row's query.
        query_vectors, passage_vectors: float32 [queries, dim] and [passages, dim].
        positives: each query's known positives, ascending.
        forbidden: each query's passages that must never be negatives, ascending; the positives are among them.
        n_candidates: passages from this row on are positives that may not be mined.
        unit: True if the vectors have length 1.
        kept: each row's own negatives, which come first; None if there are none to keep.
        repeats: with ``kept``, each row's passages of the same text as one of those, ascending.
    """

    query_of_row: np.ndarray
    query_vectors: np.ndarray
    passage_vectors: np.ndarray
    positives: Ragged
    forbidden: Ragged
    n_candidates: int
    unit: bool = True
    kept: Ragged | None = None
    repeats: Ragged | None = None

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

    def nearest_positive(self, query: int, rows: np.ndarray) -> np.ndarray:
        """The cosine of each of these passages (int [k]) with the nearest of a query's positives, float64 [k]."""
        positives, nearest = self.positives[query], np.empty(len(rows))
        step = max(1, _PAIRS // max(1, len(positives)))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            cosines = self.cosines(np.repeat(some, len(positives)), np.tile(positives, len(some)))
            nearest[start : start + step] = cosines.reshape(len(some), -1).max(axis=1)
        return nearest

    def positive_scores(self) -> np.ndarray:
        """The score of each query with each of its positives, float64, in the order of ``positives.values``."""
        positives = self.positives
        return scores_of(self.query_vectors, positives.owners(), self.passage_vectors, positives.values)

    def in_window(
        self, queries: np.ndarray, rows: np.ndarray, window: tuple[int, int | np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of the queries' candidates (int [b], and int [b, k] best first) lie in the window.

        Forbidden ones take up no place in it. Its end may be one for each query, int [b].

        Returns:
            Those that do, bool [b, k]; the ranks, int [b, k], -1 of what has none; and how many before the window's
            end are forbidden to each query, int [b], however much further the lists go.
        """
        forbidden = self.forbidden.find(queries, rows) >= 0
        open_ = (rows >= 0) & ~forbidden
        n_open = np.cumsum(open_, axis=1)
        rank = np.where(open_, n_open - 1, -1)
        stop = np.reshape(window[1], (-1, 1))
        open_ &= (rank >= window[0]) & (rank < stop)
        return open_, rank, (forbidden & (n_open < stop)).sum(axis=1)
