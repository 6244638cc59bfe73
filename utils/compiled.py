"""Loops compiled by numba: how, and where the machine code is kept."""

from collections.abc import Callable

import numba


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
