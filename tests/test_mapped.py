"""Arrays that lie in files: found again by another map, and their memory handed back."""

import os

import numpy as np
import pytest
from conftest import resident

from utils.ranks.mapped import map_place, place_of, release, taken


@pytest.fixture
def saved(tmp_path):
    """A file of 40,000 rows behind a header."""
    path = tmp_path / "x.npy"
    np.save(path, np.arange(320_000, dtype=np.float32).reshape(40_000, 8))
    return path


@pytest.mark.parametrize("part", [slice(None), slice(1, 3), slice(30_001, None)])
def test_another_map_of_the_place_holds_the_same(saved, part):
    rows = np.load(saved, mmap_mode="r")[part]
    for given in (rows, rows.view(np.ndarray), rows.reshape(-1)):
        again = map_place(place_of(given))
        assert again is not given
        np.testing.assert_array_equal(again, given)


def test_a_raw_map_with_an_offset(saved):
    rows = np.memmap(saved, np.float32, "r", offset=128 + 4 * 1500, shape=(100, 8))
    np.testing.assert_array_equal(map_place(place_of(rows[7:])), rows[7:])


def test_what_has_no_place(saved):
    rows = np.load(saved, mmap_mode="r")
    private = np.load(saved, mmap_mode="c")
    for given in (np.zeros((2, 2)), rows[::2], rows[:0], private, rows + 0):
        assert place_of(given) is None


def test_another_file_under_the_same_name_is_not_taken_for_it(saved):
    place = place_of(np.load(saved, mmap_mode="r"))
    np.save(saved.with_name("y.npy"), np.zeros((40_000, 8), np.float32))
    os.replace(saved.with_name("y.npy"), saved)
    assert map_place(place) is None
    saved.unlink()
    assert map_place(place) is None


def test_changes_of_a_private_map_are_not_thrown_away(saved):
    private = np.load(saved, mmap_mode="c")
    private[:] = 1
    release(private)
    assert (private == 1).all()


def test_rows_taken_here_and_there_leave_no_pages_behind(saved):
    rows = np.load(saved, mmap_mode="r")
    wanted = np.random.default_rng(0).integers(0, len(rows), 3000)
    np.testing.assert_array_equal(taken(rows, wanted), wanted[:, None] * 8 + np.arange(8))
    np.testing.assert_array_equal(taken(np.array(rows), wanted), rows[wanted])
    assert len(taken(rows, wanted[:0])) == 0

    release(rows)
    rows[wanted]
    spread = resident(rows)
    release(rows)
    taken(rows, wanted)
    assert resident(rows) < spread / 4
