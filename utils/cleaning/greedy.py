"""Which rows stay, and which kept row explains each removal.

The greedy rule: rows are taken in their order; a row is removed when its score with some row that was
kept before it reaches the threshold. It alone guarantees both that every removed row has a kept
neighbour at or above the threshold, and that no two kept rows do. Rows are decided in blocks: one
search among the rows kept so far, and the pairs within the block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from ..kernels import search_loops
from ..process.threads import in_threads
from ..ranks.group import Ranks
from ..search import sketches
from ..search.exact import ExactIndex
from ..search.scores import Neighbors, evenly, largest_norm, plain, rounding_bound
from ..search.sketches import SAMPLE_ROWS, ScreenedIndex, Sketched
from .answers import Agreeing
from .deal import Deal, Pairs

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
    agreeing: Callable[[], Agreeing] | None = None,
) -> DedupResult:
    """Apply the greedy rule to some rows of an array.

    Args:
        vectors: float32 [n, dim] on rank 0, None elsewhere.
        rows: int64, ascending, the rows to decide; the same on every rank.
        threshold: lowest inner product (cosine, for unit vectors) that makes a row a duplicate.
        progress: called with the number of rows decided since the last call.
        agreeing: rank 0 calls it to know which rows are compared at a lower threshold, too.

    Returns:
        The same result on every rank.

    Each block's rows are dealt out to the ranks (``cleaning.deal.Deal``):

        vectors        pairs        of the rows that stay, a rank holds    and finds those that are near to
        all map them   screened     sketches of all                        its own run of the block's rows
        all map them   multiplied   vectors of its own turns               all rows of the block
        rank 0 only    screened     sketches and vectors of its own turns  all rows of the block
        rank 0 only    multiplied   vectors of its own turns               all rows of the block

    Sketches take at most two thirds of what vectors do, in bfloat16 about a tenth.
    """
    everywhere = ranks.mapped(vectors)
    index = _index(everywhere, vectors, rows, dim, threshold, ranks, device)
    same = agreeing() if agreeing is not None and ranks.is_first else None
    kept: list[np.ndarray] = [rows[:0]]
    removed: list[tuple[np.ndarray, ...]] = [(rows[:0], rows[:0], np.zeros(0))]
    size, done = index.block_rows, 0
    while done < len(rows):
        here = rows[done : done + size]
        deal = Deal(ranks, done, len(here))
        everyone = np.arange(len(here))
        searched, added = (deal.run, everyone) if index.divides_queries else (everyone, deal.turns)
        block = index.prepare(_fetched(here, everywhere, vectors, dim, ranks), deal.run, deal.complete)
        within = _pairs_within(block, index, deal.turns, threshold)
        best, pairs = deal.joined(index.search(block, searched, threshold), within, index.divides_queries, _MOST_PAIRS)
        if agreeing is not None and pairs is not None:
            more = same.joined(here, best, pairs, _MOST_PAIRS) if same is not None else None
            best, pairs = ranks.broadcast_object(more)
        if pairs is None:
            size = max(1, size // 4)
            continue
        gone, stays = _settle(here, best, pairs)
        removed.append(gone)
        kept.append(here[stays])
        if same is not None:
            same.add(here[stays])
        added = added[stays[added]]
        index.add(block, added, here[added])
        done += len(here)
        progress(len(here))
        if 4 * len(pairs.scores) < _MOST_PAIRS:  # as many as twice the rows may have
            size = min(2 * size, index.block_rows)
    return DedupResult(np.concatenate(kept), Duplicates(*map(np.concatenate, zip(*removed, strict=True))), threshold)


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
) -> "_Index":
    """This rank's part of the rows kept so far, still empty: screened where that is worth its set-up."""
    capacity = math.ceil(len(rows) / ranks.size)
    if len(rows) >= _SCREENED_ROWS:  # on a GPU as well: most pairs are not compared at all
        sketcher = None
        if ranks.is_first:
            drawn = np.sort(np.random.default_rng(0).choice(rows, min(len(rows), SAMPLE_ROWS), replace=False))
            sketcher = sketches.fit(plain(vectors[drawn]), threshold)
        # Sketches are compared across ranks: directions that another machine rounded otherwise would not do.
        sketcher = ranks.broadcast_object(sketcher)
        if sketcher is not None:
            return ScreenedIndex(sketcher, dim, len(rows) if everywhere is not None else capacity, everywhere)
    return _FullIndex(dim, capacity, device)


class _Rows(NamedTuple):
    """``Sketched`` without sketches."""

    vectors: np.ndarray
    norm: float


Block = TypeVar("Block", Sketched, _Rows)


class _Index(Protocol[Block]):
    """Rows kept so far, among which each row of a block is looked for: as ``ScreenedIndex``, which documents it."""

    block_rows: int
    divides_queries: bool

    def prepare(self, vectors: np.ndarray, own: np.ndarray, complete: Callable[..., tuple]) -> Block: ...

    def add(self, rows: Block, which: np.ndarray, numbers: np.ndarray) -> None: ...

    def search(self, rows: Block, which: np.ndarray, floor: float) -> Neighbors: ...

    def near(self, rows: Block, part: np.ndarray, floor: float) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


class _FullIndex:
    """An ``_Index`` without screening: its blocks are vectors, so every rank has the whole of them to begin with."""

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


def _pairs_within(block: Block, index: _Index[Block], own: np.ndarray, threshold: float) -> Pairs:
    """The pairs whose later row is one of our own; not all if they are more than ``_MOST_PAIRS``."""
    found: list[Pairs] = []

    def work(start: int) -> None:
        part = own[start : start + _PART_ROWS]
        for places, others in index.near(block, part, threshold):
            for first in range(0, len(places), _SCORED_PAIRS):
                if sum(len(pairs.scores) for pairs in found) > _MOST_PAIRS:
                    return
                later, earlier = part[places[first : first + _SCORED_PAIRS]], others[first : first + _SCORED_PAIRS]
                before = earlier < later
                later, earlier = later[before], earlier[before]
                scores = search_loops.score_pairs(block.vectors, later, block.vectors, earlier)
                reach = scores >= threshold
                found.append(Pairs(later[reach], earlier[reach], scores[reach]))

    in_threads(work, range(0, len(own), _PART_ROWS))
    return Pairs.joined(found)


def _settle(here: np.ndarray, best: Neighbors, pairs: Pairs) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Apply the rule to the rows of a block: the columns of ``Duplicates``, and which rows stay, bool [n].

    Args:
        best: each row's best among those kept in earlier blocks; k = 1.
    """
    scores, kept_rows = best.scores[:, 0].copy(), best.rows[:, 0].copy()
    order = np.lexsort((pairs.earlier, pairs.later))
    search_loops.settle(*(column[order] for column in pairs), here, scores, kept_rows)
    stays = kept_rows < 0
    return (here[~stays], kept_rows[~stays], scores[~stays]), stays
