"""Arrays and small objects that move between the ranks of one machine through memory that all of them map.

Gloo sends them through sockets, which takes milliseconds for what takes microseconds here.
"""

import mmap
import os
import pickle
import platform
import select
import time

import numpy as np

# Bytes of a rank's array that are passed on at a time; two such areas of each rank take turns.
_AREA = 2 << 20
# A flag has a cache line of its own.
_LINE = 64
# Looks at the flags before the processor is left to others, and seconds between two looks from then on: more and more.
_LOOKS, _PAUSE, _LONGEST_PAUSE = 2000, 5e-5, 2e-3


class SharedMemory:
    """One rank's view of the memory. Every method is a collective that all ranks must call in the same order.

    Args:
        path: from ``create``.
        pids: of all ranks, in their order.

    Raises:
        OSError: this process cannot map it, or cannot watch the others.
    """

    def __init__(self, path: str, rank: int, pids: list[int]):
        size = len(pids)
        with open(path, "r+b") as stream:
            whole = np.frombuffer(mmap.mmap(stream.fileno(), _bytes(size)), np.uint8)
        # The last step that each rank has finished writing for.
        self._flags = whole[: size * _LINE].view(np.int64)[:: _LINE // 8]
        self._areas = whole[size * _LINE :].reshape(2, size, _AREA)
        self._rank, self._step = rank, 0
        self._ended = select.poll()
        for other, pid in enumerate(pids):
            if other != rank:
                self._ended.register(os.pidfd_open(pid), select.POLLIN)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, in rank order; all have the same shape and dtype."""
        own = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        gathered = [np.empty(array.shape, array.dtype) for _ in self._flags]
        into = [part.reshape(-1).view(np.uint8) for part in gathered]
        for start in range(0, len(own), _AREA):
            part = slice(start, min(start + _AREA, len(own)))
            areas = self._pass_on(own[part])
            for area, whole in zip(areas, into, strict=True):
                whole[part] = area[: part.stop - part.start]
        return gathered

    def broadcast(self, array: np.ndarray) -> None:
        """``array``, C-contiguous, becomes rank 0's on every rank."""
        own = array.reshape(-1).view(np.uint8)
        for start in range(0, len(own), _AREA):
            part = own[start : start + _AREA]
            areas = self._pass_on(part if self._rank == 0 else part[:0])
            if self._rank != 0:
                part[:] = areas[0][: len(part)]

    def gather_object(self, value) -> list:
        """Every rank's value, in rank order."""
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.concatenate(self.gather(np.array([len(own)])))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(own)] = own
        return [_loaded(part[:size]) for part, size in zip(self.gather(padded), sizes, strict=True)]

    def broadcast_object(self, value):
        """Rank 0's value, on every rank."""
        own = np.frombuffer(pickle.dumps(value) if self._rank == 0 else b"", np.uint8)
        size = np.array([len(own)])
        self.broadcast(size)
        if self._rank == 0:
            self.broadcast(own)
            return value
        received = np.empty(size[0], np.uint8)
        self.broadcast(received)
        return _loaded(received)

    def _pass_on(self, own: np.ndarray) -> np.ndarray:
        """Write our bytes, and return all ranks' areas, uint8 [ranks, area], once the others have written theirs.

        They may be read until the next call: a rank that writes there again has seen us call it.
        """
        self._step += 1
        areas = self._areas[self._step % 2]
        areas[self._rank, : len(own)] = own
        self._flags[self._rank] = self._step
        looks, pause = 0, _PAUSE
        while self._flags.min() < self._step:
            looks += 1
            if looks < _LOOKS:
                os.sched_yield()
            else:
                time.sleep(pause)
                pause = min(1.05 * pause, _LONGEST_PAUSE)
                if self._ended.poll(0) and self._flags.min() < self._step:
                    raise ConnectionError("another process of this run has ended")
        return areas


def is_possible() -> bool:
    """True where what one process writes becomes visible to others in the order in which it was written."""
    return platform.machine() == "x86_64" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def create(size: int) -> tuple[str, int]:
    """Memory for so many ranks: the path that they can open, and a descriptor to close when they have."""
    descriptor = os.memfd_create("ranks")
    os.ftruncate(descriptor, _bytes(size))
    return f"/proc/{os.getpid()}/fd/{descriptor}", descriptor


def _loaded(pickled: np.ndarray):
    return pickle.loads(pickled)  # noqa: S301 - only this run's own processes write there


def _bytes(size: int) -> int:
    return size * (_LINE + 2 * _AREA)
