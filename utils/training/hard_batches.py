"""Which examples meet in a batch, so that queries see their own mined negatives at no cost.

An example that names another's positive among its negatives is linked to it. Batches are grown one by one, each time
by the example with the most links to and from those that are already in. So the passages of a batch are hard
negatives of most of its queries, though none was encoded for that: each is some query's positive. Topic-aware
sampling (Hofstaetter et al., 2021) and global contrastive batching (Sachidananda et al., 2023) fill batches with the
same aim; here the mined rows say what is alike, and what the miner took for an answer makes no link.
"""

import heapq

import numpy as np

from ..files.ragged import Ragged

# A negative at place r of its row weighs 1 / (r + 3), beyond the first two next to nothing: the hardest ones make the
# batch, and the others say who comes in where those leave a choice, or nobody.
_FIRST, _OFFSET, _REST = 2, 3, 1e-5
# Links followed from each member: a passage may be named by thousands of rows, or be the positive of thousands.
_MOST_NAMING, _MOST_ANSWERED = 64, 4
# Examples looked at for one that may enter a batch without a link to it.
_LOOK_AHEAD = 512


def order(positives: np.ndarray, queries: np.ndarray, negatives: Ragged, size: int) -> list[int]:
    """An order of the examples in which each ``size`` of them, from the first on, make a hard batch.

    No query and no positive comes twice in a batch while there are examples within reach that allow it.

    Args:
        positives: int [n], each example's positive passage.
        queries: int [n], each example's query.
        negatives: for each example, its negative passages, the hardest first.
    """
    left = _Left(positives, queries, negatives)
    ordered: list[int] = []
    while len(ordered) < len(positives):
        ordered += _grow(left, min(size, len(positives) - len(ordered)))
    return ordered


class _Left:
    """The examples that no batch has taken yet. ``weights`` are of links, by the negative's place in its row."""

    def __init__(self, positives: np.ndarray, queries: np.ndarray, negatives: Ragged):
        n = len(positives)
        self.positives, self.queries, self.negatives = positives.tolist(), queries.tolist(), negatives
        self.taken = np.zeros(n, bool)
        sizes = negatives.sizes()
        owners = np.repeat(np.arange(n, dtype=np.int32), sizes)
        ranks = (np.arange(len(owners)) - np.repeat(negatives.lims[:-1], sizes)).astype(np.int32)
        self.weights = _weights(np.arange(sizes.max(initial=0))).tolist()
        # Examples that name a passage, those that name it the hardest first; and those whose positive it is.
        self.naming = _Links(negatives.values, owners, ranks, self.taken)
        self.answered = _Links(positives, np.arange(n, dtype=np.int32), np.zeros(n, np.int32), self.taken)
        self._first = 0

    def ahead(self) -> list[int]:
        """The next ones in the order in which they came."""
        while self.taken[self._first]:
            self._first += 1
        return [self._first + int(i) for i in np.flatnonzero(~self.taken[self._first : self._first + _LOOK_AHEAD])]


def _weights(ranks: np.ndarray) -> np.ndarray:
    """What a link to a negative counts for, float64, by its place in its row."""
    return np.where(ranks < _FIRST, 1.0, _REST) / (ranks + _OFFSET)


class _Links:
    """Examples by passage, by rank and then in the order given. All arrays are int [links]."""

    def __init__(self, passages: np.ndarray, examples: np.ndarray, ranks: np.ndarray, taken: np.ndarray):
        order = np.lexsort((ranks, passages))
        keys, starts = np.unique(passages[order], return_index=True)
        self._place = dict(zip(keys.tolist(), range(len(keys)), strict=True))
        self._starts, self._ends = starts.tolist(), [*starts[1:].tolist(), len(order)]
        self._examples, self._ranks, self._taken = examples[order], ranks[order], taken

    def first(self, passage: int, most: int) -> tuple[list[int], list[int]]:
        """Of a passage's examples ``most``, and their ranks.

        Those at the front that are taken do not count: they are left out for good, so that each is passed once.
        """
        place = self._place.get(passage)
        if place is None:
            return [], []
        start, end = self._starts[place], self._ends[place]
        while start < end and self._taken[self._examples[start]]:
            start += 1
        self._starts[place] = start
        links = slice(start, min(start + most, end))
        return self._examples[links].tolist(), self._ranks[links].tolist()


def _grow(left: _Left, size: int) -> list[int]:
    """Take a batch."""
    members: list[int] = []
    met_positives: set[int] = set()
    met_queries: set[int] = set()
    towards: dict[int, float] = {}  # weight of the links from members to a passage
    back: dict[int, float] = {}  # weight of an example's links to members' positives
    # Gains only rise, so that an example's newest entry comes first, and the older ones find it taken.
    offers: list[tuple[float, int, int]] = []

    def offer(example: int) -> None:
        gain = towards.get(left.positives[example], 0.0) + back.get(example, 0.0)
        heapq.heappush(offers, (-gain, len(offers), example))

    def may_enter(example: int) -> bool:
        return left.positives[example] not in met_positives and left.queries[example] not in met_queries

    def best() -> int:
        while offers:
            example = heapq.heappop(offers)[2]
            if not left.taken[example] and may_enter(example):
                return example
        ahead = left.ahead()
        return next((example for example in ahead if may_enter(example)), ahead[0])

    while len(members) < size:
        member = best()
        left.taken[member] = True
        members.append(member)
        met_positives.add(left.positives[member])
        met_queries.add(left.queries[member])
        for passage, weight in zip(left.negatives[member].tolist(), left.weights, strict=False):
            towards[passage] = towards.get(passage, 0.0) + weight
            for example in left.answered.first(passage, _MOST_ANSWERED)[0]:
                offer(example)
        for example, rank in zip(*left.naming.first(left.positives[member], _MOST_NAMING), strict=True):
            back[example] = back.get(example, 0.0) + left.weights[rank]
            offer(example)
    return members
