"""Which rows stay, and which kept row explains each removal.

The greedy rule: rows are taken in their order; a row is removed when its score with some row that was
kept before it reaches the threshold. It alone guarantees both that every removed row has a kept
neighbour at or above the threshold, and that no two kept rows do. Rows are decided in blocks: one
search among the rows kept so far, and then each block within itself.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils import screening
from utils.distributed import Ranks
from utils.scores import Neighbors, largest_norm, merge, pair_scores, rounding_bound
from utils.screening import SAMPLE_ROWS, ScreenedIndex
from utils.search import ExactIndex
from utils.threads import products

logger = logging.getLogger(__name__)

# More rows a block means fewer, larger products among the kept rows, and more work within the block.
_BLOCK_ROWS = 1024
# Blocks that rank 0 sends to the others together: each sending takes milliseconds, however little is sent.
_SENT_BLOCKS = 8
# Fewer rows are compared in less time than screening takes to set up.
_SCREENED_ROWS = 16_384

# Pairs that unrelated_scores draws.
_SAMPLE_PAIRS = 4000
# target_size looks for the threshold in steps of this.
THRESHOLD_STEP = 1e-4


class Duplicate(NamedTuple):
    """A removed row, the best-scoring row kept before it, and their canonical score."""

    row: int
    kept_row: int
    score: float


@dataclass
class DedupResult:
    """kept_rows: int64, ascending. duplicates: by ascending row. Together they are all the rows asked about."""

    kept_rows: np.ndarray
    duplicates: list[Duplicate]
    threshold: float


def remove_near_duplicates(
    vectors: np.ndarray | None,
    rows: np.ndarray,
    dim: int,
    threshold: float,
    ranks: Ranks,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> DedupResult:
    """Apply the greedy rule to some rows of an array.

    Args:
        vectors: float32 [n, dim] on rank 0, None elsewhere.
        rows: int64, ascending, the rows to decide; the same on every rank.
        threshold: lowest inner product (cosine, for unit vectors) that makes a row a duplicate.
        progress: called with the number of rows decided since the last call.

    Returns:
        The same result on every rank.

    The kept rows are dealt out to the ranks block by block, so each holds a part and searches it. In
    memory: len(rows) x dim float32 over all ranks, at most; a single process that screens needs only the
    sketches, at most two thirds of that.
    """
    mine = _index(vectors, rows, dim, threshold, ranks, device)
    kept: list[np.ndarray] = []
    duplicates: list[Duplicate] = []
    for number, (here, sent) in enumerate(_blocks(vectors, rows, dim, ranks)):
        block = mine.prepare(sent)
        best, near = _best_of_all(mine.search(block, threshold), ranks), mine.near(block, threshold)
        decided = _resolve_block(block.vectors, near, here, best, threshold)
        duplicates += decided
        stays = ~np.isin(here, [duplicate.row for duplicate in decided])
        kept.append(here[stays])
        if number % ranks.size == ranks.rank:
            mine.add(block.only(stays), here[stays])
        progress(len(here))
    return DedupResult(np.concatenate(kept) if kept else np.zeros(0, np.int64), duplicates, threshold)


def _blocks(
    vectors: np.ndarray | None, rows: np.ndarray, dim: int, ranks: Ranks
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every block's row numbers and vectors; rank 0 sends several at a time."""
    size = _BLOCK_ROWS * (_SENT_BLOCKS if ranks.size > 1 else 1)
    for start in range(0, len(rows), size):
        here = rows[start : start + size]
        own = np.ascontiguousarray(vectors[here], np.float32) if vectors is not None else None
        sent = ranks.broadcast(own, (len(here), dim))
        for first in range(0, len(here), _BLOCK_ROWS):
            part = slice(first, first + _BLOCK_ROWS)
            yield here[part], sent[part]


def _index(
    vectors: np.ndarray | None, rows: np.ndarray, dim: int, threshold: float, ranks: Ranks, device: str
) -> "ScreenedIndex | _FullIndex":
    """This rank's part of the rows kept so far, still empty: screened where that is worth its set-up."""
    # Blocks go round, so no rank gets more than its share rounded up to a block.
    capacity = min(len(rows), math.ceil(len(rows) / _BLOCK_ROWS / ranks.size) * _BLOCK_ROWS)
    if len(rows) >= _SCREENED_ROWS and device != "gpu":
        drawn = np.sort(np.random.default_rng(0).choice(rows, min(len(rows), SAMPLE_ROWS), replace=False))
        sample = ranks.broadcast(np.ascontiguousarray(vectors[drawn], np.float32) if vectors is not None else None)
        sketcher = screening.fit(sample, threshold)
        if sketcher is not None:
            # A process of its own has all vectors at hand; among several, only rank 0 does.
            return ScreenedIndex(sketcher, dim, capacity, vectors if ranks.size == 1 else None)
    return _FullIndex(dim, capacity, device)


class _Rows(NamedTuple):
    """``Sketched`` without sketches."""

    vectors: np.ndarray

    def only(self, which: np.ndarray) -> "_Rows":
        return _Rows(self.vectors[which])


class _FullIndex:
    """``ScreenedIndex`` without the screening."""

    def __init__(self, dim: int, capacity: int, device: str):
        self._index = ExactIndex(dim, capacity, device=device)
        self._numbers = np.empty(capacity, np.int64)

    def prepare(self, vectors: np.ndarray) -> _Rows:
        return _Rows(vectors)

    def add(self, rows: _Rows, numbers: np.ndarray) -> None:
        self._numbers[len(self._index) : len(self._index) + len(numbers)] = numbers
        self._index.add(rows.vectors)

    def search(self, queries: _Rows, floor: float) -> Neighbors:
        found = self._index.search(queries.vectors, 1, floor)
        return Neighbors(found.scores, np.where(found.rows < 0, -1, self._numbers[found.rows]))

    def near(self, rows: _Rows, floor: float) -> np.ndarray:
        slack = rounding_bound(rows.vectors.shape[1], largest_norm(rows.vectors) ** 2)
        return products(rows.vectors, rows.vectors) >= floor - slack


def _best_of_all(local: Neighbors, ranks: Ranks) -> Neighbors:
    """Each query's best row over all ranks' parts; k = 1."""
    if ranks.size == 1:
        return local
    packed = ranks.gather_equal(np.concatenate([local.scores, local.rows.view(np.float64)], axis=1))
    return merge([Neighbors(p[:, :1].copy(), p[:, 1:].copy().view(np.int64)) for p in packed], 1)


def _resolve_block(
    block: np.ndarray, near: np.ndarray, rows: np.ndarray, best: Neighbors, threshold: float
) -> list[Duplicate]:
    """Settle the rows of one block among themselves.

    Args:
        near: bool [n, n], which pairs may reach the threshold.
        best: the rows' best neighbours in earlier blocks; k = 1.
    """
    near = np.tril(near, -1)
    scores, kept_rows = best.scores[:, 0].copy(), best.rows[:, 0].copy()
    for i in np.flatnonzero(near.any(axis=1)):
        inside = np.flatnonzero(near[i, :i] & (kept_rows[:i] < 0))  # those before it that stay
        if len(inside) == 0:
            continue
        exact = pair_scores(block[i : i + 1], block[inside])
        top = int(exact.argmax())  # the first of equals, so the lowest row
        if exact[top] >= threshold and exact[top] > scores[i]:
            scores[i], kept_rows[i] = exact[top], rows[inside[top]]
    gone = np.flatnonzero(kept_rows >= 0)
    columns = (column[gone].tolist() for column in (rows, kept_rows, scores))
    return [Duplicate(*values) for values in zip(*columns, strict=True)]


def unrelated_scores(vectors: np.ndarray) -> np.ndarray:
    """Canonical scores of random pairs of rows (float32 [n, dim]): what unrelated texts get from this model.

    Ascending, seeded, of at most ``_SAMPLE_PAIRS`` pairs; the fewer the rows, the fewer the pairs.
    """
    rng = np.random.default_rng(0)
    size = min(_SAMPLE_PAIRS, len(vectors) * (len(vectors) - 1) // 2)
    left = rng.integers(0, len(vectors), size)
    right = (left + rng.integers(1, max(2, len(vectors)), size)) % len(vectors)
    return np.sort(pair_scores(vectors[left], vectors[right]))


def find_threshold(clean: Callable[[float], DedupResult], target_size: int) -> DedupResult:
    """The highest threshold, to a step of ``THRESHOLD_STEP``, at which at most ``target_size`` rows stay.

    Found by bisection, with one full greedy run for each candidate. The number of kept rows need not
    rise with the threshold strictly, so "highest" means: one step above, more than the target stay.

    Raises:
        ValueError: even at -1 more rows stay.
    """
    low, high = round(-1 / THRESHOLD_STEP), round(1 / THRESHOLD_STEP)
    result = clean(high * THRESHOLD_STEP)
    if len(result.kept_rows) <= target_size:
        return result
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        result = clean(round(middle * THRESHOLD_STEP, 4))
        logger.info("threshold %.4f keeps %d rows", result.threshold, len(result.kept_rows))
        if len(result.kept_rows) <= target_size:
            low, best = middle, result
        else:
            high = middle
    if best is None:
        best = clean(-1.0)
        if len(best.kept_rows) > target_size:
            raise ValueError(f"no threshold leaves {target_size} rows or fewer")
    return best
