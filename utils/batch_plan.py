"""The batch plan: which rows of an epoch meet in which batch, the same for any number of ranks."""

from dataclasses import dataclass

import numpy as np

from utils import hard_batches
from utils.training_rows import TrainingRows

# Entries put aside for a later batch that are looked at again for the next one, in batches.
_LOOK_BACK = 16


@dataclass(frozen=True)
class Example:
    """A row as one epoch sees it: ``passages`` holds its positive, then its negatives."""

    row: int
    query_id: int
    passages: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Which examples meet in which batch: the same for any number of ranks.

    Each epoch shuffles anew, draws each row's positive and negatives anew, and keeps equal queries and equal
    positives out of one batch where it can; where it cannot, they stay, and the loss masks them.

    Args:
        batch_size: queries in a batch, over all ranks.
        n_ranks: a last batch that is too small to give every rank a query is left out.
        multiple: the number of batches is cut to a multiple of this (gradient accumulation).
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
    multiple: int = 1
    hard_batches: bool = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        total = sum(self._n_batches(size) for size in self._group_sizes())
        return total // self.multiple * self.multiple if total >= self.multiple else total

    def epoch(self, number: int) -> list[list[Example]]:
        """The batches of an epoch."""
        rng = np.random.default_rng([self.seed, number])
        batches = []
        for group in self._groups(number, rng):
            examples = [self._example(number, row, copy) for row, copy in group]
            if self.hard_batches:
                negatives = [self.rows.negatives[example.row] for example in examples]
                positives, queries = np.array([(example.passages[0], example.query_id) for example in examples]).T
                examples = [examples[i] for i in hard_batches.order(positives, queries, negatives, self.batch_size)]
            dealt = self._deal(examples)
            batches += dealt[: self._n_batches(len(group))]
        if self.group_by_source or self.hard_batches:
            # Neither should the files take turns, nor should the batches of leftovers come last.
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches[: len(self)]

    @property
    def smallest_batch(self) -> int:
        """Rows that a batch has at least."""
        return self.batch_size if self.drop_last else min(self.batch_size, max(2, self.n_ranks))

    @property
    def rows_that_can_meet(self) -> int:
        """Rows of an epoch that batches are made of: all, or the most that one file gives."""
        return max(self._group_sizes())

    def _n_batches(self, n: int) -> int:
        full, rest = divmod(n, self.batch_size)
        return full + (rest >= self.smallest_batch)

    def _counts(self) -> np.ndarray:
        """Entries of each file in an epoch."""
        sizes = np.bincount(self.rows.sources, minlength=len(self.rows.weights))
        return np.maximum(np.rint(sizes * np.array(self.rows.weights)), 1).astype(np.int64)

    def _group_sizes(self) -> list[int]:
        counts = self._counts()
        return counts.tolist() if self.group_by_source else [int(counts.sum())]

    def _groups(self, number: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
        """Shuffled (row, copy) pairs: one list a file, or one in all."""
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
        return [[(int(row), int(copy)) for row, copy in rng.permutation(group)] for group in groups]

    def _example(self, epoch: int, row: int, copy: int) -> Example:
        rows = self.rows
        rng = np.random.default_rng([self.seed, epoch, row, copy])
        positives, negatives = rows.positives[row], rows.negatives[row]
        positive = positives[rng.integers(len(positives))]
        wanted = self.group_size - 1
        drawn = rng.permutation(negatives)[:wanted]
        if len(drawn) < wanted:
            drawn = np.concatenate([drawn, self._random_negatives(rng, row, drawn, wanted - len(drawn))])
        return Example(row, int(rows.query_ids[row]), np.concatenate([[positive], drawn]).astype(np.int64))

    def _random_negatives(self, rng: np.random.Generator, row: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """Other queries' positives, for a row that has too few negatives of its own."""
        pool = self.rows.all_positives
        forbidden = self.rows.known_positives[int(self.rows.query_ids[row])] | set(drawn.tolist())
        found: list[int] = []
        for passage in rng.choice(pool, min(len(pool), count + len(forbidden)), replace=False).tolist():
            if passage not in forbidden and len(found) < count:
                found.append(passage)
        # A corpus of a few passages may not hold enough of them: then they repeat, or known positives, which
        # the loss masks, stand in.
        while len(found) < count:
            found.append(found[0] if found else int(pool[0]))
        return np.array(found, np.int64)

    def _deal(self, examples: list[Example]) -> list[list[Example]]:
        """Batches in which no query and no positive comes twice, as far as possible."""
        batches: list[list[Example]] = []
        waiting: list[Example] = []
        fresh = iter(examples)
        left = len(examples)
        while left:
            size = min(self.batch_size, left)
            batch: list[Example] = []
            put_aside: list[Example] = []
            taken: set[tuple[str, int]] = set()
            look_back, beyond = waiting[: _LOOK_BACK * size], waiting[_LOOK_BACK * size :]
            for example in look_back:
                _place(example, batch, put_aside, taken, size)
            while len(batch) < size and len(put_aside) <= _LOOK_BACK * size:
                example = next(fresh, None)
                if example is None:
                    break
                _place(example, batch, put_aside, taken, size)
            missing = size - len(batch)
            batch += put_aside[:missing]
            waiting = put_aside[missing:] + beyond
            while len(batch) < size:
                batch.append(waiting.pop(0) if waiting else next(fresh))
            batches.append(batch)
            left -= size
        return batches


def _place(example: Example, batch: list, put_aside: list, taken: set, size: int) -> None:
    """Into the batch if there is room and neither its query nor its positive is there yet, else aside."""
    keys = {("query", example.query_id), ("positive", int(example.passages[0]))}
    if len(batch) < size and not taken & keys:
        batch.append(example)
        taken |= keys
    else:
        put_aside.append(example)
