"""Which rows stay, and which kept row explains each removal.

The greedy rule: rows are taken in their order; a row is removed when its score with some row that was
kept before it reaches the threshold. It alone guarantees both that every removed row has a kept
neighbour at or above the threshold, and that no two kept rows do. Rows are decided in blocks: one
search among the rows kept so far, and the pairs within the block.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils import matmul, screening, search_kernels
from utils.distributed import Ranks
from utils.scores import Neighbors, evenly, largest_norm, merge, pair_scores, plain, rounding_bound
from utils.screening import SAMPLE_ROWS, ScreenedIndex, Sketched
from utils.search import ExactIndex
from utils.threads import in_threads

logger = logging.getLogger(__name__)

# Rows that are decided together, where nothing is screened: their pairs are found by NumPy, even beside a GPU.
_BLOCK_ROWS = 1024
# Rows whose pairs are looked for together.
_PART_ROWS = 512
# Pairs of a block at or above the threshold, of each rank; if there are more, blocks become smaller.
_MOST_PAIRS = 1 << 20
# Pairs that a thread scores at a time.
_SCORED_PAIRS = 1 << 16
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


class Duplicates(Sequence):
    """Removed rows as ``Duplicate``s, which are made when they are asked for.

    Attributes:
        rows, kept_rows, scores: int64, int64 and float64 [duplicates], the columns.
    """

    def __init__(self, rows: np.ndarray, kept_rows: np.ndarray, scores: np.ndarray):
        self.rows, self.kept_rows, self.scores = rows, kept_rows, scores

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return Duplicate(int(self.rows[i]), int(self.kept_rows[i]), float(self.scores[i]))

    def __eq__(self, other: object) -> bool:
        """As of lists."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def __iter__(self) -> Iterator[Duplicate]:
        columns = (column.tolist() for column in (self.rows, self.kept_rows, self.scores))
        return map(Duplicate._make, zip(*columns, strict=True))


@dataclass
class DedupResult:
    """kept_rows: int64, ascending. duplicates: by ascending row. Together they are all the rows asked about."""

    kept_rows: np.ndarray
    duplicates: Duplicates
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

    Each block's rows are dealt out to the ranks (``_Deal``):

        vectors        pairs        of the rows that stay, a rank holds    and finds those that are near to
        all map them   screened     sketches of all                        its own run of the block's rows
        all map them   multiplied   vectors of its own turns               all rows of the block
        rank 0 only    screened     sketches and vectors of its own turns  all rows of the block
        rank 0 only    multiplied   vectors of its own turns               all rows of the block

    Sketches take at most two thirds of what vectors do, in bfloat16 about a tenth.
    """
    everywhere = ranks.mapped(vectors)
    index = _index(everywhere, vectors, rows, dim, threshold, ranks, device)
    kept: list[np.ndarray] = [rows[:0]]
    removed: list[tuple[np.ndarray, ...]] = [(rows[:0], rows[:0], np.zeros(0))]
    size, done = index.block_rows, 0
    while done < len(rows):
        here = rows[done : done + size]
        deal = _Deal(ranks, done, len(here))
        everyone = np.arange(len(here))
        searched, added = (deal.run, everyone) if index.divides_queries else (everyone, deal.turns)
        block = index.prepare(_fetched(here, everywhere, vectors, dim, ranks), deal.run, deal.complete)
        within = _pairs_within(block, index, deal.turns, threshold)
        best, pairs = deal.joined(index.search(block, searched, threshold), within, index.divides_queries)
        if pairs is None:
            size = max(1, size // 4)
            continue
        gone, stays = _settle(here, best, pairs)
        removed.append(gone)
        kept.append(here[stays])
        added = added[stays[added]]
        index.add(block, added, here[added])
        done += len(here)
        progress(len(here))
        if 4 * len(pairs.scores) < _MOST_PAIRS:  # as many as twice the rows may have
            size = min(2 * size, index.block_rows)
    return DedupResult(np.concatenate(kept), Duplicates(*map(np.concatenate, zip(*removed, strict=True))), threshold)


class _Deal:
    """How a block's rows are dealt out to the ranks.

    Args:
        first, n: the place of the block's first row among all, and how many it has.

    Attributes:
        run: a rank's share where rows are as much work as each other: those that follow each other.
        turns: where later rows are more work, or each rank is to have as many of all blocks' rows: every so many-th.
    """

    def __init__(self, ranks: Ranks, first: int, n: int):
        self._ranks, self._n = ranks, n
        bounds = [n * rank // ranks.size for rank in range(ranks.size + 1)]
        self._runs = list(map(slice, bounds, bounds[1:]))
        self.run = np.arange(n)[self._runs[ranks.rank]]
        self.turns = np.arange((ranks.rank - first) % ranks.size, n, ranks.size)

    def complete(self, *own: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of some arrays all rows, [n, ...], from each rank's run of them, C-contiguous."""
        if self._ranks.size == 1:
            return own
        # All in one, because each exchange takes its time; as bytes: Paddle would take 16-bit integers for numbers.
        # Not reshape(n, -1), which is refused where n is 0: a last block may have fewer rows than there are ranks.
        as_bytes = [array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8) for array in own]
        most = -(-self._n // self._ranks.size)
        starts = np.cumsum([0, *(most * array.shape[1] for array in as_bytes)]).tolist()
        sent = np.zeros(starts[-1], np.uint8)
        for array, start in zip(as_bytes, starts, strict=False):
            sent[start : start + array.size] = array.reshape(-1)
        gathered = self._ranks.gather_equal(sent)
        whole = tuple(matmul.empty((self._n, *array.shape[1:]), array.dtype) for array in own)
        for array, start in zip(whole, starts, strict=False):
            for run, part in zip(self._runs, gathered, strict=True):
                rows = array[run].reshape(-1).view(np.uint8)
                rows[:] = part[start : start + len(rows)]
        return whole

    def joined(self, best: Neighbors, pairs: "_Pairs", divided: bool) -> tuple[Neighbors, "_Pairs | None"]:
        """Each row's best over all ranks (k = 1), and all ranks' pairs, or None if they are too many.

        Args:
            best: of our run if ``divided``, else of every row.
        """
        if self._ranks.size == 1:
            return best, pairs if len(pairs.scores) <= _MOST_PAIRS else None
        # One array, because each exchange takes its time; its last line says how many pairs there are.
        lines = np.zeros((1 + (-(-self._n // self._ranks.size) if divided else self._n), 2))
        lines[: len(best.scores), :1], lines[: len(best.scores), 1:] = best.scores, best.rows.view(np.float64)
        lines[-1, 0] = len(pairs.scores)
        gathered = self._ranks.gather_equal(lines)
        most = int(max(part[-1, 0] for part in gathered))
        if most > _MOST_PAIRS:
            return best, None
        if divided:
            parts = [part[: run.stop - run.start] for run, part in zip(self._runs, gathered, strict=True)]
            best = _as_neighbors(np.concatenate(parts))
        else:
            best = merge([_as_neighbors(part[:-1]) for part in gathered], 1)
        if most == 0:
            return best, pairs
        padded = np.full((3, most), -1.0)
        padded[:, : len(pairs.scores)] = pairs
        parts = [part[:, part[0] >= 0] for part in self._ranks.gather_equal(padded)]
        return best, _Pairs.joined([_Pairs(*part[:2].astype(np.int64), part[2]) for part in parts])


def _as_neighbors(lines: np.ndarray) -> Neighbors:
    """Of scores, and rows in the same bits: float64 [n, 2]."""
    return Neighbors(lines[:, :1].copy(), lines[:, 1:].copy().view(np.int64))


def _fetched(
    here: np.ndarray, everywhere: np.ndarray | None, vectors: np.ndarray | None, dim: int, ranks: Ranks
) -> np.ndarray:
    """Some rows' vectors on every rank, float32 [n, dim]."""
    if everywhere is not None:
        return plain(evenly(everywhere, here))
    return ranks.broadcast(plain(evenly(vectors, here)) if vectors is not None else None, (len(here), dim))


def _index(
    everywhere: np.ndarray | None,
    vectors: np.ndarray | None,
    rows: np.ndarray,
    dim: int,
    threshold: float,
    ranks: Ranks,
    device: str,
) -> "ScreenedIndex | _FullIndex":
    """This rank's part of the rows kept so far, still empty: screened where that is worth its set-up."""
    capacity = math.ceil(len(rows) / ranks.size)
    if len(rows) >= _SCREENED_ROWS:  # on a GPU as well: most pairs are not compared at all
        sketcher = None
        if ranks.is_first:
            drawn = np.sort(np.random.default_rng(0).choice(rows, min(len(rows), SAMPLE_ROWS), replace=False))
            sketcher = screening.fit(plain(vectors[drawn]), threshold)
        # Sketches are compared across ranks: directions that another machine rounded otherwise would not do.
        sketcher = ranks.broadcast_object(sketcher)
        if sketcher is not None:
            return ScreenedIndex(sketcher, dim, len(rows) if everywhere is not None else capacity, everywhere)
    return _FullIndex(dim, capacity, device)


class _Rows(NamedTuple):
    """``Sketched`` without sketches."""

    vectors: np.ndarray
    norm: float


class _FullIndex:
    """``ScreenedIndex`` without the screening."""

    block_rows = _BLOCK_ROWS
    divides_queries = False

    def __init__(self, dim: int, capacity: int, device: str):
        self._index = ExactIndex(dim, capacity, device=device)
        self._numbers = np.empty(capacity, np.int64)

    def prepare(self, vectors: np.ndarray, own: np.ndarray, complete: Callable[..., tuple]) -> _Rows:
        return _Rows(vectors, largest_norm(vectors))

    def add(self, rows: _Rows, which: np.ndarray, numbers: np.ndarray) -> None:
        self._numbers[len(self._index) : len(self._index) + len(numbers)] = numbers
        self._index.add(rows.vectors[which])

    def search(self, rows: _Rows, which: np.ndarray, floor: float) -> Neighbors:
        found = self._index.search(rows.vectors[which], 1, floor)
        return Neighbors(found.scores, np.where(found.rows < 0, -1, self._numbers[found.rows]))

    def near(self, rows: _Rows, part: np.ndarray, floor: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        slack = rounding_bound(rows.vectors.shape[1], rows.norm**2)
        yield np.nonzero(rows.vectors[part] @ rows.vectors[: part[-1]].T >= floor - slack)


class _Pairs(NamedTuple):
    """Pairs of a block at or above the threshold: int64 [n], int64 [n] of smaller numbers, canonical float64 [n]."""

    later: np.ndarray
    earlier: np.ndarray
    scores: np.ndarray

    @classmethod
    def joined(cls, parts: list["_Pairs"]) -> "_Pairs":
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def _pairs_within(
    block: Sketched | _Rows, index: ScreenedIndex | _FullIndex, own: np.ndarray, threshold: float
) -> _Pairs:
    """The pairs whose later row is one of our own; not all if they are more than ``_MOST_PAIRS``."""
    found: list[_Pairs] = []

    def work(start: int) -> None:
        part = own[start : start + _PART_ROWS]
        for places, others in index.near(block, part, threshold):
            for first in range(0, len(places), _SCORED_PAIRS):
                if sum(len(pairs.scores) for pairs in found) > _MOST_PAIRS:
                    return
                later, earlier = part[places[first : first + _SCORED_PAIRS]], others[first : first + _SCORED_PAIRS]
                before = earlier < later
                later, earlier = later[before], earlier[before]
                scores = search_kernels.score_pairs(block.vectors, later, block.vectors, earlier)
                reach = scores >= threshold
                found.append(_Pairs(later[reach], earlier[reach], scores[reach]))

    in_threads(work, range(0, len(own), _PART_ROWS))
    return _Pairs.joined(found)


def _settle(here: np.ndarray, best: Neighbors, pairs: _Pairs) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Apply the rule to the rows of a block: the columns of ``Duplicates``, and which rows stay, bool [n].

    Args:
        best: each row's best among those kept in earlier blocks; k = 1.
    """
    scores, kept_rows = best.scores[:, 0].copy(), best.rows[:, 0].copy()
    order = np.lexsort((pairs.earlier, pairs.later))
    search_kernels.settle(*(column[order] for column in pairs), here, scores, kept_rows)
    stays = kept_rows < 0
    return (here[~stays], kept_rows[~stays], scores[~stays]), stays


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
