"""Intervals and tests against textbook values, full enumeration and plain loops."""

import itertools

import numpy as np
import pytest

from utils.evaluation import intervals


def test_resampled_means_are_means_of_draws():
    values = np.random.default_rng(0).random((40, 3))
    means = intervals.resampled_means(values, 4000, seed=1)
    np.testing.assert_allclose(means.mean(axis=0), values.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(means.std(axis=0), values.std(axis=0) / 40**0.5, rtol=0.05)


def test_interval_is_students_for_normal_values():
    values = np.random.default_rng(0).standard_normal((15, 1))
    low, high = intervals.bootstrap_interval(values, 0.95, 20_000)
    # 2.145 is Student's 97.5% point with 14 degrees of freedom.
    reach = 2.145 * values.std(ddof=1) / 15**0.5
    assert high[0] - low[0] == pytest.approx(2 * reach, rel=0.08)
    assert low[0] < values.mean() < high[0]


def test_interval_of_one_column_does_not_depend_on_the_others():
    values = np.random.default_rng(0).random((60, 3))
    together = intervals.bootstrap_interval(values, resamples=300)
    alone = intervals.bootstrap_interval(values[:, 1:2], resamples=300)
    np.testing.assert_allclose([end[1] for end in together], [end[0] for end in alone], rtol=1e-12)


def test_blocks_do_not_change_the_sums(monkeypatch):
    values = np.random.default_rng(0).random((50, 2)) - 0.45
    whole = intervals.randomization_test(values, 999)
    monkeypatch.setattr(intervals, "_BLOCK", 50 * 64)
    np.testing.assert_allclose(intervals.randomization_test(values, 999), whole, atol=0.03)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_values_give_a_point(value):
    low, high = intervals.bootstrap_interval(np.full((9, 1), value))
    assert low[0] == high[0] == value


def test_one_query_gives_a_point():
    low, high = intervals.bootstrap_interval(np.array([[0.25]]))
    assert low[0] == high[0] == 0.25


def test_wilson_by_hand():
    # 8 of 10 at 95%: the textbook's 0.490 to 0.943.
    low, high = intervals.wilson_interval(np.array([0.8]), 10)
    assert (low[0], high[0]) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))


def test_finding_everything_is_not_certainty():
    low, high = intervals.metric_interval(np.ones((30, 1)))
    assert low[0] == pytest.approx(30 / (30 + 1.96**2), abs=1e-4) and high[0] == 1
    low, high = intervals.metric_interval(np.zeros((30, 1)))
    assert low[0] == 0 and high[0] == pytest.approx(1.96**2 / (30 + 1.96**2), abs=1e-4)


def test_values_in_between_are_resampled():
    values = np.random.default_rng(0).random((30, 1))
    assert intervals.metric_interval(values) == intervals.bootstrap_interval(values)


def test_few_queries_are_enumerated():
    differences = np.array([0.3, -0.1, 0.2, 0.0, 0.5, 0.1])
    observed = abs(differences.sum())
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([total >= observed - 1e-12 for total in sums])
    assert intervals.randomization_test(differences[:, None], 64)[0] == expected


def test_random_patterns_come_close_to_enumeration():
    differences = np.random.default_rng(3).standard_normal((12, 4)) + 0.4
    exact = intervals.randomization_test(differences, 4096)
    drawn = intervals.randomization_test(differences, 4095, seed=5)
    np.testing.assert_allclose(drawn, exact, atol=0.03)


def test_no_difference_is_no_evidence():
    assert intervals.randomization_test(np.zeros((500, 1)))[0] == 1.0


def test_a_clear_difference_is_never_zero_probability():
    assert intervals.randomization_test(np.full((500, 1), 0.1), 999)[0] == 1 / 1000


def test_seeds():
    values = np.random.default_rng(0).random((50, 1))
    first, again, other = (intervals.bootstrap_interval(values, seed=seed)[0][0] for seed in (0, 0, 1))
    assert first == again != other
