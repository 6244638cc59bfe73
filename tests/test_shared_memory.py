"""Arrays that pass through memory which ranks share; ``test_distributed`` has it between processes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from utils.ranks import shared_memory
from utils.ranks.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(not shared_memory.is_possible(), reason="needs Linux on x86-64")


@pytest.fixture
def opened():
    """Makes the memory for some ranks, and says where it is."""
    descriptors = []

    def make(size: int) -> str:
        path, descriptor = shared_memory.create(size)
        descriptors.append(descriptor)
        return path

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_arrays_of_any_size_arrive_whole_and_in_order(opened, size, monkeypatch):
    monkeypatch.setattr(shared_memory, "_AREA", 64)
    monkeypatch.setattr(shared_memory, "_LOOKS", 50)
    path = opened(size)

    def work(rank: int) -> None:
        shared = SharedMemory(path, rank, [os.getpid()] * size)
        rng = np.random.default_rng(0)
        for _ in range(300):
            shape = (int(rng.integers(0, 40)), int(rng.integers(1, 4)))
            arrays = [(rng.random(shape) * 1000).astype(rng.choice(["<f4", "<u2", "<f8", "u1"])) for _ in range(size)]
            arrays = [array.astype(arrays[0].dtype) for array in arrays]
            for given, found in zip(arrays, shared.gather(arrays[rank]), strict=True):
                assert found.dtype == given.dtype
                np.testing.assert_array_equal(found, given)
            received = arrays[rank].copy()
            shared.broadcast(received)
            np.testing.assert_array_equal(received, arrays[0])

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(work, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_objects_of_any_size_arrive_whole_and_in_order(opened, size, monkeypatch):
    monkeypatch.setattr(shared_memory, "_AREA", 64)
    path = opened(size)

    def work(rank: int) -> list:
        shared = SharedMemory(path, rank, [os.getpid()] * size)
        found = []
        for step in range(40):
            own = {"rank": rank, "text": "字" * (step * rank), "array": np.arange(step)} if step % 3 else None
            found += [shared.gather_object((rank, own)), shared.broadcast_object((rank, own))]
        return found

    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(work, range(size)):
            for step in range(40):
                gathered, broadcast = found[2 * step], found[2 * step + 1]
                assert [rank for rank, _ in gathered] == list(range(size)) and broadcast[0] == 0
                if step % 3:
                    assert [len(own["text"]) for _, own in gathered] == [step * rank for rank in range(size)]
                    np.testing.assert_array_equal(gathered[-1][1]["array"], np.arange(step))
                    assert broadcast[1]["rank"] == 0
                else:
                    assert gathered == [(rank, None) for rank in range(size)]


def test_what_a_rank_was_given_stays_when_others_go_on(opened):
    path = opened(2)

    def work(rank: int) -> list:
        shared = SharedMemory(path, rank, [os.getpid()] * 2)
        return [shared.gather(np.array([rank, step]))[1 - rank] for step in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for rank, found in enumerate(pool.map(work, range(2))):
            assert np.array(found).tolist() == [[1 - rank, step] for step in range(20)]


def test_a_rank_that_has_ended_is_not_waited_for(opened):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        shared = SharedMemory(opened(2), 0, [os.getpid(), other.pid])
    finally:
        other.communicate(b"\n")
    with pytest.raises(ConnectionError, match="has ended"):
        shared.gather(np.zeros(3))
