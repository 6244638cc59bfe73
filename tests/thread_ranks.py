"""Ranks as threads of one process, for what must come out alike on any number of them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils.ranks import mapped
from utils.ranks.group import Ranks


class ThreadRanks(Ranks):
    """A rank that exchanges values with the others at a barrier."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list):
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def gather_object(self, value) -> list:
        self._box[self.rank] = value
        self._barrier.wait()
        gathered = list(self._box)
        self._barrier.wait()
        return gathered

    def gather_equal(self, array: np.ndarray) -> list[np.ndarray]:
        gathered = self.gather_object(array.copy())
        assert len({(part.shape, part.dtype) for part in gathered}) == 1
        return gathered

    def broadcast_object(self, value):
        return self.gather_object(value)[0]

    def broadcast(self, array: np.ndarray | None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        sent = self.broadcast_object(array)
        assert shape is None or (sent.shape == shape and sent.dtype == np.float32)
        return sent

    def mapped(self, array: np.ndarray | None) -> np.ndarray | None:
        place = self.broadcast_object(mapped.place_of(array) if array is not None else None)
        return mapped.map_place(place) if place is not None else None


def on_ranks(size: int, work: Callable[[Ranks], object]) -> list:
    """``work(ranks)`` on each of ``size`` ranks, in rank order; an error on one ends them all."""
    barrier, box = threading.Barrier(size), [None] * size

    def run(rank: int) -> object:
        try:
            return work(ThreadRanks(rank, size, barrier, box))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
