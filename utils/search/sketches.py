"""Pairs that cannot reach a score, told apart by a few leading directions.

Split every vector along an orthonormal basis of a subspace: v = p + r, p inside it, r across it. Then
<v, w> = <p, q> + <r, s> <= <p, q> + |r| |s| (Cauchy-Schwarz), and the right side is the inner product of
two short vectors, p's coordinates with |r| appended. Where the subspace holds most of what tells the
vectors apart, that bound already lies below the threshold for nearly all pairs, at a fraction of the
full product's cost; the pairs that it leaves are scored canonically. The answer is the full search's.
"""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..kernels import onednn, search_loops
from ..process import runtime
from ..process.threads import in_threads
from .scores import Neighbors, evenly, plain, rounding_bound

logger = logging.getLogger(__name__)

# Rows that a basis is fitted to, those that are sketched at a time, and directions that a basis has at most.
SAMPLE_ROWS, _SKETCHED_ROWS = 3072, 512
# Products that are added up in float32.
_SUMMED = 128
_MOST_DIRECTIONS = 256
# Sketches' widths that are tried are multiples of this, or of what the processor takes of bfloat16 at once: other
# widths take as much time as the next multiple, or twice that.
_STEP, _ALIGNED = 16, 32
# What a pair of sketches costs besides its product's flops, and what scoring a pair costs, in units of one
# more dimension of the product (measured at 384 dimensions; only speed depends on them). And what a dimension
# costs where the product is one of bfloat16, and about what its rounding adds to a bound for unit vectors.
_PASS_COST, _PAIR_COST, _BFLOAT16_COST, _BFLOAT16_LOSS = 20, 30_000, 0.25, 0.004
# Screening must promise to take at most this share of the full product's time.
_WORTHWHILE = 0.8
# One product of sketches is at most this many queries by this many rows: 2 MB, about a core's own cache.
_QUERY_BLOCK, _ROW_BLOCK = 512, 1024
# Where products are our own and not written, by this many.
_AMX_ROW_BLOCK = 4096
# Pairs that are scored at a time.
_PAIRS = 2048


class Sketcher:
    """Makes the short vectors of float32 rows [n, d]: float32 [n, k + 1]; and the rows' norms, float64 [n].

    For Q the basis, s what comes out as Q'v, and e its error, |e| <= error |v|:

        <u, v> <= <Q'u, Q'v> + sqrt(|u|^2 - |Q'u|^2) sqrt(|v|^2 - |Q'v|^2)
        <Q'u, Q'v> <= <s_u, s_v> + 2.1 error |u| |v|,  |v|^2 - |Q'v|^2 <= |v|^2 - |s|^2 + 2.1 error |v|^2.

    Args:
        basis: float64 [d, k], orthonormal columns.

    Attributes:
        width: k + 1.
        error: as above. Parts of an inner product are added up in float32 and these in float64; numbers too small
            for float32 are made up for by norms that are 1e-30 too large.
    """

    def __init__(self, basis: np.ndarray):
        self._basis = basis.astype(np.float32)
        self.width = basis.shape[1] + 1
        self.error = 1.01 * basis.shape[1] ** 0.5 * (min(_SUMMED, len(basis)) + 2) * 2.0**-24

    def __call__(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sketches, norms = np.empty((len(vectors), self.width), np.float32), np.empty(len(vectors))

        def work(start: int) -> None:
            part = slice(start, start + _SKETCHED_ROWS)
            block = vectors[part]
            inside = np.zeros((len(block), self.width - 1))
            for first in range(0, len(self._basis), _SUMMED):
                some = slice(first, first + _SUMMED)
                inside += block[:, some] @ self._basis[some]
            search_loops.finish_sketches(block, inside, 2.2 * self.error, sketches[part], norms[part])

        in_threads(work, range(0, len(vectors), _SKETCHED_ROWS))
        return sketches, norms

    def slack(self, norms: float) -> float:
        """How far the product of two sketches, and then a canonical score, may lie beside what they stand for.

        For norms that multiply to ``norms``: the error, and the rounding of both products and of a threshold. A
        sketch is at most 1.01 as long as its vector.
        """
        return 2.1 * self.error * norms + 2 * rounding_bound(max(self.width, len(self._basis)) + 4, norms * 1.03)


def fit(sample: np.ndarray, threshold: float) -> Sketcher | None:
    """The sketcher that should find pairs at or above ``threshold`` soonest; None if the full product should.

    Args:
        sample: float32 [m, d], drawn from the vectors that will be compared. Only speed depends on it.
    """
    d = sample.shape[1]
    # Judged by other rows than it is fitted to, which it suits better than it suits the rest.
    # Every third one, because the rows come in the file's order, which may be by topic.
    judges = np.arange(len(sample)) % 3 == 0
    fitted, sample = sample[~judges], sample[judges]
    most = min(_MOST_DIRECTIONS, int(_WORTHWHILE * d), len(fitted))
    rounds = onednn.bfloat16_is_fast()
    step = _ALIGNED if rounds else _STEP
    if most < step:
        return None
    squares = np.einsum("ij,ij->i", sample, sample, dtype=np.float64)
    m, half = len(sample), len(sample) // 2
    bounds = np.zeros((half, m - half), np.float32)
    dimension, lowest = (_BFLOAT16_COST, threshold - _BFLOAT16_LOSS) if rounds else (1.0, threshold)
    best, cheapest = None, _WORTHWHILE * (d * dimension + _PASS_COST)
    basis = np.zeros((d, 0))
    for k in range(step - 1, most + 1, step):
        if (k + 1) * dimension + _PASS_COST >= cheapest:
            break  # even if no pair were left
        if k > basis.shape[1]:  # more than so many are seldom asked for
            basis = _leading_directions(fitted, min(most, 2 * k + 1))
            inside, known = sample @ basis.astype(np.float32), 0
            bounds[:] = 0
        bounds += inside[:half, known:k] @ inside[half:, known:k].T
        known = k
        rest = np.sqrt(np.maximum(squares - np.einsum("ij,ij->i", inside[:, :k], inside[:, :k]), 0)).astype(np.float32)
        left = np.mean(bounds + np.outer(rest[:half], rest[half:]) >= lowest)
        cost = (k + 1) * dimension + _PASS_COST + _PAIR_COST * left
        if cost < cheapest:
            best, cheapest = k, cost
    if best is None:
        return None
    logger.info("screening pairs by %d of %d dimensions", best, d)
    return Sketcher(basis[:, :best])


def _leading_directions(rows: np.ndarray, k: int) -> np.ndarray:
    """An orthonormal basis of about the k leading directions of rows [m, d], the leading ones first; float64 [d, k].

    By a randomised range finder with two power iterations (Halko, Martinsson and Tropp, 2011), seeded.
    """
    d = rows.shape[1]
    basis = np.random.default_rng(0).standard_normal((d, min(k + 16, d)))
    for _ in range(3):
        inside = rows @ basis.astype(np.float32)
        basis = np.linalg.qr((rows.T @ inside).astype(np.float64))[0]
    inside = rows @ basis.astype(np.float32)
    turned = np.linalg.eigh(inside.T @ inside)[1]  # ascending
    return np.linalg.qr(basis @ turned[:, ::-1][:, :k])[0]


class Sketched(NamedTuple):
    """Some rows, made ready for an index once for all that is done with them.

    vectors: float32 [n, d]. sketches: [n, width] in the type that is multiplied. residuals: float64 [n], how far
    that type's rounding took each sketch. norm: the largest of a vector.
    """

    vectors: np.ndarray
    sketches: np.ndarray
    residuals: np.ndarray
    norm: float


class _Queries(NamedTuple):
    """Some of the rows of ``vectors``: which, int64 [q], their sketches, and their lowest bounds that count."""

    vectors: np.ndarray
    which: np.ndarray
    sketches: np.ndarray
    cuts: np.ndarray


class ScreenedIndex:
    """Rows added in blocks, searched for the single best one at or above a floor.

    Holds the sketches only, and the vectors where ``source`` is None.

    Attributes:
        block_rows: how many rows ``prepare`` should be given at a time.
        divides_queries: whether ranks should each add all rows and search for some, and not add some and search for
            all: that takes less time, and no more memory than the sketches'.

    Args:
        capacity: room for rows.
        source: float32 [n, d] that holds every row which will be added; its row numbers are then ``add``'s.
    """

    block_rows = 16384

    def __init__(self, sketcher: Sketcher, dim: int, capacity: int, source: np.ndarray | None):
        from ..kernels.amx import matmul as amx_matmul

        self._sketcher, self._source = sketcher, None if source is None else plain(source)
        self.divides_queries = source is not None
        # In bfloat16 where that multiplies faster: half the memory, too.
        self._type = np.uint16 if onednn.bfloat16_is_fast() else np.float32
        aligned = _ALIGNED if self._type is np.uint16 else 1
        self._by_amx = self._type is np.uint16 and amx_matmul.supports_rows(aligned)
        self._sketches = onednn.empty((capacity, -(-sketcher.width // aligned) * aligned), self._type)
        self._residual = 0.0
        self._vectors = np.empty((capacity if source is None else 0, dim), np.float32)
        self._numbers = np.empty(capacity, np.int64)
        self._n, self._norm = 0, 0.0

    def prepare(self, vectors: np.ndarray, own: np.ndarray, complete: Callable[..., tuple]) -> Sketched:
        """Rows, float32 [n, d], as the other methods take them.

        Args:
            own: which of them we make the sketches of, int64.
            complete: gives arrays' rows [n, ...] from those of our own; the others come from elsewhere.
        """
        sketches, norms = self._sketcher(evenly(vectors, own))
        sketches, residuals, norms = complete(*self._rounded(sketches), norms)
        return Sketched(vectors, sketches, residuals, float(norms.max(initial=0.0)))

    def add(self, rows: Sketched, which: np.ndarray, numbers: np.ndarray) -> None:
        """Append some of the rows (int64 [n] ascending), known as ``numbers``, int64 [n] ascending."""
        new = slice(self._n, self._n + len(numbers))
        np.take(rows.sketches, which, axis=0, out=self._sketches[new])
        self._residual = max(self._residual, float(rows.residuals[which].max(initial=0.0)))
        if self._source is None:
            np.take(rows.vectors, which, axis=0, out=self._vectors[new])
        self._numbers[new] = numbers
        self._n = new.stop
        self._norm = max(self._norm, rows.norm)

    def search(self, rows: Sketched, which: np.ndarray, floor: float) -> Neighbors:
        """The best of some of the rows (int64 [n] ascending) by canonical score, if at least ``floor``; k = 1."""
        n = len(which)
        best = Neighbors.none(n, 1)
        if self._n == 0 or n == 0:
            return best
        cuts = self._cuts(rows, which, self._norm, self._residual, floor)
        size = min(_QUERY_BLOCK, -(-n // runtime.cpu_threads()))

        def work(start: int) -> None:
            part = slice(start, start + size)
            result = best.scores[part, 0], best.rows[part, 0]
            queries = _Queries(rows.vectors, which[part], rows.sketches[which[part]], cuts[part])
            self._search_block(queries, floor, *result)

        in_threads(work, range(0, n, size))
        return best

    def near(self, rows: Sketched, part: np.ndarray, floor: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pairs that may reach ``floor``, of a part of the rows with all that come before the last of them.

        Args:
            part: int64, ascending.

        Yields:
            Places in ``part``, and the numbers of the other rows, int64 [pairs] twice.
        """
        cuts = self._cuts(rows, part, rows.norm, float(rows.residuals.max(initial=0.0)), floor)
        yield from self._reaching(rows.sketches[part], rows.sketches[: part[-1]], cuts)

    def _cuts(self, rows: Sketched, which: np.ndarray, norm: float, residual: float, floor: float) -> np.ndarray:
        """Lowest bounds, float32 [n], that a pair of some of the rows with others may have and reach ``floor``.

        Args:
            norm, residual: the largest of the others.
        """
        slack = self._sketcher.slack(norm * rows.norm)
        # What rounding may have taken from a product of sketches.
        residuals = rows.residuals[which]
        lost = 1.02 * (residuals * norm + (rows.norm + residuals) * residual)
        return (floor - slack - lost).astype(np.float32)

    def _multiply(self, left: np.ndarray, right: np.ndarray, bounds: np.ndarray) -> None:
        """``bounds`` become the products of two blocks of sketches."""
        if self._type is np.uint16:
            onednn.matmul(left, right.T, bounds)
        else:
            np.matmul(left, right.T, out=bounds)

    def _rounded(self, sketches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sketches in the type that is multiplied, and how far each then lies from itself, float64 [n]."""
        wide = np.zeros((len(sketches), self._sketches.shape[1]), np.float32)
        wide[:, : sketches.shape[1]] = sketches
        if self._type is np.float32:
            return wide, np.zeros(len(wide))
        rounded = onednn.to_bfloat16(wide)
        return rounded, search_loops.sizes(wide, np.zeros(wide.shape[1], np.float32), rounded)[1]

    def _search_block(self, queries: "_Queries", floor: float, score: np.ndarray, row: np.ndarray) -> None:
        """Fills in ``score`` and ``row`` of one block of queries."""
        waiting: list[np.ndarray] = []
        n_waiting = 0
        for pairs in self._reaching(queries.sketches, self._sketches[: self._n], queries.cuts):
            waiting.append(np.stack(pairs))
            n_waiting += len(pairs[0])
            if n_waiting > _PAIRS:
                self._take(queries, waiting, floor, score, row)
                waiting, n_waiting = [], 0
        if waiting:
            self._take(queries, waiting, floor, score, row)

    def _reaching(
        self, left: np.ndarray, right: np.ndarray, cuts: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pairs of sketches whose product reaches the left one's cut, block by block: rows of both, int64 [n > 0].

        They stay what they are until the next block.
        """
        if self._by_amx:
            yield from self._reaching_by_amx(left, right, cuts)
            return
        product = onednn.empty(len(left) * _ROW_BLOCK, np.float32)
        found = np.empty((2, len(product)), np.int64)
        for start in range(0, len(right), _ROW_BLOCK):
            block = right[start : start + _ROW_BLOCK]
            bounds = product[: len(left) * len(block)].reshape(len(left), len(block))
            self._multiply(left, block, bounds)
            n = search_loops.reaching(bounds, cuts, start, found)
            if n:
                yield found[0, :n], found[1, :n]

    def _reaching_by_amx(
        self, left: np.ndarray, right: np.ndarray, cuts: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from ..kernels.amx import matmul as amx_matmul

        packed = amx_matmul.Packed.of_rows(left)
        filled_up = np.full(-(-len(cuts) // _ALIGNED) * _ALIGNED, np.inf, np.float32)
        filled_up[: len(cuts)] = cuts
        scratch, nothing = amx_matmul.Scratch.of(_AMX_ROW_BLOCK, packed), np.zeros(_AMX_ROW_BLOCK, np.float32)
        for start in range(0, len(right), _AMX_ROW_BLOCK):
            found = packed.reaching(right[start : start + _AMX_ROW_BLOCK], nothing, filled_up, start, scratch)
            if len(found.rows):
                yield found.columns, found.rows

    def _take(
        self, queries: "_Queries", pairs: list[np.ndarray], floor: float, score: np.ndarray, row: np.ndarray
    ) -> None:
        """Score pairs and keep each query's best; of equals, the one with the lower row."""
        query, place = np.concatenate(pairs, axis=1)
        numbers = self._numbers[place]
        others, among = (self._vectors, place) if self._source is None else (self._source, numbers)
        exact = search_loops.score_pairs(queries.vectors, queries.which[query], others, among)
        reach = np.flatnonzero(exact >= floor)
        query, numbers, exact = query[reach], numbers[reach], exact[reach]
        order = np.lexsort((numbers, -exact, query))
        query, numbers, exact = query[order], numbers[order], exact[order]
        leads = np.diff(query, prepend=-1) > 0
        leads &= exact > score[query]
        score[query[leads]], row[query[leads]] = exact[leads], numbers[leads]
