"""Ragged rows against plain lists of lists."""

import itertools
import tracemalloc

import numpy as np
import pytest

from utils.files.ragged import Growing, Ragged


def random_lists(seed: int) -> list[list[int]]:
    """Ascending lists, some of them empty, the first and the last among them."""
    rng = np.random.default_rng(seed)
    sizes = [0, *rng.integers(0, 6, 20).tolist(), 40, 0]
    return [sorted(rng.choice(60, size, replace=False).tolist()) for size in sizes]


CASES = [random_lists(seed) for seed in range(5)] + [[], [[]], [[], [], []], [[7]], [[3, 5, 5]]]


@pytest.mark.parametrize("lists", CASES)
def test_rows_come_back_as_they_were_given(lists):
    flat = [value for row in lists for value in row]
    for held in Ragged.of(lists), Ragged.cut([len(row) for row in lists], np.array(flat, np.int64)):
        assert held.lims.dtype == held.values.dtype == np.int64
        assert [row.tolist() for row in held] == lists and len(held) == len(lists)
        assert held.sizes().tolist() == [len(row) for row in lists]
        assert held.owners().tolist() == [i for i, row in enumerate(lists) for _ in row]
        assert [held.values[held.part(i)].tolist() for i in range(len(lists))] == lists


def test_rows_keep_their_order_and_their_type():
    assert [row.tolist() for row in Ragged.of(iter([(3, 1), np.array([2])]))] == [[3, 1], [2]]
    assert Ragged.cut([1, 0], np.array([2], np.int32)).take(np.array([1, 0])).values.dtype == np.int32


@pytest.mark.parametrize("lists", CASES)
def test_chosen_values(lists):
    held, chosen = Ragged.of(lists), [[value % 3 == 0 for value in row] for row in lists]
    flat = np.array([one for row in chosen for one in row], bool)
    assert held.counts(flat).tolist() == [sum(row) for row in chosen]
    assert [row.tolist() for row in held.keep(flat)] == [[v for v in row if v % 3 == 0] for row in lists]


@pytest.mark.parametrize("lists", CASES)
@pytest.mark.parametrize("n", [0, 1, 50])
def test_taken_rows_may_come_twice(lists, n):
    held, rows = Ragged.of(lists), np.random.default_rng(n).integers(0, max(1, len(lists)), n if lists else 0)
    assert [row.tolist() for row in held.take(rows)] == [lists[i] for i in rows]
    expected = [(i, value) for i, row in enumerate(rows) for value in lists[row]]
    for size in 1, 7, 1000:
        parts = [zip(*map(np.ndarray.tolist, part), strict=True) for part in held.take_in_parts(rows, size)]
        parts = list(map(list, parts))
        assert list(itertools.chain(*parts)) == expected and all(0 < len(part) <= size for part in parts)


@pytest.mark.parametrize("lists", CASES)
def test_values_are_found_in_their_own_row(lists):
    rng = np.random.default_rng(0)
    held, rows = Ragged.of(lists), rng.integers(0, max(1, len(lists)), 30 if lists else 0)
    wanted = rng.integers(-1, 70, (len(rows), 9))
    found = held.find(rows, wanted)
    assert found.dtype == np.int64 and found.shape == wanted.shape
    for row, of_row, places in zip(rows.tolist(), wanted.tolist(), found.tolist(), strict=True):
        for value, place in zip(of_row, places, strict=True):
            assert (place >= 0) == (value in lists[row])
            if place >= 0:
                assert held.values[place] == value and held.lims[row] <= place < held.lims[row + 1]


def test_a_long_row_that_is_asked_for_often_is_held_once():
    n = 3000
    held = Ragged.of([range(n), [5]])
    rows, wanted = np.tile([0, 1], n // 2), np.arange(n)[:, None]
    tracemalloc.start()
    found = held.find(rows, wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * n * 8  # n times n would be 3,000
    np.testing.assert_array_equal(found[:, 0], np.where(rows == 0, np.arange(n), np.where(np.arange(n) == 5, n, -1)))


@pytest.mark.parametrize("lists", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_of_each_row_s_values(lists, dtype):
    held = Ragged.of(lists)
    values = np.random.default_rng(1).standard_normal(len(held.values)).astype(dtype)
    values[3:6] = values[3:4]  # equal ones
    for which, of in (("lowest", min), ("median", np.median), ("highest", max)):
        expected = [of(values[held.part(i)].astype(np.float64)) if row else np.inf for i, row in enumerate(lists)]
        found = held.one_of_each(values, which)
        assert found.dtype == np.float64 and found.tolist() == expected


@pytest.mark.parametrize("lists", CASES)
def test_rows_grow_in_their_order(lists):
    growing = Growing(len(lists), sum(map(len, lists)) + 5, (np.int32, np.float64))
    for start in range(0, len(lists), 4):
        block = lists[start : start + 4]
        flat = [value for row in block for value in row]
        growing.add([len(row) for row in block], flat, [value / 2 for value in flat])
    held, (halves,) = growing.finish()
    assert [row.tolist() for row in held] == lists and held.values.dtype == np.int32
    assert halves.tolist() == [value / 2 for row in lists for value in row]
