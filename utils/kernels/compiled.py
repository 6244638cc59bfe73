"""Loops compiled by numba: how, for which processor, and where the machine code is kept."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numba
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features

from ..process import own_files, runtime

logger = logging.getLogger(__name__)

# No flag that would let the compiler assume away infinities and NaN: a training that went wrong must show.
MATHS = {"reassoc", "contract", "arcp", "nsz"}


def _features() -> str:
    """What numba may use of the processor, as LLVM writes it: ``+avx512bw,-sse4a``."""
    return numba.config.CPU_FEATURES if numba.config.CPU_FEATURES is not None else get_host_cpu_features()


def may_use(*features: str) -> bool:
    """True if numba compiles for processors with these features, by LLVM's names for them."""
    return {f"+{feature}" for feature in features} <= set(_features().split(","))


def _folder_for_these_sources() -> str | None:
    """Where the machine code of these sources, for this processor, is kept: beside them, with the user's, or nowhere.

    numba notices when a function's own file has changed, but not when one has whose functions were compiled into it;
    and two kinds of processor that share a folder could take each other's file, of one function that is new to both.
    """
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(f"{numba.config.CPU_NAME} {_features()}".encode())
    for source in (path.read_bytes() for path in sorted(folder.rglob("*.py"))):
        if b"numba" in source or b"compiled" in source:
            digest.update(source)
    name = f"numba-{digest.hexdigest()[:16]}"
    # What is loaded from there is run: no other user may be able to put it there.
    places = (folder / "__pycache__" / name, runtime.cache_root() / name)
    return next((str(place) for place in places if own_files.is_private(place)), None)


if numba.config.DISABLE_JIT:
    # What calls the processor's own instructions has no meaning as Python.
    raise ValueError("NUMBA_DISABLE_JIT is set; unset it: the loops here work only when numba compiles them")
if numba.config.CPU_FEATURES is None and runtime.cpu_has("avx512_bf16"):
    # LLVM keeps to half the width of these processors' registers, for the sake of older ones that slowed down.
    numba.config.CPU_FEATURES = f"{get_host_cpu_features()},-prefer-256-bit"
if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = _folder_for_these_sources() or ""
    if not numba.config.CACHE_DIR:
        logger.info("machine code is kept nowhere: no folder was found that only this user can write to")


class _Cache(FunctionCache):
    """A function's machine code on disk. A disk that is full costs the time to compile, and not the run."""

    def load_overload(self, signature, target_context):
        try:
            return super().load_overload(signature, target_context)
        except OSError:
            return None
        except Exception as error:  # noqa: BLE001 - a damaged pickle ends in whatever its bytes ask for
            logger.info("machine code in %s is damaged (%r); compiling again", self.cache_path, error)
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, signature, data):
        try:
            super().save_overload(signature, data)
        except OSError as error:
            logger.info("machine code is not kept for the next run: %s", error)


class _Compiling(event.Listener):
    """Says once that loops are compiled, which delays what is asked for first, and in the end how long it took."""

    def __init__(self) -> None:
        self._depth, self._started, self.seconds = 0, 0.0, 0.0

    def on_start(self, event) -> None:
        if self._depth == 0:
            if not self.seconds:
                logger.info("compiling loops for this processor: once, and kept for later runs where that is possible")
                runtime.at_end(self._tell)
            self._started = time.monotonic()
        self._depth += 1

    def on_end(self, event) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.monotonic() - self._started

    def _tell(self) -> None:
        logger.info("of this run, compiling loops took %.1f s", self.seconds)


compiling = _Compiling()
event.register("numba:compile", compiling)


def compiled(fastmath: bool | set[str] = False, makes_arrays: bool = True) -> Callable:
    """A decorator: the function, compiled at its first call, and running without Python's lock.

    The machine code is kept for other processes where that is possible.

    Args:
        fastmath: what the compiler may assume of floating-point numbers (numba's own argument).
        makes_arrays: whether it makes any, or returns one. If not, numba need not count who holds which, also of an
            array's parts; each such count keeps the processor from working ahead. (``_nrt`` is numba's own option, not
            a promised one: look at it again when numba is updated.)
    """

    def decorate(function: Callable) -> Callable:
        options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy", "_nrt": makes_arrays}
        dispatcher = numba.njit(**options)(function)
        try:
            if numba.config.CACHE_DIR:  # numba would look for a folder of its own
                dispatcher._cache = _Cache(function)  # what njit(cache=True) does
        except RuntimeError:  # it cannot be written
            logger.info("machine code of %s is kept nowhere", function.__name__)
        return dispatcher

    return decorate


def inlined(fastmath: bool | set[str] = False) -> Callable:
    """A decorator for what such a function calls: it becomes a part of it.

    Here, because numba must not make anything before the processor's features are settled above: what it made would
    round otherwise than in a process that settled them first.
    """
    return numba.njit(fastmath=fastmath, inline="always", error_model="numpy")
