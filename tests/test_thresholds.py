"""Thresholds: the one that is found for a size against brute force, and those that are given or measured."""

import numpy as np
import pytest
from test_dedup import clean, clustered, one_by_one

from utils import thresholds
from utils.thresholds import Unrelated, checked, measured


@pytest.mark.parametrize("target", [1, 50, 200, 399, 400, 1000])
def test_the_highest_threshold_that_leaves_so_few_is_found(target):
    vectors = clustered(400, 24, seed=5)
    result = thresholds.find(lambda t: clean(vectors, t), target)
    assert len(result.kept_rows) <= target
    if result.threshold < 1.0:
        assert len(one_by_one(vectors, result.threshold + thresholds.STEP)[0]) > target


def test_unrelated_queries_are_sampled():
    vectors = np.random.default_rng(2).standard_normal((3000, 16)) + 1.0
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found, all_scores = Unrelated.of(vectors), (vectors @ vectors.T)[np.tril_indices(3000, -1)]
    assert found.mean == pytest.approx(all_scores.mean(), abs=0.02)
    assert found.high == pytest.approx(np.percentile(all_scores, 99), abs=0.03)
    assert found == Unrelated.of(vectors)
    for n in (0, 1):
        assert Unrelated.of(vectors[:n]) == Unrelated(n, -1.0, -1.0) and measured(Unrelated.of(vectors[:n])) == 0.75


def test_a_measured_threshold_lies_above_what_unrelated_queries_score():
    assert measured(Unrelated(1000, 0.3, 0.74)) == 0.75
    assert measured(Unrelated(1000, 0.6, 0.75)) == 0.94
    assert measured(Unrelated(1000, 0.9, 0.95)) == 0.98 and measured(Unrelated(49, 0.9, 0.95)) == 0.97


def test_a_given_threshold_stands_but_is_warned_of(caplog):
    assert checked(0.8, Unrelated(50, 0.3, 0.7)) == 0.8 and checked(0.5, Unrelated(49, 0.3, 0.7)) == 0.5
    assert not caplog.messages
    assert checked(0.7, Unrelated(50, 0.3, 0.7)) == 0.7
    assert len(caplog.messages) == 1 and "try 0.9," in caplog.messages[0]
    assert 0.999 < checked(1.0, Unrelated(50, 0.3, 0.7)) < 1  # equal vectors reach it
    caplog.clear()
    assert checked(0.9, Unrelated(50, 0.8, 0.86)) == 0.9 and checked(0.97, Unrelated(50, 0.8, 0.86)) == 0.97
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("the threshold 0.9 is below 0.97, what would be")
