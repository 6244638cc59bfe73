"""Memory-mapped arrays, which the system counts as ours for as long as it likes, and which processes can share."""

import mmap
import os
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where in a file an array lies, row by row; ``file`` says which file that was (device and inode)."""

    path: str
    file: tuple[int, int]
    offset: int
    shape: tuple[int, ...]
    dtype: str


def place_of(array: np.ndarray) -> Place | None:
    """The place that another process can map to see the same values; None for an array that has none."""
    owner = _map_of(array)
    if owner is None or owner.filename is None or array.size == 0 or not array.flags.c_contiguous:
        return None
    within = _address(array) - _address(np.frombuffer(owner.base, np.uint8))
    start = owner.offset - owner.offset % mmap.ALLOCATIONGRANULARITY
    try:
        return Place(str(owner.filename), _identity(owner.filename), start + within, array.shape, array.dtype.str)
    except OSError:
        return None  # removed in the meantime


def map_place(place: Place) -> np.ndarray | None:
    """The array there, read-only; None if this process does not find that file, or may not read it."""
    try:
        if _identity(place.path) != place.file:
            return None
        return np.memmap(place.path, place.dtype, "r", place.offset, place.shape)
    except (OSError, ValueError):
        return None


def release(array: np.ndarray) -> None:
    """Hand back the memory of an array that is mapped from a file: what is used again is read again.

    Args:
        array: C-contiguous. Nothing happens to one that is not mapped, nor to one whose changes are its own
            (``mode="c"``).
    """
    owner = _map_of(array)
    if owner is None or array.size == 0:
        return
    start = _address(array) - _address(np.frombuffer(owner.base, np.uint8))
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    owner.base.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def _map_of(array: np.ndarray) -> np.memmap | None:
    """The map that an array is a part of, unless there is none, or it may differ from its file."""
    owner = array
    while isinstance(owner, np.ndarray) and not isinstance(owner.base, mmap.mmap):
        owner = owner.base
    return owner if isinstance(owner, np.memmap) and owner.mode != "c" else None


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
