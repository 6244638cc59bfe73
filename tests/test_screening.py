"""Screening by leading directions against full products."""

import numpy as np
import pytest
from test_dedup import clean, clustered, one_by_one

from utils.cleaning import greedy
from utils.search import sketches as screening
from utils.search.exact import ExactIndex
from utils.search.scores import largest_norm, pair_scores
from utils.search.sketches import ScreenedIndex, Sketcher, fit


def anisotropic(n, dim=48, seed=0, spread=0.5):
    """Unit vectors around one direction, as embedding models give them, some of them nearly alike."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, dim)) / np.sqrt(1 + np.arange(dim)) * spread
    vectors[:, 0] += 1
    vectors[n // 2 :: 7] = vectors[: len(vectors[n // 2 :: 7])] + 0.02 * rng.standard_normal((1, dim))
    vectors[-5:] = vectors[:5]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def leading(vectors, k):
    """The k leading directions, float64 [d, k]."""
    return np.linalg.svd(vectors.astype(np.float64), full_matrices=False)[2][:k].T


def test_a_product_of_sketches_is_an_upper_bound():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([anisotropic(300), 30 * rng.standard_normal((50, 48)), np.zeros((1, 48))])
    vectors = vectors.astype(np.float32)
    for width in (1, 7, 47):
        sketcher = Sketcher(np.linalg.qr(rng.standard_normal((48, width)))[0])
        sketches, norms = sketcher(vectors)
        np.testing.assert_allclose(norms, np.linalg.norm(vectors.astype(np.float64), axis=1), 1e-12, 1e-29)
        slack = sketcher.slack(largest_norm(vectors) ** 2)
        exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
        assert (sketches @ sketches.T >= exact - slack).all()
        assert slack < 2e-4 * largest_norm(vectors) ** 2


@pytest.mark.parametrize("threshold", [0.75, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_cleaning_with_screening_equals_one_by_one(threshold, spread, arithmetic, monkeypatch):
    monkeypatch.setattr(greedy, "_SCREENED_ROWS", 1)
    monkeypatch.setattr(ScreenedIndex, "block_rows", 128)
    monkeypatch.setattr(greedy, "_PART_ROWS", 50)
    monkeypatch.setattr(screening, "_ROW_BLOCK", 100)
    monkeypatch.setattr(screening, "_PAIRS", 50)
    vectors = anisotropic(900, spread=spread)
    for directions in (leading(vectors, 12), np.linalg.qr(np.random.default_rng(1).standard_normal((48, 12)))[0]):
        sketcher = Sketcher(directions)
        monkeypatch.setattr(screening, "fit", lambda sample, threshold, own=sketcher: own)
        result = clean(vectors, threshold)
        kept, removed = one_by_one(vectors, threshold)
        assert result.kept_rows.tolist() == kept
        assert {d.row: (d.kept_row, d.score) for d in result.duplicates} == removed


@pytest.mark.parametrize("scale", [1e-33, 1e-21, 1e-15, 1e15])
def test_vectors_of_any_length_are_cleaned_alike(scale, arithmetic, monkeypatch):
    monkeypatch.setattr(greedy, "_SCREENED_ROWS", 1)
    vectors = anisotropic(300)
    sketcher = Sketcher(leading(vectors, 12))
    monkeypatch.setattr(screening, "fit", lambda sample, threshold: sketcher)
    vectors = (vectors * scale).astype(np.float32)
    threshold = float(np.quantile(pair_scores(vectors[:100], vectors[100:200]), 0.97))
    assert clean(vectors, threshold).kept_rows.tolist() == one_by_one(vectors, threshold)[0]


def prepared(index, vectors):
    return index.prepare(vectors, np.arange(len(vectors)), lambda *rows: rows)


def test_a_rank_that_holds_its_part_finds_what_one_with_all_vectors_finds(arithmetic):
    vectors = anisotropic(1200)
    numbers = np.arange(0, 1000, 2)
    sketcher = Sketcher(leading(vectors, 12))
    found = []
    for source in (vectors, None):
        index = ScreenedIndex(sketcher, 48, len(numbers), source)
        for start in range(0, len(numbers), 200):
            rows = numbers[start : start + 200]
            index.add(prepared(index, vectors[rows]), np.arange(len(rows)), rows)
        found.append(index.search(prepared(index, vectors[1000:]), np.arange(200), 0.97))
    full = ExactIndex(48, vectors=vectors[numbers]).search(vectors[1000:], 1, 0.97)
    for own in found:
        np.testing.assert_array_equal(own.scores, full.scores)
        np.testing.assert_array_equal(own.rows, np.where(full.rows < 0, -1, numbers[full.rows]))
    assert (full.rows >= 0).any() and (full.rows < 0).any()


def test_directions_are_few_where_they_tell_vectors_apart_and_none_where_they_do_not():
    assert fit(anisotropic(2000, dim=384), 0.97)._basis.shape[1] < 100
    assert fit(clustered(2000, 24), 0.1) is None
    assert fit(anisotropic(10), 0.97) is None
