"""Output files that appear whole or not at all, and the folder that a killed run leaves behind."""

import glob
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..process import own_files
from .jsonl import RecordError, to_line

# In the work folder, what a later run has no use for begins so; caches, which it goes on from, do not.
_PASSING = "output"
# All that a work folder can hold: the lock, such drafts, vectors by their fingerprint, and neighbours.
_OF_WORK = re.compile(rf"lock|{_PASSING}\..*|[0-9a-f]{{32}}|neighbors-.*")
# Beside every main output; its key "outputs" lists the names of all that a run has written.
REPORT = ".report.json"
# What a small file's name ends with until it is whole.
DRAFT = ".part"
# What file systems allow for a name, less what the work folder's and temporary names add.
_LONGEST_NAME = 235
# A killed run's last process may still be on its way out.
LOCK_PATIENCE_S = 10


class Outputs:
    """The output files of a run, which appear together, whole, after success.

    They are written in the work folder ``<main>.work`` beside the main output and renamed into place
    by ``commit``, the main output last, so that its presence means that the run was completed. The
    work folder is locked for the lifetime of the process: a second run with the same output is
    refused, and what a killed run left there is taken over.

    ``with Outputs(...) as outputs:`` abandons them when the block raises.

    Args:
        main: the path of the main output; a symbolic link is followed.
        suffixes: of the files that a run may write beside it. ``commit`` removes those that an earlier run left and
            this one did not write. Which ones an earlier run left is listed in its report (``REPORT``, always written);
            others are somebody else's, and refused.
    """

    def __init__(self, main: str, suffixes: Sequence[str]):
        self.main = Path(os.path.realpath(main))
        self.work = self.main.parent / (self.main.name + ".work")
        self._given, self._suffixes = main, suffixes
        self._staged: dict[str, Path] = {}
        self._lock: IO | None = None

    def open_work(self, inputs: Iterable[str | None] = (), cache: str | None = None) -> None:
        """Check every output path, then make and lock the work folder.

        Args:
            inputs: files and folders that no output may overwrite.
            cache: a folder that is still to be made, perhaps; it may hold the outputs, but not lie within one.

        Raises:
            OSError: it cannot be made or written.
            ValueError: an output would overwrite an input, or another run holds the folder.
        """
        if len(os.fsencode(self.main.name)) > _LONGEST_NAME:
            raise ValueError(f"{self.main}: the name is too long; expected at most {_LONGEST_NAME} bytes")
        if os.path.islink(self._given) and not own_files.is_own(os.lstat(self._given), Path(self._given).parent):
            raise ValueError(f"{self._given}: is another user's link to {self.main}; give the file itself")
        if self._given.endswith("/") or self.main.is_dir():
            raise IsADirectoryError(f"{self._given}: is a directory; expected a path for the output file")
        existing = with_links(path for path in inputs if path and os.path.exists(path))
        earlier = self._earlier()
        self._check_work(existing + ([cache] if cache else []))
        self._keep_out_of_inputs(existing, earlier)
        # And those of another script's, which commit removes.
        left = {name.removeprefix(self.main.name) for name in earlier}
        for suffix in sorted({"", *self._suffixes, *left}):
            final = self._final(suffix)
            if len(os.fsencode(final.name)) > _LONGEST_NAME:
                raise ValueError(f"{final}: the name is too long; expected at most {_LONGEST_NAME} bytes")
            if final.is_dir():
                raise IsADirectoryError(f"{final}: is a directory; expected to write a file there")
            if final.exists() and not final.is_file():
                raise ValueError(f"{final}: is no regular file; expected a path for a file, which is put there whole")
            is_input = final.exists() and any(os.path.samefile(path, final) for path in existing)
            if is_input or (cache and Path(os.path.realpath(cache)).is_relative_to(final)):
                raise ValueError(f"{final}: the output would overwrite an input; give another output path")
            if suffix and final.exists() and final.name not in earlier:
                reason = f"is in the way, and of no earlier run (no {REPORT} there lists it); move it elsewhere"
                raise ValueError(f"{final}: {reason}")
            if suffix and _is_main_output(final):
                raise ValueError(f"{final}: another run's output is in the way; give another output path")
        try:
            self._lock = own_files.take_lock(self.work, LOCK_PATIENCE_S)
        except OSError as error:
            raise described(error, f"{self._given}: cannot write there") from None
        if self._lock is None:
            raise ValueError(f"{self._given}: another run is writing this output; wait for it or give another path")
        self._remove_done()

    def _check_work(self, inputs: Sequence[str]) -> None:
        """Refuse a work folder that holds what is not ours."""
        for path in inputs:
            if Path(os.path.realpath(path)).is_relative_to(self.work):
                raise ValueError(f"{path}: lies in {self.work}, which is removed in the end; move it elsewhere")
        if os.path.lexists(self.work) and (self.work.is_symlink() or not self.work.is_dir()):
            raise ValueError(f"{self.work}: is in the way and no folder; move it elsewhere")
        with suppress(FileNotFoundError):  # also where a run that ends takes it away just now
            if not own_files.is_own(self.work.lstat(), self.work.parent):
                raise ValueError(f"{self.work}: belongs to another user; remove it, or give another output path")
            held = os.listdir(self.work)
            if (held and "lock" not in held) or not all(map(_OF_WORK.fullmatch, held)):
                raise ValueError(f"{self.work}: is in the way and no work folder of an earlier run; move it elsewhere")

    def _keep_out_of_inputs(self, existing: Sequence[str], earlier: Sequence[str]) -> None:
        """Refuse a main output that is a file of an input folder, or that another run wrote beside its own."""
        for name, about in _reports_that_could_list(self.main):
            if self.main.name in about:
                raise ValueError(f"{self.main}: was written beside {name}, of another run; give another output path")
        # An earlier run's output, such as an evaluation beside the model, is listed by the report beside it.
        is_foreign = self.main.exists() and self.main.name not in earlier
        for folder in filter(os.path.isdir, existing):
            if is_foreign and self.main.is_relative_to(os.path.realpath(folder)):
                raise ValueError(f"{self.main}: is a file of {folder}, an input; give another output path")

    def scratch(self, name: str) -> Path:
        """A path in the work folder for a file of no use to a later run, which ``commit`` and ``abandon`` remove."""
        return self.work / f"{_PASSING}.scratch.{name}"

    def _final(self, suffix: str) -> Path:
        return self.main.with_name(self.main.name + suffix)

    def _earlier(self) -> Sequence[str]:
        """The names of the files that an earlier run left, by the report that is there."""
        own = (self.main.name, self.main.name + ".")
        return [name for name in _listed(self._final(REPORT)) if name == own[0] or name.startswith(own[1])]

    def names(self) -> list[str]:
        """The names of the files that this run writes, its report among them, for the report to list."""
        return [self._final(suffix).name for suffix in sorted({*self._staged, REPORT})]

    @contextmanager
    def stage(self, suffix: str = "") -> Iterator[IO[bytes]]:
        """A writer for ``<main><suffix>``, gzipped if the name ends so; the file appears there at ``commit``."""
        assert not suffix or suffix in self._suffixes
        final = self._final(suffix)
        draft = self.work / f"{_PASSING}{suffix or '.main'}"
        try:
            with own_files.create(draft) as stream:
                if final.suffix == ".gz":
                    # No time stamp inside: equal rows must give equal bytes.
                    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as zipped:
                        yield zipped  # type: ignore[misc]
                else:
                    yield stream
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise described(error, f"{final}: cannot write") from None
        self._staged[suffix] = draft

    def commit(self) -> None:
        """Rename every staged file into place, then remove the work folder."""
        # Another script's, too, whose main output this one takes the place of.
        for name in {*self._earlier()} - {*self.names(), self.main.name}:
            if not _is_main_output(self.main.with_name(name)):
                self.main.with_name(name).unlink(missing_ok=True)
        # The report comes first: after a kill, it tells that what lies beside it is ours.
        for suffix in sorted(self._staged, key=lambda suffix: (suffix == "", suffix != REPORT)):
            try:
                os.replace(self._staged[suffix], self._final(suffix))
            except OSError as error:
                raise described(error, f"{self._final(suffix)}: cannot write") from None
        done = self.work.with_name(f"{self.work.name}.done-{os.getpid()}")
        shutil.rmtree(done, ignore_errors=True)  # a killed run's that had this number
        lock, self._lock = self._lock, None  # whatever interrupts this, nothing is left to abandon
        os.rename(self.work, done)  # at once, so that a run that waits for the lock never sees half of it
        if lock is not None:
            lock.close()
        self._remove_done()

    def _remove_done(self) -> None:
        """This run's work folder, and what kills have left of others that were done with."""
        for path in self.work.parent.glob(f"{glob.escape(self.work.name)}.done-*"):
            if path.name.rpartition("-")[2].isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def abandon(self) -> None:
        """Remove drafts and scratch files, and the work folder too if nothing worth resuming is in it."""
        if self._lock is None:
            return
        try:
            for name in os.listdir(self.work):
                if name.startswith(_PASSING):
                    remove(self.work / name)
            if os.listdir(self.work) == ["lock"]:
                shutil.rmtree(self.work, ignore_errors=True)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        if kind is not None:
            self.abandon()


def with_links(paths: Iterable[str]) -> list[str]:
    """Files and folders, and what is linked to from a folder: a hub's cache, for one, keeps models so."""
    paths = list(paths)
    within = [os.path.join(path, name) for path in paths if os.path.isdir(path) for name in os.listdir(path)]
    return paths + [path for path in within if os.path.islink(path) and os.path.exists(path)]


def _listed(report: Path) -> list[str]:
    """The names of the files that a run says it has written; none if the file is no report of ours."""
    if not report.is_file():
        return []  # nor a pipe, which would be waited for
    try:
        listed = json.loads(report.read_bytes())["outputs"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [name for name in listed if isinstance(name, str) and "/" not in name] if isinstance(listed, list) else []


def _is_main_output(path: Path) -> bool:
    """Whether a run has written its main output there, or is about to."""
    return path.name in _listed(path.with_name(path.name + REPORT)) or path.with_name(path.name + ".work").is_dir()


def _reports_that_could_list(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Of every output that this file could lie beside, by its name: that output's name, and what its report lists."""
    parts = path.name.split(".")
    for n in range(1, len(parts)):
        main = ".".join(parts[:n])
        yield main, _listed(path.with_name(main + REPORT))


def write_rejected(outputs: Outputs, rejected: Iterable[RecordError]) -> None:
    """The rows that ``on_bad_row=skip`` set aside, in ``<output>.rejected.jsonl``."""
    with outputs.stage(".rejected.jsonl") as stream:
        for error in rejected:
            stream.write(to_line({"path": error.path, "line": error.line, "reason": error.reason}))


def write_whole(path: Path, content: bytes, is_safe: bool = False) -> None:
    """A small file that appears by rename, all of it or none.

    Args:
        is_safe: once this returns, it is there also after a power cut.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    draft = path.with_name(path.name + DRAFT)
    try:
        with own_files.create(draft) as stream:
            stream.write(content)
            if is_safe:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(draft, path)
        if is_safe:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise described(error, f"{path}: cannot write") from None


def remove(path: Path) -> None:
    """A file, a link or a whole folder, if there is one.

    Raises:
        OSError: it cannot be removed; the message names it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise described(error, f"{path}: cannot remove") from None


def described(error: OSError, what: str) -> OSError:
    """The same kind of error, its message opening with what was being done; as it is if that was said already."""
    if getattr(error, "is_described", False):
        return error
    told = type(error)(f"{what}: {error.strerror or error}")
    told.is_described = True
    return told
