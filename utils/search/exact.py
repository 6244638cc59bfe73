"""Nearest rows by inner product, exact to the last bit that matters, in bounded blocks.

Matrix products only *screen*: those of other shapes round differently, and in bfloat16, where the processor
multiplies it natively, they take a fraction of the time. Whatever lies within the rounding bound of the cut
is kept, and one canonical score per surviving pair decides, with ties going to the lower row number. The
result is therefore the same for any block size, arithmetic, thread count, device and number of ranks.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..process import runtime
from ..process.threads import in_threads
from ..ranks.group import BLOCK_BYTES, Ranks
from ..ranks.mapped import release
from .scores import Neighbors, best_of_pairs, largest_norm, merge, plain, rounding_bound
from .screens import Candidates, Shape, below, mean_of, screen_of

logger = logging.getLogger(__name__)

# Queries that are taken through the corpus together, fewer if they want many neighbours each; a block of the
# corpus is made ready once for all of them.
_QUERY_BLOCK, _NEIGHBORS = 8192, 1 << 20
# Queries that rank 0 sends round at a time, fewer if they want many neighbours each.
_EXCHANGE_QUERIES, _EXCHANGE_NEIGHBORS = 8192, 1 << 20
# Rows that faiss is asked for on a GPU beyond k; and how much of the corpus and of the queries it holds there at once,
# in bytes, so that a corpus may be larger than the GPU's memory.
_EXTRA = 32
_GPU_CORPUS, _GPU_QUERIES = 4 << 30, 1 << 30


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
        shape: Shape | None = None,
    ):
        self.dim = dim
        self._rows = np.empty((capacity, dim), np.float32) if vectors is None else vectors
        self._n = 0 if vectors is None else len(vectors)
        self._shape = Shape.of(self.vectors) if self._n and shape is None else shape
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
            self._shape = Shape.of(vectors) if self._shape is None else self._shape.joined(vectors)

    def search(self, queries: np.ndarray, k: int, floor: float = -np.inf) -> Neighbors:
        """The ``k`` best rows of each query whose canonical score is at least ``floor``.

        Args:
            queries: float32 [q, dim].
        """
        result = Neighbors.none(len(queries), k)
        if self._n == 0 or len(queries) == 0:
            return result
        if self._gpu is not None:
            longest = float(np.linalg.norm(self._shape.centre)) + self._shape.norm
            slack = rounding_bound(self.dim, longest * largest_norm(queries))
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

    def _screened(self, queries: np.ndarray, k: int, floor: float) -> "Candidates":
        """What the whole corpus leaves of one block's pairs."""
        queries, corpus = np.array(queries, np.float32), self.vectors
        screen = screen_of(queries, self._shape)
        found = Candidates(queries, corpus, k, floor, screen)
        for start in range(0, len(corpus), screen.block[1]):
            rows = plain(corpus[start : start + screen.block[1]])
            screen.go_through(rows, start, found)
            release(rows)
        return found.finish()


class _Begun:
    """A search that is screened, and settled only once ``cut`` says what counts.

    Args:
        result: the finished one, if there is nothing to settle.
        blocks: some queries' place in the result, and their candidates.
    """

    def __init__(self, result: Neighbors, blocks: Sequence[tuple[slice, Candidates]] = ()):
        self._result, self._blocks = result, blocks

    def lower_bounds(self) -> np.ndarray:
        """See ``Candidates``."""
        bounds = below(self._result.scores)
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
                own = Shape.of(whole[mine], mean_of(whole))
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
        # The launcher gives every rank a GPU under this name, which Paddle goes by, too.
        self.device = int(os.environ.get("FLAGS_selected_gpus", "0").split(",")[0] or 0)  # noqa: SIM112

    def search(
        self, queries: np.ndarray, corpus: np.ndarray, k: int, floor: float, slack: float, result: Neighbors
    ) -> np.ndarray:
        """Fill ``result`` and return the queries whose near-ties reach past what was fetched."""
        width = min(k + _EXTRA, len(corpus), 2048)
        screened, rows = self.faiss.knn_gpu(
            self.resources, queries, corpus, width, metric=self.faiss.METRIC_INNER_PRODUCT, device=self.device,
            vectorsMemoryLimit=_GPU_CORPUS, queriesMemoryLimit=_GPU_QUERIES,
        )  # fmt: skip
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
