"""What matrix products leave of a search: the pairs that may be among the best, whatever the arithmetic.

Products score roughly, and say by how much they may be wrong: by the bound on the rounding of their sums, and in
bfloat16 by Cauchy's and Schwarz's on what rounding took from the vectors. Pairs within that of a query's cut stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..kernels import onednn, search_loops
from ..ranks.mapped import release
from .scores import Neighbors, best_of_pairs, plain, rounding_bound

# One screening product is at most this many queries by this many corpus rows, which stay in the cache while
# they are compared: 4 MB for bfloat16, 8 MB for float32.
_BFLOAT16_BLOCK, _FLOAT32_BLOCK = (512, 2048), (512, 4096)
# Rows between two looks at the cuts where products are our own, and what queries are filled up to a multiple of.
_AMX_ROWS, _TILE = 256, 32
# Rows that are looked at together; and as many, in runs of so many, give about the mean of all.
_SAMPLE_ROWS, _SAMPLE_RUN = 4096, 256
# Room for the candidates of a query, as a multiple of k; and at least.
_CANDIDATES, _FEWEST_CANDIDATES = 3, 64
# Roundings that a screened score goes through besides those of its sum.
_ROUNDINGS = 4


class Shape(NamedTuple):
    """What the bounds need to know of some rows.

    centre: float32 [d], about their mean. norm, residual: the largest norm of a row less the centre, and of
    what rounding that to bfloat16 takes from it.
    """

    centre: np.ndarray
    norm: float
    residual: float

    @classmethod
    def of(cls, vectors: np.ndarray, centre: np.ndarray | None = None) -> "Shape":
        """Of float32 rows [n, d]; about their own mean (n > 0) if no centre is given."""
        if centre is None:
            centre = mean_of(vectors)
        norm = residual = 0.0
        for start in range(0, len(vectors), _SAMPLE_ROWS):
            block = plain(vectors[start : start + _SAMPLE_ROWS])
            norms, residuals = search_loops.sizes(block, centre, onednn.to_bfloat16(block - centre))
            norm, residual = max(norm, float(norms.max())), max(residual, float(residuals.max()))
            release(block)
        return cls(centre, norm, residual)

    def joined(self, vectors: np.ndarray) -> "Shape":
        """Of these rows and more, about the same centre."""
        return self.covering([Shape.of(vectors, self.centre)])

    def covering(self, others: Sequence["Shape"]) -> "Shape":
        """Of these rows and those of others, about the same centre."""
        shapes = [self, *others]
        return Shape(self.centre, max(s.norm for s in shapes), max(s.residual for s in shapes))


def mean_of(vectors: np.ndarray) -> np.ndarray:
    """About the mean of float32 rows [n, d], n > 0."""
    starts = np.linspace(0, max(0, len(vectors) - _SAMPLE_RUN), _SAMPLE_ROWS // _SAMPLE_RUN, dtype=int)
    return np.mean([vectors[start : start + _SAMPLE_RUN].mean(axis=0) for start in starts], axis=0)


class Screen:
    """Scores of queries with rows of the corpus by matrix products.

    Attributes:
        block: the most queries and rows that one product is of.
        offset: float64 [q], what a screened score lacks of the canonical one.
        slack: float64 [q], how far the two may lie apart besides.
    """

    block: tuple[int, int]
    offset: np.ndarray
    slack: np.ndarray

    def take(self, rows: np.ndarray) -> None:
        """The corpus rows, float32 [n, d], to score next."""
        raise NotImplementedError

    def multiply(self, part: slice, scores: np.ndarray) -> None:
        """``scores``, float32 [q, n], become those of a part of the queries with these rows."""
        raise NotImplementedError

    def go_through(self, rows: np.ndarray, first_row: int, found: "Candidates") -> None:
        """Score all queries with rows of the corpus, float32 [n, d], and put what counts into ``found``."""
        self.take(rows)
        n, at_once = len(self.offset), self.block[0]
        product = onednn.empty(at_once * len(rows), np.float32)
        for first in range(0, n, at_once):
            part = slice(first, min(first + at_once, n))
            scores = product[: (part.stop - part.start) * len(rows)].reshape(-1, len(rows))
            self.multiply(part, scores)
            found.collect(part, scores, first_row)


class Float32Screen(Screen):
    """By NumPy's product."""

    block = _FLOAT32_BLOCK

    def __init__(self, queries: np.ndarray, corpus: Shape):
        self._queries = queries
        norms = np.linalg.norm(queries.astype(np.float64), axis=1)
        norm = corpus.norm + np.linalg.norm(corpus.centre.astype(np.float64))
        self.offset = np.zeros(len(queries))
        self.slack = rounding_bound(queries.shape[1] + _ROUNDINGS, norms * norm)

    def take(self, rows: np.ndarray) -> None:
        self._rows = rows

    def multiply(self, part: slice, scores: np.ndarray) -> None:
        np.matmul(self._queries[part], self._rows.T, out=scores)


class Bfloat16Screen(Screen):
    """By oneDNN's product of bfloat16, added up in float32.

    Rounding to 8 bits costs less where vectors are short, and models give vectors that are mostly their
    common mean. With the queries' mean c and the corpus's m, and q' = q - c, p' = p - m:

        <q, p> = <q', p'> + <c, p'> + <q, m>,

    of which the second depends on the row alone and the third, the offset, on the query alone. For q' and p'
    rounded to r and s, <q', p'> - <r, s> = <q' - r, p'> + <r, p' - s>, by Cauchy and Schwarz at most
    |q' - r| |p'| + |r| |p' - s|.
    """

    block = _BFLOAT16_BLOCK

    def __init__(self, queries: np.ndarray, corpus: Shape):
        self._centre, self._corpus_centre = queries.mean(axis=0), corpus.centre
        self._queries = onednn.to_bfloat16(queries - self._centre)
        norms, residuals = search_loops.sizes(queries, self._centre, self._queries)
        self.offset = queries.astype(np.float64) @ corpus.centre.astype(np.float64)
        centre, corpus_centre = (np.linalg.norm(c.astype(np.float64)) for c in (self._centre, corpus.centre))
        norms_rounded, norm_rounded = norms + residuals, corpus.norm + corpus.residual
        rounded = residuals * corpus.norm + norms_rounded * corpus.residual
        # Twice the bound: the processor may add two products up before it rounds.
        summed = 2 * norms_rounded * norm_rounded + centre * norm_rounded
        # The offset's own rounding and the canonical score's, both of float64: all there is where p' is next to 0.
        longest = (norms + centre) * (corpus_centre + corpus.norm)
        in_float64 = 2 * (queries.shape[1] + 2) * 2.0**-53 * longest
        self.slack = 1.0001 * rounded + rounding_bound(queries.shape[1] + _ROUNDINGS, summed) + in_float64

    def take(self, rows: np.ndarray) -> None:
        centred = rows - self._corpus_centre
        self._rows, self._shift = onednn.to_bfloat16(centred), centred @ self._centre

    def multiply(self, part: slice, scores: np.ndarray) -> None:
        onednn.matmul(self._queries[part], self._rows.T, scores, self._shift)


class AmxScreen(Bfloat16Screen):
    """The same by our own product, which writes no more than the scores that reach their query's cut."""

    def __init__(self, queries: np.ndarray, corpus: Shape):
        from ..kernels.amx import matmul as amx_matmul

        super().__init__(queries, corpus)
        self._packed = amx_matmul.Packed.of_rows(self._queries)
        self._scratch = amx_matmul.Scratch.of(_AMX_ROWS, self._packed)

    def go_through(self, rows: np.ndarray, first_row: int, found: "Candidates") -> None:
        self.take(rows)
        for start in range(0, len(rows), _AMX_ROWS):
            part = slice(start, start + _AMX_ROWS)
            pairs = self._packed.reaching(
                self._rows[part], self._shift[part], found.cuts, first_row + start, self._scratch
            )
            found.collect_pairs(*pairs)


def screen_of(queries: np.ndarray, corpus: Shape) -> Screen:
    """The fastest for this processor and these queries, float32 [q, d]."""
    from ..kernels.amx import matmul as amx_matmul

    if not onednn.bfloat16_is_fast():
        return Float32Screen(queries, corpus)
    return (AmxScreen if amx_matmul.supports_rows(queries.shape[1]) else Bfloat16Screen)(queries, corpus)


class Candidates:
    """The screened pairs of one block of queries that may still be among the k best."""

    def __init__(self, queries: np.ndarray, corpus: np.ndarray, k: int, floor: float, screen: Screen):
        width = max(_CANDIDATES * k, _FEWEST_CANDIDATES) + search_loops.CHUNK
        self._problem = search_loops.Problem(queries, plain(corpus), k, screen.offset, screen.slack)
        self._floor = floor
        # Filled up to whole tiles.
        self.cuts = np.full(-(-len(queries) // _TILE) * _TILE, np.inf, np.float32)
        self.cuts[: len(queries)] = floor - screen.offset - screen.slack
        self._state = search_loops.State(
            self.cuts,
            np.zeros(len(queries), np.int64),
            np.empty((len(queries), width), np.float32),
            np.empty((len(queries), width), np.int64),
        )

    def collect(self, part: slice, scores: np.ndarray, first_row: int) -> None:
        """Take in the screened scores, float32 [q, n], of a part of the queries and rows from ``first_row`` on."""
        search_loops.collect(scores, part.start, first_row, self._problem, self._state)

    def collect_pairs(self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """The same of pairs that are given by their numbers, int64 [n] twice, and scores, float32 [n]."""
        search_loops.collect_pairs(queries, rows, scores, self._problem, self._state)

    def finish(self) -> "Candidates":
        """No more will come: drop those that a query's k best leave no hope."""
        search_loops.clear_all(self._problem, self._state)
        return self

    def lower_bounds(self) -> np.ndarray:
        """What the canonical scores of each query's k best are at least, float32 [q, k], in any order."""
        scores = np.where(self._are_left(), self._state.scores, np.float32(-np.inf))
        k, problem = self._problem.k, self._problem
        best = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k:]
        return below(best + (problem.offset - problem.slack)[:, None])

    def settle(self, result: Neighbors, cut: np.ndarray | float = -np.inf) -> None:
        """Fill in the k best of each query by canonical score, leaving out what cannot reach ``cut``, float32 [q]."""
        problem = self._problem
        lowest = below(cut - problem.offset - problem.slack)
        left = self._are_left() & (self._state.scores >= lowest[:, None])
        query = np.repeat(np.arange(len(left)), left.sum(axis=1))
        best_of_pairs(problem.queries, problem.corpus, query, self._state.rows[left], self._floor, result)

    def _are_left(self) -> np.ndarray:
        return np.arange(self._state.rows.shape[1]) < self._state.count[:, None]


def below(scores: np.ndarray) -> np.ndarray:
    """Float32 that are no larger."""
    return np.nextafter(scores.astype(np.float32), np.float32(-np.inf))
