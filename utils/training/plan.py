"""The batch plan: which rows of an epoch meet in which batch, the same for any number of ranks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..files.row_keys import ONE_NEGATIVE
from . import hard_batches
from .rows import TrainingRows

# Entries put aside for a later batch that are looked at again for the next one, in batches.
_LOOK_BACK = 16
# Passages as many as a query's own positives are drawn for a row's random negatives, up to this many positives.
_FEW_POSITIVES = 64


@dataclass(frozen=True)
class Example:
    """A row as one epoch sees it: ``passages`` holds its positive, then its negatives."""

    row: int
    query_id: int
    passages: np.ndarray


@dataclass(frozen=True)
class Epoch(Sequence):
    """The batches of an epoch, each a list of examples, which are made of the arrays when they are asked for.

    rows, query_ids: int64 [n].
    passages: int64 [n, group_size], each row's positive first.
    bounds: of each batch in those arrays, (start, stop).
    """

    rows: np.ndarray
    query_ids: np.ndarray
    passages: np.ndarray
    bounds: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, number: int) -> list[Example]:
        start, stop = self.bounds[number]
        rows, query_ids = self.rows[start:stop].tolist(), self.query_ids[start:stop].tolist()
        return list(map(Example, rows, query_ids, self.passages[start:stop]))


@dataclass(frozen=True)
class Plan:
    """Which examples meet in which batch: the same for any number of ranks.

    Each epoch shuffles anew, draws each row's positive and negatives anew, and keeps equal queries and equal
    positives out of one batch where it can; where it cannot, they stay, and the loss masks them.

    Args:
        batch_size: queries in a batch, over all ranks.
        n_ranks: a last batch that is too small to give every rank a query takes some from the batch before.
        hard_batches: queries meet whose positives are each other's negatives. They are hard negatives that cost
            nothing, as topic-aware sampling's are (Hofstaetter et al., 2021).
    """

    rows: TrainingRows
    batch_size: int
    group_size: int
    seed: int
    n_ranks: int = 1
    group_by_source: bool = False
    drop_last: bool = False
    hard_batches: bool = False
    _made: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)
    _others: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(len(self._batch_sizes(size)) for size in self._group_sizes())

    def epoch(self, number: int) -> Epoch:
        """The batches of an epoch. The last one asked for is kept: the preflight looks at what training begins with."""
        if number not in self._made:
            self._made.clear()
            self._made[number] = self._make(number)
        return self._made[number]

    def _make(self, number: int) -> Epoch:
        rng = np.random.default_rng([self.seed, number])
        drawn_rows, drawn_passages, bounds, n = [], [], [], 0
        for entries in self._groups(rng):
            rows, passages = entries[:, 0], self._draw(number, entries)
            if self.hard_batches:
                negatives = self.rows.negatives.take(rows)
                order = hard_batches.order(passages[:, 0], self.rows.query_ids[rows], negatives, self.batch_size)
                rows, passages = rows[order], passages[order]
            sizes = self._batch_sizes(len(rows))
            order = self._deal(self.rows.query_ids[rows].tolist(), passages[:, 0].tolist(), sizes)
            drawn_rows.append(rows[order])
            drawn_passages.append(passages[order])
            bounds += itertools.pairwise(itertools.accumulate(sizes, initial=n))
            n += len(rows)
        if self.group_by_source or self.hard_batches:
            # Neither should the files take turns, nor should the batches of leftovers come last.
            bounds = [bounds[i] for i in rng.permutation(len(bounds))]
        rows = np.concatenate(drawn_rows)
        return Epoch(rows, self.rows.query_ids[rows], np.concatenate(drawn_passages), bounds)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch, in batches or not."""
        return sum(self._group_sizes())

    @property
    def n_left_out(self) -> int:
        """Rows of an epoch that are in no batch."""
        return self.n_rows - sum(sum(self._batch_sizes(size)) for size in self._group_sizes())

    @property
    def smallest_batch(self) -> int:
        """Rows that a batch has at least: one for each rank, and two where a row alone has no negatives."""
        least = max(self.n_ranks, 1 if self.group_size > 1 else 2)
        return self.batch_size if self.drop_last else min(self.batch_size, least)

    @property
    def rows_that_can_meet(self) -> int:
        """Rows of an epoch that batches are made of: all, or the most that one file gives."""
        return max(self._group_sizes())

    def _batch_sizes(self, n: int) -> list[int]:
        """Of the batches that n rows make. A last one that is too small takes rows from the one before, if that is not
        too small then; else it is left out.
        """
        full, rest = divmod(n, self.batch_size)
        missing = self.smallest_batch - rest
        sizes = [self.batch_size] * full
        if rest > 0 and missing <= 0:
            sizes.append(rest)
        elif rest > 0 and full and not self.drop_last and self.batch_size - missing >= self.smallest_batch:
            sizes[-1:] = [self.batch_size - missing, self.smallest_batch]
        return sizes

    def _counts(self) -> np.ndarray:
        """Entries of each file in an epoch."""
        sizes = np.bincount(self.rows.sources, minlength=len(self.rows.weights))
        return np.maximum(np.rint(sizes * np.array(self.rows.weights)), 1).astype(np.int64)

    def _group_sizes(self) -> list[int]:
        counts = self._counts()
        return counts.tolist() if self.group_by_source else [int(counts.sum())]

    def _groups(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Shuffled (row, copy) pairs, int64 [n, 2]: one array a file, or one in all."""
        groups = []
        for source, count in enumerate(self._counts()):
            rows = np.flatnonzero(self.rows.sources == source)
            copies, rest = divmod(int(count), len(rows))
            drawn = [np.stack([rows, np.full(len(rows), copy)], 1) for copy in range(copies)]
            some = rng.permutation(rows)[:rest]
            drawn.append(np.stack([some, np.full(rest, copies)], 1))
            groups.append(np.concatenate(drawn))
        if not self.group_by_source:
            groups = [np.concatenate(groups)]
        return [rng.permutation(group) for group in groups]

    def _draw(self, number: int, entries: np.ndarray) -> np.ndarray:
        """The passages of an epoch's (row, copy) pairs, int64 [n, group_size], drawn from each pair's own seed."""
        all_positives, all_negatives = self.rows.positives, self.rows.negatives
        passages, wanted = np.empty((len(entries), self.group_size), np.int64), self.group_size - 1
        for (row, copy), group in zip(entries.tolist(), passages, strict=True):
            rng = np.random.default_rng([self.seed, number, row, copy])
            positives = all_positives[row]
            group[0] = positives[rng.integers(len(positives)) if len(positives) > 1 else 0]
            if not wanted:
                continue
            drawn = all_negatives[row].copy()
            rng.shuffle(drawn)
            if self.rows.types.get(row) == ONE_NEGATIVE:
                drawn = drawn[:1]
            group[1 : 1 + len(drawn)] = drawn[:wanted]
            if len(drawn) < wanted:
                group[1 + len(drawn) :] = self._random_negatives(rng, row, drawn, wanted - len(drawn))
        return passages

    def _random_negatives(self, rng: np.random.Generator, row: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """Other queries' positives, for a row that has too few negatives of its own."""
        query, own = int(self.rows.query_ids[row]), set(drawn.tolist())
        pool, known = self.rows.all_positives, self.rows.known_positives[query]
        found: dict[int, None] = {}
        if len(known) <= _FEW_POSITIVES:
            tried = rng.choice(pool, min(len(pool), count + len(known | own)), replace=False)
            found = dict.fromkeys(passage for passage in tried.tolist() if passage not in known and passage not in own)
        elif 2 * (len(known) + len(own) + count) <= len(pool):
            while len(found) < count:  # at least every other one will do
                tried = pool[rng.integers(len(pool), size=2 * count)].tolist()
                found |= dict.fromkeys(passage for passage in tried if passage not in known and passage not in own)
        else:
            if query not in self._others:
                self._others[query] = pool[[passage not in known for passage in pool.tolist()]]
            others = self._others[query]
            tried = rng.choice(others, min(len(others), count + len(own)), replace=False)
            found = dict.fromkeys(passage for passage in tried.tolist() if passage not in own)
        negatives = list(found)[:count]
        # A corpus of a few passages may not hold enough of them: then they repeat, or known positives, which
        # the loss masks, stand in.
        while len(negatives) < count:
            negatives.append(negatives[0] if negatives else int(pool[0]))
        return np.array(negatives, np.int64)

    def _deal(self, queries: list[int], positives: list[int], sizes: list[int]) -> list[int]:
        """An order that, cut into batches of these sizes from the first on, puts no query and no positive into a batch
        twice, as far as possible. What is left over comes last.
        """
        dealt: list[int] = []
        waiting: list[int] = []
        fresh = iter(range(len(queries)))
        for size in [*sizes, len(queries) - sum(sizes)]:
            batch = _Batch(size, queries, positives)
            look_back, beyond = waiting[: _LOOK_BACK * size], waiting[_LOOK_BACK * size :]
            for example in look_back:
                batch.place(example)
            while len(batch.members) < size and len(batch.put_aside) <= _LOOK_BACK * size:
                example = next(fresh, None)
                if example is None:
                    break
                batch.place(example)
            missing = size - len(batch.members)
            dealt += batch.members + batch.put_aside[:missing]
            waiting = batch.put_aside[missing:] + beyond
            missing -= len(batch.put_aside[:missing])
            dealt += waiting[:missing] + list(itertools.islice(fresh, max(0, missing - len(waiting))))
            waiting = waiting[missing:]
        return dealt


class _Batch:
    """A batch in the making."""

    def __init__(self, size: int, queries: list[int], positives: list[int]):
        self.size, self.queries, self.positives = size, queries, positives
        self.members: list[int] = []
        self.put_aside: list[int] = []
        self._met_queries: set[int] = set()
        self._met_positives: set[int] = set()

    def place(self, example: int) -> None:
        """Into the batch if there is room and neither its query nor its positive is there yet, else aside."""
        query, positive = self.queries[example], self.positives[example]
        if len(self.members) < self.size and query not in self._met_queries and positive not in self._met_positives:
            self.members.append(example)
            self._met_queries.add(query)
            self._met_positives.add(positive)
        else:
            self.put_aside.append(example)
