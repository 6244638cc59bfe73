"""Files in folders that others may write to: made anew, or gone on with only where they are this user's own.

Whoever may write beside an output can prepare there what a run is about to make: the work folder, or in it a link
to a file that only the run's user may write, or machine code for it to load. So a folder of another owner is
refused, a new file takes the place of whatever has its name, and an existing one is opened only if it is a plain
file with a single name. Standard library only.
"""

import errno
import fcntl
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless this user has it already.

    Raises:
        OSError: it cannot be made.
        ValueError: a link, something else or another user's folder is there.
    """
    try:
        try:
            folder.mkdir(parents=True)
        except FileNotFoundError:  # the folder above has just been removed
            folder.mkdir(parents=True)
    except FileExistsError:
        with suppress(FileNotFoundError):  # another run has just removed it
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode):
                raise ValueError(f"{folder}: is in the way and no folder; move it elsewhere") from None
            if not is_own(about, folder.parent):
                raise ValueError(f"{folder}: belongs to another user; remove it, or give another path") from None


def is_own(about: os.stat_result, folder: Path) -> bool:
    """Whether what lies in ``folder`` belongs to this user, or to whom its file system gives what this user makes."""
    if about.st_uid == os.geteuid():
        return True
    try:  # a network's file system may know root by another name
        with tempfile.TemporaryDirectory(prefix=".owner-", dir=folder) as probe:
            return os.lstat(probe).st_uid == about.st_uid
    except OSError:
        return False


def is_private(folder: Path) -> bool:
    """Make a folder if it is missing; True if only this user can write there, and no other could have."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
        own = stat.S_ISDIR(about.st_mode) and is_own(about, folder.parent) and not about.st_mode & 0o022
        return own and os.access(folder, os.W_OK)
    except OSError:
        return False


def create(path: Path) -> IO[bytes]:
    """A new file to write and read, in place of whatever has its name.

    Raises:
        OSError: it cannot be made.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666), "w+b")


def reopen(path: Path) -> IO[bytes]:
    """What an earlier run has left, to be read and written from its beginning.

    Raises:
        OSError: it is not there, or cannot be written.
        ValueError: it is a link, no plain file, or has another name too.
    """
    return os.fdopen(_opened(path, os.O_RDWR), "r+b")


def append(path: Path) -> IO[bytes]:
    """A file to add to, made if there is none; otherwise as ``reopen``."""
    return os.fdopen(_opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def _opened(path: Path, flags: int, mode: int = 0o666) -> int:
    # O_NONBLOCK: to open a pipe would wait for its other end.
    try:
        descriptor = os.open(path, flags | _NO_LINK | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise ValueError(f"{path}: is in the way and no regular file; move it elsewhere") from None
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = "has another name too" if stat.S_ISREG(about.st_mode) else "no regular file"
    raise ValueError(f"{path}: is in the way and {what}; move it elsewhere")


def take_lock(folder: Path, patience_s: float, is_given: bool = False) -> IO | None:
    """Make ``folder`` and lock it until the returned file is closed or the process ends.

    Args:
        is_given: the user has named this very folder, which may be a link, or another's to whom it was opened.

    Returns None if another process still holds it after ``patience_s`` seconds.

    Raises:
        OSError: it cannot be made there.
        ValueError: what is there is not this user's to write.
    """
    deadline = time.monotonic() + patience_s
    path = folder / "lock"
    while True:
        if is_given:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            make_folder(folder)
        try:
            lock = os.fdopen(_opened(path, os.O_RDWR | os.O_CREAT, 0o666 if is_given else 0o600), "r+b")
        except FileNotFoundError:
            continue  # the holder has just finished and removed the folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                os.register_at_fork(after_in_child=lock.close)  # a child that outlives us must not hold it
                return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                return None
            time.sleep(0.1)
        except FileNotFoundError:
            pass  # locked a file that its holder had just removed: make a new one
        lock.close()


def open_alone(path: Path) -> IO[bytes] | None:
    """What ``reopen`` opens, locked until it is closed; None if a file or a map of ``open_shared`` is still open."""
    stream = reopen(path)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def open_shared(path: Path) -> IO[bytes]:
    """A file to read, with a shared lock on it until it and every map of it are closed.

    Raises:
        OSError: it cannot be opened, or another process is about to remove it (BlockingIOError).
    """
    stream = open(os.fspath(path), "rb")  # noqa: SIM115 - the caller's
    try:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise
    return stream
