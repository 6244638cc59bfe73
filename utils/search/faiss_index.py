"""Approximate search by an index of faiss; what it finds is scored canonically."""

import re

import numpy as np

from ..process import runtime
from .exact import ExactIndex
from .scores import Neighbors, best_of_pairs

# Rows that faiss is asked for beyond k.
_EXTRA = 32
# Rows that an index is trained on, about.
_TRAINING_ROWS = 200_000


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
        self._about = f"{factory!r}" + (f" with {parameters!r}" if parameters else "")
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
        try:
            rows = self._index.search(np.ascontiguousarray(queries, np.float32), width)[1].astype(np.int64)
        except RuntimeError as error:
            raise ValueError(f"index_factory {self._about}: {_reason(error)}") from None
        query, place = np.nonzero(rows >= 0)
        found = Neighbors.none(len(queries), k)
        best_of_pairs(queries, self.vectors, query, rows[query, place], -np.inf, found)
        return found

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

    if re.search(r"[A-Za-z]0+(?!\d)", factory):  # faiss would end the process
        raise ValueError(f'index_factory is {factory!r}, with a size of 0; expected such as "IVF1024,Flat"')
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
