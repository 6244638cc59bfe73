"""Nearest rows by inner product, exact to the last bit that matters, in bounded blocks.

Float32 matrix products of other shapes round differently, so they only *screen*: whatever lies within
the rounding bound of the cut is kept, and one float64 dot product per surviving pair (``pair_scores``)
decides, with ties going to the lower row number. The result is therefore the same for any block size,
thread count, device and number of ranks.
"""

import logging
from functools import cache
from typing import NamedTuple

import numpy as np

from utils import runtime
from utils.distributed import BLOCK_BYTES, Ranks
from utils.threads import in_threads

logger = logging.getLogger(__name__)

# One screening product is at most this many queries by this many corpus rows: 8 MB of float32, which
# stays in the cache while it is compared.
_QUERY_BLOCK, _CORPUS_BLOCK = 512, 4096
# Queries that rank 0 sends round at a time.
_EXCHANGE_QUERIES = 4096
# Rows that faiss is asked for beyond k.
_EXTRA = 32
# Rows that a faiss index is trained on, about.
_TRAINING_ROWS = 200_000
# Memory for the float64 copies that pair_scores makes: little enough to stay in a core's own cache.
_RESCORE_BYTES = 512 << 10


class Neighbors(NamedTuple):
    """The best corpus rows of each query, best first; where there are fewer than k, row is -1.

    scores: float64 [q, k], minus infinity where there is none. rows: int64 [q, k].
    """

    scores: np.ndarray
    rows: np.ndarray


def pair_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The canonical score of each pair of rows: float32 [n, d] twice to float64 [n].

    ``left`` may also be one row, for every row of ``right``.

    Products of float32 are exact in float64, and NumPy sums a contiguous axis in an order that depends
    on its length alone, so the same two rows give the same bits wherever they are scored.
    """
    scores = np.empty(len(right), np.float64)
    step = max(1, _RESCORE_BYTES // (8 * max(1, right.shape[1])))
    one = left.astype(np.float64) if len(left) == 1 else None
    for start in range(0, len(right), step):
        block = slice(start, start + step)
        if one is not None:
            products = right[block].astype(np.float64)
            products *= one
        else:
            products = np.multiply(left[block], right[block], dtype=np.float64)
        scores[block] = products.sum(axis=1)
    return scores


def rounding_bound(dim: int, norms: float) -> float:
    """How far a float32 inner product may lie from the true one, for vectors whose norms multiply to ``norms``.

    The classical bound gamma_n |x| |y| with n = dim + 1 and unit roundoff 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); it holds for any order of summation.
    """
    return (dim + 1) * 2.0**-24 * 1.01 * norms


class ExactIndex:
    """Rows to be searched exactly: an array as it is (memory-mapped is fine), or rows added in blocks.

    Args:
        dim: the width of the rows.
        capacity: room for rows that will be added.
        vectors: float32 [n, dim] to search where it lies, instead of adding.
        device: ``"cpu"`` or ``"gpu"`` (faiss-gpu).
    """

    def __init__(self, dim: int, capacity: int = 0, vectors: np.ndarray | None = None, device: str = "cpu"):
        self.dim = dim
        self._rows = np.empty((capacity, dim), np.float32) if vectors is None else vectors
        self._n = 0 if vectors is None else len(vectors)
        self._norm = 0.0 if vectors is None else largest_norm(vectors)
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
        self._norm = max(self._norm, largest_norm(vectors))

    def search(self, queries: np.ndarray, k: int, floor: float = -np.inf) -> Neighbors:
        """The ``k`` best rows of each query whose canonical score is at least ``floor``.

        Args:
            queries: float32 [q, dim].
        """
        result = Neighbors(np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1, np.int64))
        if self._n == 0 or len(queries) == 0:
            return result
        slack = rounding_bound(self.dim, self._norm * largest_norm(queries))
        if self._gpu is not None:
            left = self._gpu.search(queries, self.vectors, k, floor, slack, result)
            if len(left):
                redone = self._search_blocks(queries[left], k, floor, slack)
                result.scores[left], result.rows[left] = redone
            return result
        return self._search_blocks(queries, k, floor, slack)

    def _search_blocks(self, queries: np.ndarray, k: int, floor: float, slack: float) -> Neighbors:
        def work(start: int) -> Neighbors:
            return _search_block(queries[start : start + size], self.vectors, k, floor, slack)

        size = min(_QUERY_BLOCK, -(-len(queries) // runtime.cpu_threads()))
        parts = in_threads(work, range(0, len(queries), size))
        return Neighbors(np.concatenate([p.scores for p in parts]), np.concatenate([p.rows for p in parts]))


def _search_block(queries: np.ndarray, corpus: np.ndarray, k: int, floor: float, slack: float) -> Neighbors:
    """One block of queries against the whole corpus.

    Keeps, per query, every row whose screened score is within twice the rounding bound of the k-th best
    so far, and settles the few that remain by canonical scores.
    """
    n_queries = len(queries)
    product = np.empty((n_queries, min(_CORPUS_BLOCK, len(corpus))), np.float32)
    found = _Candidates(queries, corpus, k, floor, slack)
    all_queries, hits_are_rare = np.arange(n_queries), floor > -np.inf
    for start in range(0, len(corpus), _CORPUS_BLOCK):
        block = corpus[start : start + _CORPUS_BLOCK]
        screened = product[:, : len(block)]
        if not screened.flags.c_contiguous:  # the last, shorter block
            screened = np.empty((n_queries, len(block)), np.float32)
        np.matmul(queries, block.T, out=screened)
        if start == 0 and floor == -np.inf and k < len(block):
            found.raise_cut(_kth_best_at_least(screened, k))
        # Where few queries find anything, looking at each one's maximum first takes a third of the time.
        touched = np.flatnonzero(screened.max(axis=1) >= found.cut) if hits_are_rare else all_queries
        part = screened if len(touched) == n_queries else screened[touched]
        hits = np.flatnonzero(part >= found.cut[touched, None])
        if len(hits):
            place, column = np.divmod(hits, len(block))
            found.add(touched[place], column + start, part.reshape(-1)[hits])
        hits_are_rare = len(hits) < n_queries // 4
    return found.settle()


def _kth_best_at_least(scores: np.ndarray, k: int) -> np.ndarray:
    """A lower bound of each row's k-th best score, float32 [q]; ``k`` is less than the width.

    The k-th best of the maxima of disjoint groups is one, a close one when there are many more groups
    than k, and takes a fraction of the time that partitioning the scores themselves does.
    """
    size = max(1, min(8, scores.shape[1] // (4 * k)))
    n_groups = scores.shape[1] // size
    maxima = scores[:, : n_groups * size].reshape(len(scores), size, n_groups).max(axis=1)
    return np.partition(maxima, n_groups - k, axis=1)[:, n_groups - k]


class _Candidates:
    """Screened pairs of one block of queries: a row of places for each query, cleared as its cut rises.

    ``cut`` is the screened score, float32 [q], below which nothing can be among the k best.
    """

    def __init__(self, queries: np.ndarray, corpus: np.ndarray, k: int, floor: float, slack: float):
        self.queries, self.corpus, self.k, self.floor = queries, corpus, k, floor
        self.cut = np.full(len(queries), floor - slack, np.float32)
        self._margin = np.float32(2 * slack)
        self._count = np.zeros(len(queries), np.int64)
        # At twice k the cut is renewed whenever the corpus seen so far has doubled.
        self._make_room(max(2 * k, 32))

    def _make_room(self, width: int) -> None:
        scores = np.full((len(self.queries), width), -np.inf, np.float32)
        rows = np.empty((len(self.queries), width), np.int64)
        if self._count.any():
            old = self._scores.shape[1]
            scores[:, :old], rows[:, :old] = self._scores, self._rows
        self._scores, self._rows = scores, rows

    def raise_cut(self, kth_best: np.ndarray) -> None:
        """Take a lower bound of each query's k-th best screened score into account."""
        self.cut = np.maximum(self.cut, kth_best - self._margin)

    def add(self, query: np.ndarray, row: np.ndarray, score: np.ndarray) -> None:
        """Pairs at or above the cut, by ascending query."""
        more = np.bincount(query, minlength=len(self.queries))
        if (self._count + more).max() > self._scores.shape[1]:
            self._clear()
            stays = score >= self.cut[query]
            query, row, score = query[stays], row[stays], score[stays]
            more = np.bincount(query, minlength=len(self.queries))
            needed = int((self._count + more).max())
            if needed > self._scores.shape[1]:
                self._make_room(needed)
        free = self._count - (np.cumsum(more) - more)  # each query's next place, less its first pair's number
        place = np.arange(len(query)) + free[query]
        self._scores[query, place], self._rows[query, place] = score, row
        self._count += more

    def _clear(self) -> None:
        """Raise the cut to what the k-th best of each query allows, and drop what falls below."""
        width = self._scores.shape[1]
        self.raise_cut(np.partition(self._scores, width - self.k, axis=1)[:, width - self.k])
        query, place = np.nonzero((self._scores >= self.cut[:, None]) & (self._scores > -np.inf))
        row, score = self._rows[query, place], self._scores[query, place]
        crowded = np.bincount(query, minlength=len(self.queries)) > max(self.k, 3 * width // 4)
        if crowded.any():
            # So many near-ties that the bound cannot part them: settle them now, canonically.
            tied = crowded[query]
            settled_query, settled_row, exact = self._ranked(query[tied], row[tied])
            query = np.concatenate([query[~tied], settled_query])
            row = np.concatenate([row[~tied], settled_row])
            score = np.concatenate([score[~tied], exact.astype(np.float32)])
            order = np.argsort(query, kind="stable")
            query, row, score = query[order], row[order], score[order]
        self._scores.fill(-np.inf)
        place = _place_within(query)
        self._scores[query, place], self._rows[query, place] = score, row
        self._count = np.bincount(query, minlength=len(self.queries))

    def settle(self) -> Neighbors:
        """The k best of each query by canonical score, ties to the lower row."""
        result = Neighbors(
            np.full((len(self.queries), self.k), -np.inf), np.full((len(self.queries), self.k), -1, np.int64)
        )
        if self._count.any():
            if self._count.max() > self.k:
                self._clear()
            query, place = np.nonzero(self._scores > -np.inf)
            query, row, score = self._ranked(query, self._rows[query, place])
            place = _place_within(query)
            result.scores[query, place], result.rows[query, place] = score, row
        return result

    def _ranked(self, query: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best of pairs (by ascending query) by canonical score, best first within each query."""
        score = self._canonical(query, row)
        order = np.lexsort((row, -score, query))
        query, row, score = query[order], row[order], score[order]
        stays = (_place_within(query) < self.k) & (score >= self.floor)
        return query[stays], row[stays], score[stays]

    def _canonical(self, query: np.ndarray, row: np.ndarray) -> np.ndarray:
        score = np.empty(len(query), np.float64)
        counts = np.bincount(query, minlength=len(self.queries))
        if len(query) >= 8 * np.count_nonzero(counts):
            # Query by query, which spares copying each query's vector beside every passage's.
            stops = np.cumsum(counts)
            for number in np.flatnonzero(counts):
                part = slice(stops[number] - counts[number], stops[number])
                score[part] = pair_scores(self.queries[number : number + 1], self.corpus[row[part]])
            return score
        step = max(1, _RESCORE_BYTES // (8 * self.queries.shape[1]))
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            score[part] = pair_scores(self.queries[query[part]], self.corpus[row[part]])
        return score


def _place_within(groups: np.ndarray) -> np.ndarray:
    """For sorted group numbers, each element's position within its group."""
    if len(groups) == 0:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    lengths = np.diff(starts, append=len(groups))
    return np.arange(len(groups)) - np.repeat(starts, lengths)


def largest_norm(vectors: np.ndarray) -> float:
    """The largest Euclidean norm of float32 rows [n, d]."""
    largest = 0.0
    for start in range(0, len(vectors), 1 << 14):
        block = vectors[start : start + (1 << 14)]
        largest = max(largest, float(np.einsum("ij,ij->i", block, block).max(initial=0.0)))
    return largest**0.5 * (1 + 1e-3)


def merge(parts: list[Neighbors], k: int) -> Neighbors:
    """The k best of several results for the same queries, by score and then by row number."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    by_row = np.where(rows < 0, np.iinfo(np.int64).max, rows)
    order = np.lexsort((by_row, -scores), axis=1)[:, :k]
    return Neighbors(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


class ShardedIndex:
    """A corpus spread over the ranks, each holding a part of its own; rank 0 owns queries and rows."""

    def __init__(self, ranks: Ranks, dim: int, device: str = "cpu"):
        self.ranks, self.dim, self.device = ranks, dim, device
        self._index: ExactIndex | None = None
        self._row_numbers = np.zeros(0, np.int64)

    @classmethod
    def of(cls, ranks: Ranks, vectors: np.ndarray | None, n: int, dim: int, device: str = "cpu") -> "ShardedIndex":
        """Deal rank 0's ``vectors`` (float32 [n, dim], None elsewhere) out in contiguous parts."""
        self = cls(ranks, dim, device)
        bounds = np.linspace(0, n, ranks.size + 1).astype(np.int64)
        mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
        self._row_numbers = np.arange(n)[mine]
        if ranks.size == 1:
            self._index = ExactIndex(dim, vectors=vectors, device=device)
            return self
        self._index = ExactIndex(dim, capacity=len(self._row_numbers), device=device)
        step = max(1, BLOCK_BYTES // (4 * dim))
        for start in range(0, n, step):
            block = ranks.broadcast(vectors[start : start + step] if vectors is not None else None)
            low, high = max(mine.start - start, 0), min(mine.stop - start, len(block))
            if low < high:
                self._index.add(block[low:high])
        return self

    def search(self, queries: np.ndarray, k: int, floor: float = -np.inf) -> Neighbors:
        """As ExactIndex.search, over all parts; every rank passes the same queries and gets the result."""
        assert self._index is not None
        local = self._index.search(queries, k, floor)
        rows = np.where(local.rows < 0, -1, self._row_numbers[local.rows] if len(self._row_numbers) else -1)
        if self.ranks.size == 1:
            return local
        parts = zip(self.ranks.gather_rows(local.scores), self.ranks.gather_rows(rows), strict=True)
        return merge([Neighbors(scores, rows) for scores, rows in parts], k)

    def search_all(self, queries: np.ndarray | None, n: int, k: int, floor: float = -np.inf) -> Neighbors:
        """As ``search`` for rank 0's queries (float32 [n, dim], None elsewhere), block by block."""
        result = Neighbors(np.full((n, k), -np.inf), np.full((n, k), -1, np.int64))
        for start in range(0, n, _EXCHANGE_QUERIES):
            part = slice(start, start + _EXCHANGE_QUERIES)
            block = self.ranks.broadcast(
                np.ascontiguousarray(queries[part], np.float32) if queries is not None else None
            )
            result.scores[part], result.rows[part] = self.search(block, k, floor)
        return result


class FactoryIndex:
    """An approximate faiss index from a factory string; what it finds is scored canonically.

    Built by one process over the whole corpus: split over ranks, it would find other rows for other
    numbers of ranks. Holds its own copy of the corpus, as the string says (Flat: in full).

    Args:
        factory: such as ``"IVF1024,Flat"`` or ``"HNSW32"``.
        parameters: for the search, such as ``"nprobe=32"``.

    Raises:
        ValueError: faiss does not understand the string or the parameters, or cannot train on so few rows.
    """

    def __init__(self, vectors: np.ndarray, factory: str, parameters: str | None = None):
        import faiss

        faiss.omp_set_num_threads(runtime.cpu_threads())
        self.vectors = vectors
        self._index = _build_factory(vectors.shape[1], factory, parameters)
        try:
            # faiss draws a sample of its own; more rows than this would only be copied.
            step = max(1, len(vectors) // _TRAINING_ROWS)
            self._index.train(np.ascontiguousarray(vectors[::step], np.float32))
            for start in range(0, len(vectors), 1 << 16):
                self._index.add(np.ascontiguousarray(vectors[start : start + (1 << 16)], np.float32))
        except RuntimeError as error:
            raise ValueError(f"index_factory {factory!r}: {_reason(error)}") from None

    def search(self, queries: np.ndarray, k: int) -> Neighbors:
        """The best of what the index finds, by canonical score; fewer than ``k`` where it finds fewer."""
        # faiss ranks by float32: a few more, so that canonical scores decide who is among the k.
        width = min(k + _EXTRA, len(self.vectors))
        rows = self._index.search(np.ascontiguousarray(queries, np.float32), width)[1].astype(np.int64)
        query, place = np.nonzero(rows >= 0)
        scores = np.full(rows.shape, -np.inf)
        for start in range(0, len(query), 1 << 16):
            part = slice(start, start + (1 << 16))
            where = query[part], place[part]
            scores[where] = pair_scores(queries[where[0]], self.vectors[rows[where]])
        found = merge([Neighbors(scores, rows)], k)
        if found.rows.shape[1] == k:
            return found
        missing = ((0, 0), (0, k - found.rows.shape[1]))
        return Neighbors(
            np.pad(found.scores, missing, constant_values=-np.inf), np.pad(found.rows, missing, constant_values=-1)
        )

    def recall(self, queries: np.ndarray, k: int) -> float:
        """The share of the exact ``k`` nearest rows that the index finds for these queries."""
        exact = ExactIndex(self.vectors.shape[1], vectors=self.vectors).search(queries, k).rows
        found = self.search(queries, k).rows
        hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(exact, found, strict=True))
        return hits / max(1, int((exact >= 0).sum()))


def check_factory(dim: int, factory: str, parameters: str | None) -> None:
    """Raise ValueError if faiss cannot make such an index."""
    _build_factory(dim, factory, parameters)


def _build_factory(dim: int, factory: str, parameters: str | None):
    import faiss

    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f'index_factory is {factory!r}; expected a faiss factory string such as "IVF1024,Flat": {_reason(error)}'
        ) from None
    if parameters:
        try:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
        except RuntimeError as error:
            raise ValueError(
                f'index_parameters is {parameters!r}; expected such as "nprobe=32", and to fit {factory!r}:'
                f" {_reason(error)}"
            ) from None
    return index


def _reason(error: RuntimeError) -> str:
    """What faiss complains about, without its source location."""
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix("Error: ")[:200] if lines else "unknown error"


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
        found = _Candidates(queries[done], corpus, k, floor, slack)
        query, place = np.nonzero(screened[done] >= cut[done, None])
        found.add(query, rows[done][query, place], screened[done][query, place])
        result.scores[done], result.rows[done] = found.settle()
        return np.flatnonzero(unsettled)


@cache
def gpu_is_usable() -> bool:
    """True if faiss was built for GPUs and sees one."""
    import faiss

    usable = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if not usable:
        logger.warning("faiss has no GPU support here; searching on the CPU (see requirements-gpu.txt)")
    return usable
