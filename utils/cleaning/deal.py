"""How the rows of a block are dealt out to the ranks, and how what each of them finds is put together."""

import math
from typing import NamedTuple

import numpy as np

from ..kernels import onednn
from ..ranks.group import Ranks
from ..search.scores import Neighbors, merge


class Pairs(NamedTuple):
    """Pairs of a block at or above the threshold: int64 [n], int64 [n] of smaller numbers, canonical float64 [n]."""

    later: np.ndarray
    earlier: np.ndarray
    scores: np.ndarray

    @classmethod
    def joined(cls, parts: list["Pairs"]) -> "Pairs":
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


class Deal:
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
        whole = tuple(onednn.empty((self._n, *array.shape[1:]), array.dtype) for array in own)
        for array, start in zip(whole, starts, strict=False):
            for run, part in zip(self._runs, gathered, strict=True):
                rows = array[run].reshape(-1).view(np.uint8)
                rows[:] = part[start : start + len(rows)]
        return whole

    def joined(self, best: Neighbors, pairs: Pairs, divided: bool, most_pairs: int) -> tuple[Neighbors, Pairs | None]:
        """Each row's best over all ranks (k = 1), and all ranks' pairs, or None if some rank has more than the most.

        Args:
            best: of our run if ``divided``, else of every row.
        """
        if self._ranks.size == 1:
            return best, pairs if len(pairs.scores) <= most_pairs else None
        # One array, because each exchange takes its time; its last line says how many pairs there are.
        lines = np.zeros((1 + (-(-self._n // self._ranks.size) if divided else self._n), 2))
        lines[: len(best.scores), :1], lines[: len(best.scores), 1:] = best.scores, best.rows.view(np.float64)
        lines[-1, 0] = len(pairs.scores)
        gathered = self._ranks.gather_equal(lines)
        most = int(max(part[-1, 0] for part in gathered))
        if most > most_pairs:
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
        return best, Pairs.joined([Pairs(*part[:2].astype(np.int64), part[2]) for part in parts])


def _as_neighbors(lines: np.ndarray) -> Neighbors:
    """Of scores, and rows in the same bits: float64 [n, 2]."""
    return Neighbors(lines[:, :1].copy(), lines[:, 1:].copy().view(np.int64))
