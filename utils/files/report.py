"""What a person sees while a script runs, and the run report that programs read afterwards."""

import importlib.metadata
import logging
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..process import runtime
from . import json_files
from .outputs import REPORT, Outputs

_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "faiss-cpu", "faiss-gpu", "numpy", "tokenizers")
# With output that is not a terminal a bar becomes a line this often.
_LINE_EVERY_S = 30.0


def set_up_logging() -> None:
    """Log lines on stderr, from rank 0 only."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    root = logging.getLogger("utils")
    root.handlers[:] = [handler] if runtime.rank() == 0 else [logging.NullHandler()]
    root.setLevel(logging.INFO)
    root.propagate = False


class _Formatter(logging.Formatter):
    """Log lines hold texts and paths of the user's data."""

    def format(self, record: logging.LogRecord) -> str:
        return runtime.shown(super().format(record))


class Pace:
    """How long the rest of some work takes. What came before the first update, such as compiling, does not count once
    there is more to go by.
    """

    def __init__(self, work: float, now: float):
        self._left, self._done, self._n_updates = work, 0.0, 0
        self._started = self._now = now

    def update(self, work: float, now: float) -> None:
        """So much of it is done, at this time in seconds."""
        if self._n_updates == 1:
            self._started, self._done = self._now, 0.0
        self._n_updates += 1
        self._left, self._done, self._now = self._left - work, self._done + work, now

    def seconds_left(self) -> float:
        """As it goes so far; infinite if nothing is done."""
        return self._left * (self._now - self._started) / self._done if self._done else float("inf")


class Progress:
    """A bar on a terminal, an occasional line elsewhere, silence on other ranks.

    Args:
        work: that of all units that are not ``done``, where they are unlike; the time left goes by it.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, work: float | None = None):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._already, self._started = done, time.monotonic()
        self._pace = Pace(total - done if work is None else work, self._started)
        self._line_due = self._started + _LINE_EVERY_S
        self._bar = None
        if runtime.rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            # tqdm's own estimate goes by units.
            shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{postfix}, {rate_fmt}]"
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, unit_scale=True, leave=False, bar_format=shape,
                postfix="?",
            )  # fmt: skip

    def update(self, count: int, work: float | None = None) -> None:
        """``count`` more units are done, which were so much of the work."""
        self.done += count
        now = time.monotonic()
        self._pace.update(count if work is None else work, now)
        if self._bar is not None:
            left = self._pace.seconds_left()
            self._bar.postfix = "?" if math.isinf(left) else self._bar.format_interval(left)
            self._bar.update(count)
        elif runtime.rank() == 0 and now >= self._line_due and self.done < self.total:
            self._line_due = now + _LINE_EVERY_S
            rate = (self.done - self._already) / (now - self._started)
            left = self._pace.seconds_left()
            speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:,.2g}/s"
            line = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {speed}, about {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class RunReport:
    """Collects what a run did; ``as_dict`` is what ``<output>.report.json`` holds."""

    def __init__(self, script: str, arguments: dict):
        self.script, self.arguments = script, arguments
        self.counts: dict[str, int] = {}
        self.results: dict = {}
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of this block to ``seconds[name]``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def as_dict(self) -> dict:
        """Everything, ready for JSON. Times in seconds, memory in bytes."""
        return {
            "script": self.script,
            "arguments": self.arguments,
            "counts": self.counts,
            **self.results,
            "seconds": {
                **{name: round(value, 3) for name, value in self.seconds.items()},
                "total": round(time.monotonic() - self._started, 3),
            },
            "peak_memory_bytes": runtime.peak_memory_bytes(),
            "world_size": runtime.world_size(),
            "versions": versions(),
        }

    def publish(self, outputs: Outputs) -> dict:
        """Write ``as_dict`` to ``<output>.report.json``, let all outputs appear, and return what was written.

        Call it after the last ``stage``, whose seconds count when it ends.

        Raises:
            OSError: an output cannot be written.
        """
        about = self.as_dict() | {"outputs": outputs.names()}
        with outputs.stage(REPORT) as stream:
            stream.write(json_files.as_json(about))
        outputs.commit()
        return about


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Iterable[Sequence[str]], title: str = "") -> str:
    """Columns for a terminal: the first, names, to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title] if title else []
    for name, *values in rows:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join(["", f"{name:<{widths[0]}}", *cells]))
    return runtime.shown("\n".join(lines))


def shortened(text: str, width: int) -> str:
    """A text on one line, of at most ``width`` characters before its control characters become escapes."""
    text = " ".join(text.split())
    return runtime.shown(text if len(text) <= width else text[: width - 1] + "…")


def differing(one: str, other: str, width: int) -> tuple[str, str]:
    """Two texts on a line each, of at most ``width`` characters, cut so that the place where they part is seen."""
    one, other = " ".join(one.split()), " ".join(other.split())
    pairs = enumerate(zip(one, other, strict=False))
    same = next((i for i, (left, right) in pairs if left != right), min(len(one), len(other)))
    start = max(0, same - width // 3) if max(len(one), len(other)) > width else 0
    begun = "…" if start else ""
    return shortened(begun + one[start:], width), shortened(begun + other[start:], width)
