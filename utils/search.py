"""Nearest rows by inner product, exact to the last bit that matters, in bounded blocks.

Matrix products only *screen*: those of other shapes round differently, and in bfloat16, where the processor
multiplies it natively, they take a fraction of the time. Whatever lies within the rounding bound of the cut
is kept, and one canonical score per surviving pair decides, with ties going to the lower row number. The
result is therefore the same for any block size, arithmetic, thread count, device and number of ranks.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from utils import matmul, runtime, search_kernels
from utils.distributed import BLOCK_BYTES, Ranks
from utils.mapped import release
from utils.scores import Neighbors, best_of_pairs, largest_norm, merge, plain, rounding_bound
from utils.threads import in_threads

logger = logging.getLogger(__name__)

# Queries that are taken through the corpus together, fewer if they want many neighbours each; a block of the
# corpus is made ready once for all of them.
_QUERY_BLOCK, _NEIGHBORS = 8192, 1 << 20
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
# Queries that rank 0 sends round at a time, fewer if they want many neighbours each.
_EXCHANGE_QUERIES, _EXCHANGE_NEIGHBORS = 8192, 1 << 20
# Rows that faiss is asked for on a GPU beyond k.
_EXTRA = 32


class _Shape(NamedTuple):
    """What the bounds need to know of some rows.

    centre: float32 [d], about their mean. norm, residual: the largest norm of a row less the centre, and of
    what rounding that to bfloat16 takes from it.
    """

    centre: np.ndarray
    norm: float
    residual: float

    @classmethod
    def of(cls, vectors: np.ndarray, centre: np.ndarray | None = None) -> "_Shape":
        """Of float32 rows [n, d]; about their own mean (n > 0) if no centre is given."""
        if centre is None:
            centre = _mean(vectors)
        norm = residual = 0.0
        for start in range(0, len(vectors), _SAMPLE_ROWS):
            block = plain(vectors[start : start + _SAMPLE_ROWS])
            norms, residuals = search_kernels.sizes(block, centre, matmul.to_bfloat16(block - centre))
            norm, residual = max(norm, float(norms.max())), max(residual, float(residuals.max()))
            release(block)
        return cls(centre, norm, residual)

    def joined(self, vectors: np.ndarray) -> "_Shape":
        """Of these rows and more, about the same centre."""
        return self.covering([_Shape.of(vectors, self.centre)])

    def covering(self, others: Sequence["_Shape"]) -> "_Shape":
        """Of these rows and those of others, about the same centre."""
        shapes = [self, *others]
        return _Shape(self.centre, max(s.norm for s in shapes), max(s.residual for s in shapes))


def _mean(vectors: np.ndarray) -> np.ndarray:
    """About the mean of float32 rows [n, d], n > 0."""
    starts = np.linspace(0, max(0, len(vectors) - _SAMPLE_RUN), _SAMPLE_ROWS // _SAMPLE_RUN, dtype=int)
    return np.mean([vectors[start : start + _SAMPLE_RUN].mean(axis=0) for start in starts], axis=0)


class ExactIndex:
    """Rows to be searched exactly: an array as it is (memory-mapped is fine), or rows added in blocks.

    Args:
        dim: the width of the rows.
        capacity: room for rows that will be added.
        vectors: float32 [n, dim] to search where it lies, instead of adding.
        device: ``"cpu"`` or ``"gpu"`` (faiss-gpu).
        shape: of ``vectors``, if it is known.
    """

    def __init__(
        self,
        dim: int,
        capacity: int = 0,
        vectors: np.ndarray | None = None,
        device: str = "cpu",
        shape: _Shape | None = None,
    ):
        self.dim = dim
        self._rows = np.empty((capacity, dim), np.float32) if vectors is None else vectors
        self._n = 0 if vectors is None else len(vectors)
        self._shape = _Shape.of(self.vectors) if self._n and shape is None else shape
        self._gpu = _Gpu() if device == "gpu" and gpu_is_usable() else None

    def __len__(self) -> int:
        return self._n

    @property
    def vectors(self) -> np.ndarray:
        """The rows, float32 [n, dim]."""
        return self._rows[: self._n]

    def add(self, vectors: np.ndarray) -> None:
        """Append rows, float32 [m, dim]; the capacity must allow it."""
        assert self._n + len(vectors) <= len(self._rows)
        self._rows[self._n : self._n + len(vectors)] = vectors
        self._n += len(vectors)
        if len(vectors):
            self._shape = _Shape.of(vectors) if self._shape is None else self._shape.joined(vectors)

    def search(self, queries: np.ndarray, k: int, floor: float = -np.inf) -> Neighbors:
        """The ``k`` best rows of each query whose canonical score is at least ``floor``.

        Args:
            queries: float32 [q, dim].
        """
        result = Neighbors.none(len(queries), k)
        if self._n == 0 or len(queries) == 0:
            return result
        if self._gpu is not None:
            slack = rounding_bound(self.dim, largest_norm(self.vectors) * largest_norm(queries))
            left = self._gpu.search(queries, self.vectors, k, floor, slack, result)
            if len(left):
                redone = self._search_on_cpu(queries[left], k, floor)
                result.scores[left], result.rows[left] = redone
            return result
        return self._search_on_cpu(queries, k, floor)

    def begin(self, queries: np.ndarray, k: int, floor: float = -np.inf) -> "_Begun":
        """``search``, up to where other indexes' results can spare this one some work.

        Keeps about 50 k bytes for each query.
        """
        if self._n == 0 or self._gpu is not None:
            return _Begun(self.search(queries, k, floor))
        result = Neighbors.none(len(queries), k)
        parts = self._blocks(len(queries), k)
        blocks = in_threads(lambda start: self._screened(queries[parts[start]], k, floor), range(len(parts)))
        return _Begun(result, list(zip(parts, blocks, strict=True)))

    def _search_on_cpu(self, queries: np.ndarray, k: int, floor: float) -> Neighbors:
        result = Neighbors.none(len(queries), k)
        parts = self._blocks(len(queries), k)

        def work(number: int) -> None:
            part = parts[number]
            self._screened(queries[part], k, floor).settle(Neighbors(result.scores[part], result.rows[part]))

        in_threads(work, range(len(parts)))
        return result

    def _blocks(self, n: int, k: int) -> list[slice]:
        """The queries that go through the corpus together."""
        size = min(_about(min(_QUERY_BLOCK, max(1, _NEIGHBORS // k)), n), -(-n // runtime.cpu_threads()))
        return [slice(start, start + size) for start in range(0, n, size)]

    def _screened(self, queries: np.ndarray, k: int, floor: float) -> "_Candidates":
        """What the whole corpus leaves of one block's pairs."""
        queries, corpus = np.array(queries, np.float32), self.vectors
        screen = _screen(queries, self._shape)
        found = _Candidates(queries, corpus, k, floor, screen)
        for start in range(0, len(corpus), screen.block[1]):
            rows = plain(corpus[start : start + screen.block[1]])
            screen.go_through(rows, start, found)
            release(rows)
        return found.finish()


class _Screen:
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

    def go_through(self, rows: np.ndarray, first_row: int, found: "_Candidates") -> None:
        """Score all queries with rows of the corpus, float32 [n, d], and put what counts into ``found``."""
        self.take(rows)
        n, at_once = len(self.offset), self.block[0]
        product = matmul.empty(at_once * len(rows), np.float32)
        for first in range(0, n, at_once):
            part = slice(first, min(first + at_once, n))
            scores = product[: (part.stop - part.start) * len(rows)].reshape(-1, len(rows))
            self.multiply(part, scores)
            found.collect(part, scores, first_row)


class _Float32Screen(_Screen):
    """By NumPy's product."""

    block = _FLOAT32_BLOCK

    def __init__(self, queries: np.ndarray, corpus: _Shape):
        self._queries = queries
        norms = np.linalg.norm(queries.astype(np.float64), axis=1)
        norm = corpus.norm + np.linalg.norm(corpus.centre.astype(np.float64))
        self.offset = np.zeros(len(queries))
        self.slack = rounding_bound(queries.shape[1] + _ROUNDINGS, norms * norm)

    def take(self, rows: np.ndarray) -> None:
        self._rows = rows

    def multiply(self, part: slice, scores: np.ndarray) -> None:
        np.matmul(self._queries[part], self._rows.T, out=scores)


class _Bfloat16Screen(_Screen):
    """By oneDNN's product of bfloat16, added up in float32.

    Rounding to 8 bits costs less where vectors are short, and models give vectors that are mostly their
    common mean. With the queries' mean c and the corpus's m, and q' = q - c, p' = p - m:

        <q, p> = <q', p'> + <c, p'> + <q, m>,

    of which the second depends on the row alone and the third, the offset, on the query alone. For q' and p'
    rounded to r and s, <q', p'> - <r, s> = <q' - r, p'> + <r, p' - s>, by Cauchy and Schwarz at most
    |q' - r| |p'| + |r| |p' - s|.
    """

    block = _BFLOAT16_BLOCK

    def __init__(self, queries: np.ndarray, corpus: _Shape):
        self._centre, self._corpus_centre = queries.mean(axis=0), corpus.centre
        self._queries = matmul.to_bfloat16(queries - self._centre)
        norms, residuals = search_kernels.sizes(queries, self._centre, self._queries)
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
        self._rows, self._shift = matmul.to_bfloat16(centred), centred @ self._centre

    def multiply(self, part: slice, scores: np.ndarray) -> None:
        matmul.matmul(self._queries[part], self._rows.T, scores, self._shift)


class _AmxScreen(_Bfloat16Screen):
    """The same by our own product, which writes no more than the scores that reach their query's cut."""

    def __init__(self, queries: np.ndarray, corpus: _Shape):
        from utils import amx_matmul

        super().__init__(queries, corpus)
        self._packed = amx_matmul.Packed.of_rows(self._queries)
        self._scratch = amx_matmul.Scratch.of(_AMX_ROWS, self._packed)

    def go_through(self, rows: np.ndarray, first_row: int, found: "_Candidates") -> None:
        self.take(rows)
        for start in range(0, len(rows), _AMX_ROWS):
            part = slice(start, start + _AMX_ROWS)
            pairs = self._packed.reaching(
                self._rows[part], self._shift[part], found.cuts, first_row + start, self._scratch
            )
            found.collect_pairs(*pairs)


def _screen(queries: np.ndarray, corpus: _Shape) -> _Screen:
    """The fastest for this processor and these queries, float32 [q, d]."""
    from utils import amx_matmul

    if not matmul.bfloat16_is_fast():
        return _Float32Screen(queries, corpus)
    return (_AmxScreen if amx_matmul.supports_rows(queries.shape[1]) else _Bfloat16Screen)(queries, corpus)


class _Candidates:
    """The screened pairs of one block of queries that may still be among the k best."""

    def __init__(self, queries: np.ndarray, corpus: np.ndarray, k: int, floor: float, screen: _Screen):
        width = max(_CANDIDATES * k, _FEWEST_CANDIDATES) + search_kernels.CHUNK
        self._problem = search_kernels.Problem(queries, plain(corpus), k, screen.offset, screen.slack)
        self._floor = floor
        # Filled up to whole tiles.
        self.cuts = np.full(-(-len(queries) // _TILE) * _TILE, np.inf, np.float32)
        self.cuts[: len(queries)] = floor - screen.offset - screen.slack
        self._state = search_kernels.State(
            self.cuts,
            np.zeros(len(queries), np.int64),
            np.empty((len(queries), width), np.float32),
            np.empty((len(queries), width), np.int64),
        )

    def collect(self, part: slice, scores: np.ndarray, first_row: int) -> None:
        """Take in the screened scores, float32 [q, n], of a part of the queries and rows from ``first_row`` on."""
        search_kernels.collect(scores, part.start, first_row, self._problem, self._state)

    def collect_pairs(self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """The same of pairs that are given by their numbers, int64 [n] twice, and scores, float32 [n]."""
        search_kernels.collect_pairs(queries, rows, scores, self._problem, self._state)

    def finish(self) -> "_Candidates":
        """No more will come: drop those that a query's k best leave no hope."""
        search_kernels.clear_all(self._problem, self._state)
        return self

    def lower_bounds(self) -> np.ndarray:
        """What the canonical scores of each query's k best are at least, float32 [q, k], in any order."""
        scores = np.where(self._are_left(), self._state.scores, np.float32(-np.inf))
        k, problem = self._problem.k, self._problem
        best = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k:]
        return _below(best + (problem.offset - problem.slack)[:, None])

    def settle(self, result: Neighbors, cut: np.ndarray | float = -np.inf) -> None:
        """Fill in the k best of each query by canonical score, leaving out what cannot reach ``cut``, float32 [q]."""
        problem = self._problem
        lowest = _below(cut - problem.offset - problem.slack)
        left = self._are_left() & (self._state.scores >= lowest[:, None])
        query = np.repeat(np.arange(len(left)), left.sum(axis=1))
        best_of_pairs(problem.queries, problem.corpus, query, self._state.rows[left], self._floor, result)

    def _are_left(self) -> np.ndarray:
        return np.arange(self._state.rows.shape[1]) < self._state.count[:, None]


class _Begun:
    """A search that is screened, and settled only once ``cut`` says what counts.

    Args:
        result: the finished one, if there is nothing to settle.
        blocks: some queries' place in the result, and their candidates.
    """

    def __init__(self, result: Neighbors, blocks: Sequence[tuple[slice, _Candidates]] = ()):
        self._result, self._blocks = result, blocks

    def lower_bounds(self) -> np.ndarray:
        """See ``_Candidates``."""
        bounds = _below(self._result.scores)
        for part, found in self._blocks:
            bounds[part] = found.lower_bounds()
        return bounds

    def finish(self, cut: np.ndarray) -> Neighbors:
        """The k best of each query, but for those whose canonical score cannot reach its cut, float32 [q]."""

        def work(number: int) -> None:
            part, found = self._blocks[number]
            found.settle(Neighbors(self._result.scores[part], self._result.rows[part]), cut[part])

        in_threads(work, range(len(self._blocks)))
        return self._result


def _about(size: int, n: int) -> int:
    """What divides ``n`` into parts of much the same size, at most half as many again as ``size``.

    A small part would cost a whole pass over the corpus, too.
    """
    return -(-n // max(1, round(n / size))) if n else size


def _below(scores: np.ndarray) -> np.ndarray:
    """Float32 that are no larger."""
    return np.nextafter(scores.astype(np.float32), np.float32(-np.inf))


class ShardedIndex:
    """A corpus that all ranks search together; rank 0 owns it, and the queries.

    Where all ranks can map the corpus, each takes its share of the queries through the whole of it. Elsewhere each
    holds a part of the corpus, and takes all queries through that.
    """

    def __init__(self, ranks: Ranks, dim: int, device: str = "cpu"):
        self.ranks, self.dim, self.device = ranks, dim, device
        self._index: ExactIndex | None = None
        self._is_whole = False
        self._row_numbers = np.zeros(0, np.int64)

    @classmethod
    def of(cls, ranks: Ranks, vectors: np.ndarray | None, n: int, dim: int, device: str = "cpu") -> "ShardedIndex":
        """Of rank 0's ``vectors``, float32 [n, dim], None elsewhere."""
        self = cls(ranks, dim, device)
        whole = ranks.mapped(vectors)
        bounds = np.linspace(0, n, ranks.size + 1).astype(np.int64)
        mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
        if whole is not None:
            self._is_whole = True
            shape = None
            if n > 0:
                own = _Shape.of(whole[mine], _mean(whole))
                shape = own.covering(ranks.gather_object(own))
            self._index = ExactIndex(dim, vectors=whole, device=device, shape=shape)
            return self
        self._row_numbers = np.arange(n)[mine]
        self._index = ExactIndex(dim, capacity=len(self._row_numbers), device=device)
        step = max(1, BLOCK_BYTES // (4 * dim))
        for start in range(0, n, step):
            block = vectors[start : start + step] if vectors is not None else None
            block = ranks.broadcast(block, (min(step, n - start), dim))
            low, high = max(mine.start - start, 0), min(mine.stop - start, len(block))
            if low < high:
                self._index.add(block[low:high])
        return self

    def search(self, queries: np.ndarray, k: int, floor: float = -np.inf) -> Neighbors:
        """As ExactIndex.search; every rank passes the same queries and gets the result."""
        assert self._index is not None
        if self.ranks.size == 1:
            return self._index.search(queries, k, floor)
        return (self._by_queries if self._is_whole else self._by_parts)(self._index, queries, k, floor)

    def _by_queries(self, index: ExactIndex, queries: np.ndarray, k: int, floor: float) -> Neighbors:
        """Each rank searches for its share of the queries."""
        share = -(-len(queries) // self.ranks.size)
        own = queries[self.ranks.rank * share : (self.ranks.rank + 1) * share]
        found = Neighbors.none(share, k)
        found.scores[: len(own)], found.rows[: len(own)] = index.search(own, k, floor)
        gathered = (np.concatenate(self.ranks.gather_equal(part))[: len(queries)] for part in found)
        return Neighbors(*gathered)

    def _by_parts(self, index: ExactIndex, queries: np.ndarray, k: int, floor: float) -> Neighbors:
        """Each rank searches its part.

        It would score k rows of its own, of which the k best of all need only a share: so the ranks first agree
        on what the k-th best of all reaches at least.
        """
        begun = index.begin(queries, k, floor)
        bounds = np.concatenate(self.ranks.gather_equal(begun.lower_bounds()), axis=1)
        local = begun.finish(np.partition(bounds, -k, axis=1)[:, -k])
        rows = np.where(local.rows < 0, -1, self._row_numbers[local.rows] if len(self._row_numbers) else -1)
        parts = zip(self.ranks.gather_equal(local.scores), self.ranks.gather_equal(rows), strict=True)
        return merge([Neighbors(scores, rows) for scores, rows in parts], k)

    def search_all(self, queries: np.ndarray | None, n: int, k: int, floor: float = -np.inf) -> Neighbors:
        """As ``search`` for rank 0's queries (float32 [n, dim], None elsewhere), block by block."""
        result = Neighbors(np.empty((n, k)), np.empty((n, k), np.int64))
        size = min(_EXCHANGE_QUERIES, max(1, _EXCHANGE_NEIGHBORS // k)) * (self.ranks.size if self._is_whole else 1)
        size = _about(size, n)
        for start in range(0, n, size):
            part = slice(start, start + size)
            block = np.array(queries[part], np.float32) if queries is not None else None
            block = self.ranks.broadcast(block, (min(size, n - start), self.dim))
            if queries is not None:
                release(queries[part])
            result.scores[part], result.rows[part] = self.search(block, k, floor)
        runtime.give_back_memory()
        return result


class _Gpu:
    """faiss-gpu's brute force as the screen; the canonical scores are still taken on the CPU."""

    def __init__(self) -> None:
        import faiss

        self.faiss = faiss
        self.resources = faiss.StandardGpuResources()

    def search(
        self, queries: np.ndarray, corpus: np.ndarray, k: int, floor: float, slack: float, result: Neighbors
    ) -> np.ndarray:
        """Fill ``result`` and return the queries whose near-ties reach past what was fetched."""
        width = min(k + _EXTRA, len(corpus), 2048)
        screened, rows = self.faiss.knn_gpu(
            self.resources, queries, corpus, width, metric=self.faiss.METRIC_INNER_PRODUCT
        )
        last = screened[:, min(k, width) - 1]
        cut = np.maximum(last, floor + slack) - 2 * slack
        unsettled = (screened[:, -1] >= cut) & (width < len(corpus))
        done = np.flatnonzero(~unsettled)
        settled = Neighbors.none(len(done), k)
        query = np.repeat(np.arange(len(done)), width)
        best_of_pairs(queries[done], corpus, query, rows[done].reshape(-1), floor, settled)
        result.scores[done], result.rows[done] = settled
        return np.flatnonzero(unsettled)


@cache
def gpu_is_usable() -> bool:
    """True if faiss was built for GPUs and sees one."""
    import faiss

    usable = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if not usable:
        logger.warning("faiss has no GPU support here; searching on the CPU (see requirements-gpu.txt)")
    return usable
