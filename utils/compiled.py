"""Loops compiled by numba: how, and where the machine code is kept."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numba
from numba.core.codegen import get_host_cpu_features

from utils import runtime


def _kept_for_these_sources() -> str:
    """A folder beside the modules, of these sources alone.

    numba notices when a function's own file has changed, but not when one has whose functions were compiled into it.
    """
    folder, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for source in (path.read_bytes() for path in sorted(folder.glob("*.py"))):
        if b"numba" in source or b"import compiled" in source:
            digest.update(source)
    return str(folder / "__pycache__" / f"numba-{digest.hexdigest()[:16]}")


if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = _kept_for_these_sources()
if numba.config.CPU_FEATURES is None and runtime.cpu_has("avx512_bf16"):
    # LLVM keeps to half the width of these processors' registers, for the sake of older ones that slowed down.
    numba.config.CPU_FEATURES = f"{get_host_cpu_features()},-prefer-256-bit"


def compiled(fastmath: bool | set[str] = False) -> Callable:
    """A decorator: the function, compiled at its first call, and running without Python's lock.

    The machine code is kept for other processes, if this folder or the user's cache can be written.

    Args:
        fastmath: what the compiler may assume of floating-point numbers (numba's own argument).
    """
    options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # nowhere to keep it
            return numba.njit(**options)(function)

    return decorate


def inlined(fastmath: bool | set[str] = False) -> Callable:
    """A decorator for what such a function calls: it becomes a part of it.

    Here, because numba must not make anything before the processor's features are settled above: what it made would
    round otherwise than in a process that settled them first.
    """
    return numba.njit(fastmath=fastmath, inline="always", error_model="numpy")
