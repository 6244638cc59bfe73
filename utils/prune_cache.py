"""Make an embedding cache smaller: what no run has used for the longest time is removed first.

    python -m utils.prune_cache FOLDER --keep 20GB              # until it takes at most so much
    python -m utils.prune_cache FOLDER --unused_days 30         # what no run has used for so long
    python -m utils.prune_cache FOLDER --keep 0                 # all but what runs use just now

Runs may use the folder meanwhile: a store that is being filled, or whose vectors a run reads, stays. Only stores of
vectors, neighbours and logits are removed, whatever else lies there.
"""

import argparse
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from .files import report
from .files.outputs import described
from .files.store import amount, is_store
from .process import own_files, runtime

logger = logging.getLogger(__name__)

# In their folder, what stores are called, and what they are until they are gone.
_NAME, _NEIGHBORS, _DOOMED = re.compile("[0-9a-f]{32}"), re.compile("neighbors-[0-9a-f]{32}"), ".removed-"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Kept(NamedTuple):
    """A store: its bytes on disk, and when a run used it last, in seconds since 1970."""

    folder: Path
    size: int
    used: float


class Pruned(NamedTuple):
    """What is gone, what is left, and which of these would be gone if they were not in use."""

    removed: list[Kept]
    left: list[Kept]
    in_use: list[Kept]

    def summary(self, folder: Path) -> str:
        """A short table for a person."""
        rows = zip(("removed", "left", "of these, in use"), self, strict=True)
        return report.table(
            [(name, f"{len(stores):,} stores", amount(sum(store.size for store in stores))) for name, stores in rows],
            str(folder),
        )


def prune(folder: Path, keep: float = math.inf, unused_days: float = math.inf) -> Pruned:
    """Remove stores until they take at most ``keep`` bytes, and those unused for more than ``unused_days``.

    Raises:
        OSError: the folder cannot be read, or a store not removed.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder; expected an embedding_cache")
    for path in [*folder.glob(f"{_DOOMED}*"), *folder.glob(f"neighbors-*/{_DOOMED}*")]:
        shutil.rmtree(path, ignore_errors=True)  # of a run of this that was killed
    stores = sorted(_stores(folder), key=lambda store: store.used)
    total, now = sum(store.size for store in stores), time.time()
    pruned = Pruned([], [], [])
    for store in stores:
        is_wanted = total <= keep and now - store.used <= unused_days * 86400
        if not is_wanted and _remove(store.folder):
            pruned.removed.append(store)
            total -= store.size
            continue
        pruned.left.append(store)
        if not is_wanted:
            pruned.in_use.append(store)
    return pruned


def _stores(folder: Path) -> Iterator[Kept]:
    """Those of texts, and of the neighbours that searches have found."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    for path in folder.glob("neighbors-*/*"):
        if _NEIGHBORS.fullmatch(path.parent.name) and not path.parent.is_symlink() and path.name.isdecimal():
            paths.append(path)
    for path in paths:
        with suppress(FileNotFoundError):  # another run of this has just removed it
            if is_store(path):
                files = {file.name: file.stat() for file in path.iterdir()}
                # Of a run that is filling it, the lock is as old as the run.
                used = max((files[name].st_mtime for name in ("lock", "journal") if name in files), default=0.0)
                yield Kept(path, sum(file.st_blocks * 512 for file in files.values()), used)


def _remove(store: Path) -> bool:
    """Remove a store, unless a run uses it."""
    try:
        lock = own_files.take_lock(store, patience_s=0)
    except ValueError as error:
        logger.warning("left where it is: %s", error)
        return False
    if lock is None:
        return False
    doomed = store.with_name(f"{_DOOMED}{os.getpid()}-{store.name}")
    try:
        with ExitStack() as held:
            held.enter_context(lock)
            if (store / "vectors").exists():
                vectors = own_files.open_alone(store / "vectors")
                if vectors is None:
                    return False
                held.enter_context(vectors)
            store.rename(doomed)  # at once, so that a run that waits for the lock never sees half of it
        shutil.rmtree(doomed)
    except OSError as error:
        raise described(error, f"{store}: cannot remove it") from None
    if _NEIGHBORS.fullmatch(store.parent.name):
        with suppress(OSError):  # others are there
            store.parent.rmdir()
    return True


def size_of(text: str) -> float:
    """Bytes: ``20GB`` is 20 * 10**9, ``20GiB`` is 20 * 2**30.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"--keep is {text!r}; expected a size such as 20GB, 500MB or 1.5TiB")
    unit = _UNITS[found[2]]
    return float(found[1]) * (2 ** (10 * round(math.log10(unit) / 3)) if found[3] else unit)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main() -> None:
    parser = _Parser("python -m utils.prune_cache", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", help="an embedding_cache")
    parser.add_argument("--keep", help="the most that may stay, such as 20GB", metavar="SIZE")
    parser.add_argument("--unused_days", help="remove what no run has used for longer", metavar="DAYS")
    given = parser.parse_args()
    if given.keep is None and given.unused_days is None:
        raise ValueError("expected --keep SIZE, --unused_days DAYS, or both")
    days = math.inf
    if given.unused_days is not None:
        if not re.fullmatch(r"\d+(\.\d+)?", given.unused_days):
            raise ValueError(f"--unused_days is {given.unused_days!r}; expected a number of days")
        days = float(given.unused_days)
    report.set_up_logging()
    folder = Path(given.folder)
    keep = size_of(given.keep) if given.keep is not None else math.inf
    pruned = prune(folder, keep, days)
    left = sum(store.size for store in pruned.left)
    if left > keep:
        logger.warning("warning: %s are in use and stay: run this again later", amount(left))
    runtime.tell(pruned.summary(folder))


if __name__ == "__main__":
    runtime.run(main)
