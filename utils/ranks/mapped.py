"""Memory-mapped arrays, which the system counts as ours for as long as it likes, and which processes can share."""

import mmap
import os
from typing import NamedTuple

import numpy as np

# What Linux maps at most of a file around the page that is read.
_AROUND = 2 << 20
# Rows that are read between two times that what was mapped for them is handed back.
_TAKEN_ROWS = 128


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


def is_mapped(array: np.ndarray) -> bool:
    """True if reading the array brings a file's pages into memory, which ``release`` hands back."""
    return _map_of(array) is not None


def release(array: np.ndarray) -> None:
    """Hand back the memory of an array that is mapped from a file: what is used again is read again.

    With it goes what the system mapped of the file around it, to read ahead.

    Args:
        array: C-contiguous. Nothing happens to one that is not mapped, nor to one whose changes are its own
            (``mode="c"``).
    """
    owner = _map_of(array)
    if owner is None or array.size == 0:
        return
    start = _address(array) - _address(np.frombuffer(owner.base, np.uint8))
    first = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    last = min(len(owner.base), start + array.nbytes + _AROUND)
    owner.base.madvise(mmap.MADV_DONTNEED, first, last - first)


def taken(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``array[rows]`` of a C-contiguous array, without keeping more of one that is mapped in memory than before.

    Rows here and there would: the system maps up to megabytes around each.
    """
    if not is_mapped(array):
        return array[rows]
    copy = np.empty((len(rows), *array.shape[1:]), array.dtype)
    order = np.argsort(rows)
    for start in range(0, len(rows), _TAKEN_ROWS):
        part = order[start : start + _TAKEN_ROWS]
        copy[part] = array[rows[part]]
        release(array[rows[part[0]] : rows[part[-1]] + 1])
    return copy


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
