"""Work in threads: each start once, results in order, and errors that reach the caller."""

import threading
import time

import pytest

from utils.process import runtime, threads


@pytest.fixture(params=[1, 2, 5])
def n_threads(request, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_threads", lambda: request.param)
    threads._pool.cache_clear()
    yield request.param
    threads._pool.cache_clear()


@pytest.mark.parametrize("n", [0, 1, 3, 200])
def test_results_come_in_the_order_of_their_starts(n_threads, n):
    done = []

    def work(start: int) -> int:
        done.append(start)
        return start * 2

    assert threads.in_threads(work, range(10, 10 + n)) == [start * 2 for start in range(10, 10 + n)]
    assert sorted(done) == list(range(10, 10 + n))


def test_the_threads_work_side_by_side(n_threads):
    together = threading.Barrier(n_threads, timeout=20)
    assert threads.in_threads(lambda start: together.wait() >= 0, range(n_threads)) == [True] * n_threads


def test_an_error_reaches_the_caller_and_stops_the_others(n_threads):
    done = []

    def work(start: int) -> None:
        done.append(start)
        if start == 3:
            raise ValueError("three")
        time.sleep(1e-4)  # or another thread might be through with all before the error is seen

    with pytest.raises(ValueError, match="three"):
        threads.in_threads(work, range(100_000))
    assert len(done) < 100_000
    assert threads.in_threads(lambda start: start, range(4)) == [0, 1, 2, 3]
