"""Which texts the stores of a folder hold vectors of, so that a text is encoded once and not once a list.

Beside its vectors a finished store keeps ``texts``, int64 [4, n]: both halves of each text's digest, its row and its
token count, the first halves ascending. ``about.json`` holds the key of the encoder and the digest of that file. A
store that is being filled has no ``about.json`` yet, and is passed over.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from ..files.outputs import write_whole
from ..files.store import EmbeddingStore
from ..ranks.mapped import taken

logger = logging.getLogger(__name__)

# Of ``texts``, for each text.
_TEXT_BYTES = 32
# Rows that are copied at a time.
_BLOCK_ROWS = 1 << 12


def digests(texts: Iterable[str]) -> np.ndarray:
    """BLAKE2 of each text, 16 bytes as int64 [n, 2]: no two texts are expected to have the same."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(joined, "<i8").reshape(-1, 2)


def note(store: EmbeddingStore, encoder: str, texts: Sequence[str], lengths: np.ndarray) -> dict:
    """Write down which texts a store holds, before it is finished; returns what ``finish`` is to keep of it.

    Args:
        encoder: the key of all that a vector depends on but the text.
        lengths: the texts' token counts, int [n].

    Raises:
        OSError: it cannot be written.
    """
    halves = digests(texts)
    order = np.argsort(halves[:, 0], kind="stable")
    content = np.stack([*halves[order].T, order, lengths[order]]).astype("<i8").tobytes()
    write_whole(store.folder / "texts", content)
    return {"encoder": encoder, "texts": hashlib.sha256(content).hexdigest()}


def copy_known(store: EmbeddingStore, encoder: str, texts: Sequence[str]) -> int:
    """Fill an empty store with the vectors that finished stores beside it hold of its texts.

    With each copied row the store keeps its token count. Returns how many stores they come from.

    Raises:
        OSError: the store cannot be written.
    """
    others = list(_of(encoder, store))
    if not others:
        return 0
    found = _Found(len(texts))
    halves = digests(texts)
    sources = [vectors for vectors in (found.look_up(halves, other) for other in others) if vectors is not None]
    if sources:
        store.copy(found.lengths, found.blocks(sources))
    return len(sources)


class _Found:
    """Where each of ``n`` texts is held: in which source and row of it (-1: in none), and its token count (or -1)."""

    def __init__(self, n: int):
        self.source, self.row = np.full(n, -1, np.int32), np.full(n, -1, np.int64)
        self.lengths = np.full(n, -1, np.int32)
        self._n_sources = 0

    def look_up(self, halves: np.ndarray, other: EmbeddingStore) -> np.ndarray | None:
        """The vectors of another store, if it holds texts that none before it does."""
        try:
            index, vectors = _index(other), other.read()
        except (ValueError, PermissionError) as error:
            logger.warning("warning: not used: %s", error)
            return None
        except (FileNotFoundError, BlockingIOError):
            return None  # removed in the meantime
        if not len(vectors):
            return None
        wanted = np.flatnonzero(self.source < 0)
        place = np.searchsorted(index[0], halves[wanted, 0])
        np.minimum(place, len(vectors) - 1, out=place)
        # Of texts whose first halves are equal only one is found; the others are encoded again.
        is_there = (index[:2, place] == halves[wanted].T).all(axis=0)
        wanted, place = wanted[is_there], place[is_there]
        if not len(wanted):
            return None
        self.source[wanted], self.row[wanted], self.lengths[wanted] = self._n_sources, index[2, place], index[3, place]
        self._n_sources += 1
        with suppress(OSError):
            os.utime(other.folder / "lock")  # used just now, like a store that is opened
        return vectors

    def blocks(self, sources: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors of the texts that were found, as ``EmbeddingStore.copy`` takes them."""
        for start in range(0, len(self.source), _BLOCK_ROWS):
            source, row = self.source[start : start + _BLOCK_ROWS], self.row[start : start + _BLOCK_ROWS]
            known = np.flatnonzero(source >= 0)
            if not len(known):
                continue
            first, last = known[0], known[-1] + 1
            block = np.zeros((last - first, sources[0].shape[1]), np.float32)
            for number in np.unique(source[known]):
                here = np.flatnonzero(source == number)
                block[here - first] = taken(sources[number], row[here])
            yield start + int(first), block


def _of(encoder: str, store: EmbeddingStore) -> Iterator[EmbeddingStore]:
    """The other finished stores of the same folder and encoder."""
    for folder in sorted(store.folder.parent.glob("[0-9a-f]*")):
        if folder == store.folder:
            continue
        other = EmbeddingStore(folder.parent, folder.name, 0, store.dim)
        try:
            if other.is_complete and other.about.get("encoder") == encoder:
                other.n = (folder / "texts").stat().st_size // _TEXT_BYTES
                yield other
        except FileNotFoundError:
            continue  # removed in the meantime
        except (ValueError, PermissionError) as error:
            logger.warning("warning: not used: %s", error)


def _index(store: EmbeddingStore) -> np.ndarray:
    """What ``note`` has written, int64 [4, n].

    Raises:
        ValueError: it is something else by now.
    """
    path, shape = store.folder / "texts", (4, store.n)
    index = np.memmap(path, "<i8", "r", shape=shape) if store.n else np.zeros(shape, "<i8")
    if hashlib.sha256(index).hexdigest() != store.about.get("texts"):
        raise ValueError(f"{path}: is damaged; remove {store.folder} and run again")
    return index
