"""Memory-mapped arrays, which the system counts as ours for as long as it likes."""

import mmap

import numpy as np


def release(array: np.ndarray) -> None:
    """Hand back the memory of an array that is mapped from a file: what is used again is read again.

    Args:
        array: C-contiguous. Nothing happens to one that is not mapped, nor to one whose changes are its own
            (``mode="c"``).
    """
    owner = array
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base
    if not isinstance(owner, np.memmap) or owner.mode == "c" or array.size == 0:
        return
    start = _address(array) - _address(np.frombuffer(owner.base, np.uint8))
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    owner.base.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
