"""Thresholds: the one that is found for a size against brute force, and those that are given or measured."""

import numpy as np
import pytest
from test_dedup import clean, clustered, one_by_one

from utils.cleaning import thresholds
from utils.cleaning.thresholds import Unrelated, measured


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


def test_equal_vectors_reach_any_threshold():
    assert thresholds.reachable(0.8) == 0.8 and 0.999 < thresholds.reachable(1.0) < 1


@pytest.mark.parametrize(
    ("threshold", "unrelated", "told"),
    [
        (0.8, (50, 0.3, 0.7), None),
        (0.5, (49, 0.3, 0.7), None),
        (0.7, (50, 0.3, 0.7), "warning: the threshold 0.7 lies within what unrelated queries score"),
        (0.9, (50, 0.8, 0.86), "warning: the threshold 0.9 is below 0.97, what would be taken for this model"),
        (0.97, (50, 0.8, 0.86), None),
    ],
)
def test_a_low_threshold_is_warned_of(caplog, threshold, unrelated, told):
    thresholds.warn_if_low(threshold, Unrelated(*unrelated), "try more")
    assert len(caplog.messages) == (told is not None)
    assert told is None or (caplog.messages[0].startswith(told) and "try more" in caplog.messages[0])
