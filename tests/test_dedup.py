"""The blocked greedy rule against the one-by-one loop that defines it."""

import functools

import numpy as np
import pytest
from thread_ranks import on_ranks

from utils.cleaning import answers, greedy
from utils.cleaning.greedy import DedupResult, Duplicate, Duplicates, remove_near_duplicates
from utils.ranks.group import Ranks
from utils.search import sketches
from utils.search.scores import pair_scores
from utils.search.sketches import ScreenedIndex, Sketcher


def one_by_one(vectors, threshold):
    """kept rows, and {removed row: (best kept row before it, score)}."""
    kept, removed = [], {}
    for i, vector in enumerate(vectors):
        if kept:
            scores = pair_scores(np.repeat(vector[None], len(kept), 0), vectors[kept])
            best = int(scores.argmax())
            if scores[best] >= threshold:
                removed[i] = (kept[best], scores[best])
                continue
        kept.append(i)
    return kept, removed


def clustered(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n // 4, dim))
    vectors = centres[rng.integers(0, n // 4, n)] + 0.35 * rng.standard_normal((n, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    vectors[n // 2 : n // 2 + 20] = vectors[:20]  # exact copies
    return vectors


def clean(vectors, threshold, rows=None):
    rows = np.arange(len(vectors)) if rows is None else rows
    return remove_near_duplicates(vectors, rows, vectors.shape[1], threshold, Ranks())


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("block", [7, 64, 1024])
def test_equals_one_by_one(threshold, block, monkeypatch):
    monkeypatch.setattr(greedy._FullIndex, "block_rows", block)
    monkeypatch.setattr(greedy, "_PART_ROWS", 50)
    vectors = clustered(700, 24)
    result = clean(vectors, threshold)
    kept, removed = one_by_one(vectors, threshold)
    assert result.kept_rows.tolist() == kept
    assert {d.row: (d.kept_row, d.score) for d in result.duplicates} == removed


@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("n_groups", [2, 60, 700])
def test_rows_with_the_same_answers_go_at_a_lower_score(size, n_groups, screened, monkeypatch):
    monkeypatch.setattr(answers, "_PART_ROWS", 7)
    monkeypatch.setattr(answers, "_PART_KEPT", 5)
    monkeypatch.setattr(greedy, "_MOST_PAIRS", 60)
    monkeypatch.setattr(greedy._FullIndex, "block_rows", 128)
    monkeypatch.setattr(ScreenedIndex, "block_rows", 250)
    if screened:
        monkeypatch.setattr(greedy, "_SCREENED_ROWS", 1)
        directions = np.linalg.qr(np.random.default_rng(1).standard_normal((24, 12)))[0]
        monkeypatch.setattr(sketches, "fit", lambda sample, threshold: Sketcher(directions))
    vectors, low, high = clustered(700, 24), 0.7, 0.9
    groups = np.random.default_rng(2).integers(0, n_groups, 700)
    kept, removed = [], {}
    for i in range(700):
        scores = pair_scores(np.repeat(vectors[i : i + 1], len(kept), 0), vectors[kept]) if kept else np.zeros(0)
        reach = scores >= np.where(groups[kept] == groups[i], low, high) if kept else scores > 0
        if reach.any():
            best = int(np.where(reach, scores, -1).argmax())
            removed[i] = (kept[best], scores[best])
        else:
            kept.append(i)
    agreeing = functools.partial(answers.Agreeing, vectors, groups, low, high)
    for result in on_ranks(
        size,
        lambda ranks: remove_near_duplicates(
            vectors if ranks.is_first else None, np.arange(700), 24, high, ranks, agreeing=agreeing
        ),
    ):
        assert result.kept_rows.tolist() == kept
        assert {d.row: (d.kept_row, d.score) for d in result.duplicates} == removed


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("can_map", [True, False])
@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_any_number_of_ranks_decides_the_same(size, can_map, screened, threshold, tmp_path, monkeypatch):
    monkeypatch.setattr(greedy, "_PART_ROWS", 50)
    monkeypatch.setattr(greedy, "_MOST_PAIRS", 30)  # so that blocks must become smaller
    monkeypatch.setattr(greedy._FullIndex, "block_rows", 128)
    monkeypatch.setattr(ScreenedIndex, "block_rows", 250)
    if screened:
        monkeypatch.setattr(greedy, "_SCREENED_ROWS", 1)
        directions = np.linalg.qr(np.random.default_rng(1).standard_normal((24, 12)))[0]
        monkeypatch.setattr(sketches, "fit", lambda sample, threshold: Sketcher(directions))
    vectors, rows = clustered(700, 24), np.delete(np.arange(700), [5, 300])
    np.save(tmp_path / "vectors.npy", vectors)
    given = np.load(tmp_path / "vectors.npy", mmap_mode="r") if can_map else vectors

    def run(ranks: Ranks) -> DedupResult:
        return remove_near_duplicates(given if ranks.is_first else None, rows, 24, threshold, ranks)

    kept, removed = one_by_one(vectors[rows], threshold)
    for result in on_ranks(size, run):
        assert result.kept_rows.tolist() == rows[kept].tolist()
        assert {d.row: (d.kept_row, d.score) for d in result.duplicates} == {
            rows[row]: (rows[best], score) for row, (best, score) in removed.items()
        }


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("can_map", [True, False])
def test_a_last_block_may_have_fewer_rows_than_there_are_ranks(size, can_map, tmp_path, monkeypatch):
    monkeypatch.setattr(ScreenedIndex, "block_rows", 250)
    monkeypatch.setattr(greedy, "_SCREENED_ROWS", 1)
    directions = np.linalg.qr(np.random.default_rng(1).standard_normal((24, 12)))[0]
    monkeypatch.setattr(sketches, "fit", lambda sample, threshold: Sketcher(directions))
    vectors = clustered(251, 24)
    np.save(tmp_path / "vectors.npy", vectors)
    given = np.load(tmp_path / "vectors.npy", mmap_mode="r") if can_map else vectors
    kept, _ = one_by_one(vectors, 0.8)
    for result in on_ranks(
        size,
        lambda ranks: remove_near_duplicates(given if ranks.is_first else None, np.arange(251), 24, 0.8, ranks),
    ):
        assert result.kept_rows.tolist() == kept


def test_a_block_of_nothing_but_copies_is_decided_within_bounds(monkeypatch):
    monkeypatch.setattr(greedy, "_MOST_PAIRS", 40_000)
    monkeypatch.setattr(greedy, "_PART_ROWS", 50)
    monkeypatch.setattr(greedy._FullIndex, "block_rows", 1000)
    joined, most = greedy.Pairs.joined, []
    monkeypatch.setattr(greedy.Pairs, "joined", lambda parts: most.append(len(joined(parts)[0])) or joined(parts))
    vectors = np.repeat(clustered(100, 8)[:1], 1000, axis=0)
    result = clean(vectors, 0.9)
    assert result.kept_rows.tolist() == [0]
    assert {(d.kept_row, d.score) for d in result.duplicates} == {(0, pair_scores(vectors[:1], vectors[:1])[0])}
    assert 40_000 < max(most) < 1000 * 999 / 4  # it did not look for all
    assert most[-1] <= 40_000


def test_a_threshold_that_some_pair_meets_exactly():
    vectors = clustered(400, 24, seed=3)
    scores = pair_scores(vectors[:1].repeat(399, 0), vectors[1:])
    for threshold in (scores.max(), np.nextafter(scores.max(), 2)):
        assert clean(vectors, threshold).kept_rows.tolist() == one_by_one(vectors, threshold)[0]


def test_the_guarantee_both_ways():
    vectors = clustered(2500, 24, seed=1)
    result = clean(vectors, 0.8)
    kept = vectors[result.kept_rows]
    products = kept.astype(np.float64) @ kept.T.astype(np.float64)
    assert np.tril(products, -1).max() < 0.8
    assert all(d.score >= 0.8 and d.kept_row in set(result.kept_rows) for d in result.duplicates)
    assert len(result.kept_rows) + len(result.duplicates) == 2500


def test_only_the_given_rows_take_part():
    vectors = clustered(300, 24)
    rows = np.arange(1, 300, 2)
    result = clean(vectors, 0.8, rows)
    kept, removed = one_by_one(vectors[rows], 0.8)
    assert result.kept_rows.tolist() == rows[kept].tolist()
    assert [d.row for d in result.duplicates] == rows[list(removed)].tolist()


def test_duplicates_are_a_sequence_like_a_list_of_them():
    columns = np.array([3, 5, 9]), np.array([0, 0, 4]), np.array([0.97, 1.0, 0.99])
    found, listed = Duplicates(*columns), [Duplicate(3, 0, 0.97), Duplicate(5, 0, 1.0), Duplicate(9, 4, 0.99)]
    assert found == listed == list(found) and found == Duplicates(*columns) and len(found) == 3
    assert found[-1] == listed[-1] and found[1:] == listed[1:] and found != listed[:2]
    assert type(found[0].row) is int and type(found[0].score) is float
