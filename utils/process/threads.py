"""NumPy work on all our cores: one block of it on each, with single-threaded products."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from . import runtime

Result = TypeVar("Result")


def in_threads(work: Callable[[int], Result], starts: Iterable[int]) -> list[Result]:
    """``work(start)`` of each start, on as many threads as we have cores, each with single-threaded products.

    NumPy's comparisons run on one core while they last; giving each core its own block keeps all of them
    busy. NumPy's matrix library must not start threads of its own, not even between two calls: they
    go on spinning for a while and take the cores from ours.
    """
    _single_threaded_products()
    starts = list(starts)
    if runtime.cpu_threads() == 1 or len(starts) == 1:
        return [work(start) for start in starts]
    return list(_pool().map(work, starts))


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that stay, so that each one's memory is not given back and faulted in again."""
    return ThreadPoolExecutor(runtime.cpu_threads())


@cache
def _single_threaded_products() -> None:
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")
