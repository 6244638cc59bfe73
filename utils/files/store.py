"""Embeddings on disk, so that nothing is encoded twice and a killed run goes on where it stopped.

A store is a folder named by a fingerprint of everything that the vectors depend on: the texts in
their order and the encoder's own description (weights, tokenizer, template, lengths, pooling, dtype).
Any change gives another folder, so a stale vector cannot be read. In it, ``vectors.partial`` (raw
little-endian float32 rows) is filled batch by batch and ``journal`` notes each finished batch after
its rows are on disk; when all are there the file is renamed to ``vectors``. ``about.json`` tells a
damaged file from a whole one, whatever numbers are in it. Rows that other stores had are copied first;
``copied`` then says which, and the batches are those of the other rows.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from ..process import own_files
from .outputs import DRAFT, described, write_whole

logger = logging.getLogger(__name__)

_DTYPE = np.dtype("<f4")
_JOURNAL_ENTRY = struct.Struct("<qq")  # a batch number and a check on it, against a torn last entry
# All that a store can hold; other modules put ``texts`` there.
_WHOLE = ("about.json", "copied", "texts")
_FILES = {"lock", "vectors", "vectors.partial", "journal", *_WHOLE, *(name + DRAFT for name in _WHOLE)}
# Longest vector whose products with its like fit into float32.
_LARGEST_NORM = 1e18
# Rows of a store that are looked at when it is read: all would take as long as a search.
_CHECKED_ROWS = 1000
# Rows that derive() holds in memory at a time.
_DERIVE_ROWS = 1 << 14


def is_store(folder: Path) -> bool:
    """Whether a folder holds what a store does, and nothing else."""
    names = set(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else set()
    return "lock" in names and names <= _FILES


def fingerprint(description: dict, texts: Iterable[str]) -> str:
    """SHA-256, in hex, of an encoder's description and the texts in their order."""
    hasher = hashlib.sha256(json.dumps(description, sort_keys=True, ensure_ascii=False).encode())
    for text in texts:
        data = text.encode()
        hasher.update(b"%d:" % len(data))
        hasher.update(data)
    return hasher.hexdigest()


class EmbeddingStore:
    """``n`` vectors of ``dim`` dimensions in ``folder / fingerprint``, used by rank 0 alone.

    ``open`` takes the store's lock, waiting for another run that fills the same store. Rows of another
    ``dtype`` are kept just as well: mining keeps neighbours here. ``what`` they are is a word for messages.
    """

    def __init__(
        self, folder: Path, key: str, n: int, dim: int, dtype: np.dtype = _DTYPE, what: str = "embeddings"
    ):  # fmt: skip
        self.folder, self.what = folder / key[:32], what
        self.n, self.dim, self.dtype = n, dim, dtype
        # Of the rows that were copied, what ``copy`` was told of each, int32 [n]; None if there was no copy.
        self.copied: np.ndarray | None = None
        self._lock: IO | None = None
        self._data: IO | None = None
        self._journal: IO | None = None

    @property
    def is_complete(self) -> bool:
        """True once every vector is there, with what tells a damaged file."""
        return (self.folder / "vectors").exists() and (self.folder / "about.json").exists()

    @property
    def about(self) -> dict:
        """What ``finish`` was given to keep, and the digest of some rows; requires ``is_complete``.

        Raises:
            ValueError: it is something else by now.
        """
        path = self.folder / "about.json"
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise ValueError(f"{path}: is damaged; remove {self.folder} and run again") from None

    def open(self) -> set[int]:
        """Lock the store and return the numbers of the batches that are finished; an earlier copy is in ``copied``.

        Raises:
            OSError: the folder cannot be made or written, or too little space is left on its disk.
        """
        self.copied = None
        try:
            self._lock = own_files.take_lock(self.folder, patience_s=1)
            if self._lock is None:
                logger.info("another run is filling %s; waiting for it", self.folder)
                self._lock = own_files.take_lock(self.folder, patience_s=float("inf"))
            os.utime(self._lock.fileno())  # what was used the longest ago goes first where a cache is made smaller
            if self.is_complete:
                self._remove_notes()  # of a run that was killed just before it did
                return set()
            size = self.n * self.dim * self.dtype.itemsize
            partial, journal = self.folder / "vectors.partial", self.folder / "journal"
            finished = set()
            # Without its rows, as after a copy that was broken off, the journal means nothing.
            if partial.is_file() and partial.stat().st_size == size and self._read_copied():
                finished = self._read_journal()
            goes_on = bool(finished) or self.copied is not None
            if not goes_on:
                self._require_space(size)
                self._remove_notes()
            self._data = own_files.reopen(partial) if goes_on else own_files.create(partial)
            self._data.truncate(size)
            self._journal = own_files.append(journal) if goes_on else own_files.create(journal)
            return finished
        except OSError as error:
            raise described(error, f"{self.folder}: cannot keep {self.what} there") from None

    def copy(self, copied: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]]) -> None:
        """Rows that are known already; requires that nothing was finished. All other rows are then to be written.

        Args:
            copied: int32 [n], -1 for the rows that are not copied; the numbers of the others are kept for the caller.
            blocks: (first row, vectors float32 [b, dim]). Rows between that are not copied can hold anything.

        Raises:
            OSError: the disk is full or gone.
        """
        assert self._data is not None
        try:
            for first, vectors in blocks:
                self._data.seek(first * self.dim * self.dtype.itemsize)
                self._data.write(np.ascontiguousarray(vectors, self.dtype))
            self._data.flush()
            os.fdatasync(self._data.fileno())
            # Batches are numbered among the rows that remain, so the journal must not outlive this.
            write_whole(self.folder / "copied", np.ascontiguousarray(copied, np.int32).tobytes(), is_safe=True)
            self.copied = copied
        except OSError as error:
            raise described(error, f"{self.folder}: cannot write {self.what}") from None

    def rows_to_write(self) -> np.ndarray:
        """The rows that were not copied, int64, ascending."""
        return np.arange(self.n) if self.copied is None else np.flatnonzero(self.copied < 0)

    def write(self, batches: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Finished batches: (number, rows int64 [b], vectors float32 [b, dim]).

        Raises:
            OSError: the disk is full or gone; the batches already noted stay good.
        """
        assert self._data is not None and self._journal is not None
        try:
            for _, rows, vectors in batches:
                for row, vector in zip(rows, np.ascontiguousarray(vectors, self.dtype), strict=True):
                    self._data.seek(int(row) * vector.nbytes)
                    self._data.write(vector)
            self._data.flush()
            os.fdatasync(self._data.fileno())  # the journal must not outlive the rows, not even a power cut
            self._journal.write(b"".join(_JOURNAL_ENTRY.pack(number, ~number) for number, _, _ in batches))
            self._journal.flush()
        except OSError as error:
            raise described(error, f"{self.folder}: cannot write {self.what}") from None

    def finish(self, about: dict | None = None) -> None:
        """All batches are written: make the store complete, and keep a few facts about it beside the vectors."""
        assert self._data is not None and self._journal is not None
        try:
            os.fsync(self._data.fileno())
            self._data.close()
            self._journal.close()
            digest = self._digest(self.folder / "vectors.partial")
            write_whole(self.folder / "about.json", json.dumps((about or {}) | {"some_rows": digest}).encode())
            os.replace(self.folder / "vectors.partial", self.folder / "vectors")
            self._remove_notes()
        except OSError as error:
            raise described(error, f"{self.folder}: cannot write {self.what}") from None

    def read(self) -> np.ndarray:
        """The vectors, [n, dim], memory-mapped and read-only; requires ``is_complete``.

        While they are mapped, the store is in use and not removed from a cache.

        Raises:
            ValueError: the file is damaged, as after a copy that was broken off.
        """
        path = self.folder / "vectors"
        if path.stat().st_size != self.n * self.dim * self.dtype.itemsize:
            raise ValueError(f"{path}: is not {self.n} x {self.dim} {self.dtype}; remove {self.folder} and run again")
        if self.about.get("some_rows") != self._digest(path):
            raise ValueError(
                f"{path}: is damaged, its {self.what} are not those written; remove {self.folder} and run again"
            )
        if self.n == 0:
            return np.zeros((0, self.dim), self.dtype)
        with own_files.open_shared(path) as stream:
            return np.memmap(stream, self.dtype, "r", shape=(self.n, self.dim))

    def _digest(self, path: Path) -> str:
        """SHA-256, in hex, of evenly spaced rows."""
        hasher, size = hashlib.sha256(), self.dim * self.dtype.itemsize
        with open(path, "rb") as stream:  # through a map, far more than these rows would be in memory
            for row in np.linspace(0, self.n - 1, min(self.n, _CHECKED_ROWS)).astype(int).tolist():
                hasher.update(os.pread(stream.fileno(), size, row * size))
        return hasher.hexdigest()

    def close(self) -> None:
        """Let go of the files and the lock; a store in which nothing was finished or copied is removed."""
        try:
            with contextlib.ExitStack() as stack:  # closes each, also where one cannot be flushed
                for stream in filter(None, (self._lock, self._journal, self._data)):
                    stack.callback(stream.close)
                is_filled = self._journal is None or self._journal.closed or self._journal.tell() > 0
                if not is_filled and self.copied is None:
                    shutil.rmtree(self.folder, ignore_errors=True)
        except OSError as error:
            raise described(error, f"{self.folder}: cannot write {self.what}") from None
        finally:
            self._data = self._journal = self._lock = None

    def _read_copied(self) -> bool:
        """False if what an earlier copy has noted is not whole, and so the rows mean nothing."""
        path = self.folder / "copied"
        if not path.exists():
            return True
        copied = np.frombuffer(path.read_bytes(), np.uint8)
        if copied.nbytes != self.n * 4:
            return False
        self.copied = copied.view(np.int32)
        return True

    def _remove_notes(self) -> None:
        for name in ("journal", "copied"):
            (self.folder / name).unlink(missing_ok=True)

    def _read_journal(self) -> set[int]:
        try:
            with own_files.reopen(self.folder / "journal") as stream:
                content = stream.read()
                whole = len(content) - len(content) % _JOURNAL_ENTRY.size
                stream.truncate(whole)
        except FileNotFoundError:
            return set()
        entries = _JOURNAL_ENTRY.iter_unpack(content[:whole])
        return {number for number, check in entries if check == ~number}

    def _require_space(self, size: int) -> None:
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if free < size:
            raise OSError(f"{amount(size)} needed for {self.n:,} rows of {self.dim} numbers, {amount(free)} free")


def amount(size: int) -> str:
    """Bytes for people, in the largest unit of which there is at least one."""
    power = next((power for power in (3, 2, 1) if size >= 1 << 10 * power), 0)
    return f"{size / (1 << 10 * power):,.0f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def read_user_vectors(path: str, n: int, of_each: str, normalize: bool) -> np.ndarray:
    """A user's ``.npy`` file: float [n, dim], memory-mapped; checked row by row in blocks.

    Args:
        of_each: what it holds a vector of, such as "row of input"; a word for messages.

    Raises:
        FileNotFoundError, ValueError: missing, not a plain float array, not ``n`` rows, or a row with
            NaN, infinity or (when they are to be normalised) length 0.
    """
    expected = f"expected float32 [{n}, dim], a vector for each {of_each}"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; {expected}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is no regular file; {expected}")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # noqa: BLE001 - a damaged header ends in whatever parsing it as Python ends in
        raise ValueError(f"{path}: is no .npy file of numbers, or a damaged one; {expected}") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "an archive"
        raise ValueError(f"{path}: holds {found}; {expected}")
    if len(vectors) != n or vectors.shape[1] == 0:
        raise ValueError(f"{path}: has shape {list(vectors.shape)}; {expected}")
    for start in range(0, n, 1 << 14):
        with np.errstate(over="ignore"):  # told below
            norms = np.linalg.norm(np.asarray(vectors[start : start + (1 << 14)], np.float64), axis=1)
        if not normalize:
            norms[norms > _LARGEST_NORM] = np.inf  # its float32 products would overflow
        bad = np.flatnonzero(~np.isfinite(norms) | ((norms == 0) & normalize))
        if len(bad):
            what = "NaN, infinity or huge values" if not np.isfinite(norms[bad[0]]) else "only zeros"
            raise ValueError(f"{path}: row {start + bad[0] + 1} holds {what}; expected finite vectors")
    return vectors


def derive(
    vectors: np.ndarray, path: Path, rows: np.ndarray | None = None, dim: int | None = None, normalize: bool = True
) -> np.ndarray:
    """Chosen rows, cut to their first ``dim`` values and scaled to length 1 if asked for.

    Args:
        vectors: float [n, width], memory-mapped or not.
        path: where the result is kept if it differs from ``vectors``; written and mapped block by block.
        rows: int64, ascending or not; default: all.

    Returns:
        float32 [len(rows), dim]: ``vectors`` itself if nothing would change (lengths within 1e-6 of 1,
        which is what float32 can hold, are 1), else a memory map.

    Raises:
        ValueError: a row to be scaled has length 0, or there are fewer than ``dim`` dimensions.
        OSError: the disk is full or cannot be written.
    """
    n = len(vectors) if rows is None else len(rows)
    dim = vectors.shape[1] if dim is None else dim
    if dim > vectors.shape[1]:
        raise ValueError(f"dimension is {dim}; the vectors have only {vectors.shape[1]}")
    same_rows = rows is None or (n == len(vectors) and bool((rows == np.arange(n)).all()))
    if (
        same_rows
        and dim == vectors.shape[1]
        and vectors.dtype == np.float32
        and vectors.flags.c_contiguous
        and not (normalize and _largest_error(vectors) > 1e-6)
    ):
        return vectors
    if n == 0:
        return np.zeros((0, dim), np.float32)
    try:
        with own_files.create(path) as stream:
            for start in range(0, n, _DERIVE_ROWS):
                part = slice(start, start + _DERIVE_ROWS)
                block = np.asarray(vectors[part if rows is None else rows[part], :dim], np.float64)
                if normalize:
                    norms = np.linalg.norm(block, axis=1, keepdims=True)
                    if not norms.all():
                        place = start + int(np.flatnonzero(norms == 0)[0])
                        row = (place if rows is None else int(rows[place])) + 1
                        raise ValueError(
                            f"vector {row} is all zeros in its first {dim} dimensions; it has no direction"
                        )
                    block = block / norms
                stream.write(np.ascontiguousarray(block, _DTYPE))
    except OSError as error:
        raise described(error, f"{path}: cannot keep vectors there") from None
    return np.memmap(path, _DTYPE, "r", shape=(n, dim))


def _largest_error(vectors: np.ndarray) -> float:
    """How far a row's length is from 1, at most."""
    worst = 0.0
    for start in range(0, len(vectors), _DERIVE_ROWS):
        block = np.asarray(vectors[start : start + _DERIVE_ROWS], np.float64)
        worst = max(worst, float(np.abs(np.linalg.norm(block, axis=1) - 1).max(initial=0)))
    return worst
