"""Metrics against values worked out by hand, and against a loop that follows trec_eval's definitions word by word."""

import math

import numpy as np
import pytest

from utils.evaluation import metrics
from utils.evaluation.metrics import FORMULAE, Relevance

NAMES = [f"{name}@{k}" for name in FORMULAE for k in (1, 3, 5, 10)]


def relevance_of(rankings: list[list[int]], judged: list[list[int]], deepest: int) -> Relevance:
    """From the grades in ranked order, and from the grades of all judged passages."""
    width = max(map(len, rankings))
    grades = np.zeros((len(rankings), width))
    ideal = np.zeros((len(rankings), deepest))
    for i, (ranking, all_grades) in enumerate(zip(rankings, judged, strict=True)):
        grades[i, : len(ranking)] = ranking
        best = sorted((g for g in all_grades if g > 0), reverse=True)[:deepest]
        ideal[i, : len(best)] = best
    return Relevance(grades, ideal, np.array([sum(g >= 1 for g in grades) for grades in judged]))


def slowly(ranking: list[int], judged: list[int], name: str) -> float:
    """One query's metric, one rank at a time."""
    metric, k = metrics.split_name(name)
    found = 0
    precisions, first, dcg = [], 0.0, 0.0
    for rank, grade in enumerate(ranking[:k], 1):
        if grade >= 1:
            found += 1
            precisions.append(found / rank)
            first = first or 1 / rank
            dcg += grade / math.log2(rank + 1)
    n_relevant = sum(grade >= 1 for grade in judged)
    best = sorted((grade for grade in judged if grade >= 1), reverse=True)[:k]
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, 1))
    return {
        "hit_rate": float(found > 0),
        "mrr": first,
        "ndcg": dcg / ideal if ideal else 0.0,
        "recall": found / n_relevant if n_relevant else 0.0,
        "precision": found / k,
        "map": sum(precisions) / n_relevant if n_relevant else 0.0,
    }[metric]


def test_by_hand():
    # Ranks 2 and 3 hold grades 1 and 3; the judged passages have grades 3, 2, 1 and 0.
    relevance = relevance_of([[0, 1, 3, 0]], [[3, 2, 1, 0]], 3)
    values = metrics.compute(relevance, ["hit_rate@1", "hit_rate@3", "mrr@3", "precision@3", "recall@3", "map@3"])
    assert values == pytest.approx(
        {"hit_rate@1": 0, "hit_rate@3": 1, "mrr@3": 1 / 2, "precision@3": 2 / 3, "recall@3": 2 / 3, "map@3": 7 / 18}
    )
    dcg = 1 / math.log2(3) + 3 / 2
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert metrics.compute(relevance, ["ndcg@3"])["ndcg@3"] == pytest.approx(dcg / ideal)


def test_the_ideal_counts_what_was_not_found():
    relevance = relevance_of([[1, 0]], [[1, 1, 1]], 2)
    assert metrics.compute(relevance, ["ndcg@2"])["ndcg@2"] == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_a_query_that_finds_nothing_stays_in_the_denominator():
    relevance = relevance_of([[1], [0], [0]], [[1], [1], []], 10)
    assert all(
        value == pytest.approx(1 / 30 if name == "precision@10" else 1 / 3)
        for name, value in metrics.compute(relevance, [f"{name}@10" for name in FORMULAE]).items()
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_loop(seed):
    rng = np.random.default_rng(seed)
    rankings, judged = [], []
    for _ in range(200):
        grades = rng.choice([-1, 0, 0, 0, 1, 2, 3], rng.integers(0, 30)).tolist()
        unjudged = [0] * int(rng.integers(1, 20))
        judged.append(grades)
        rankings.append(rng.permutation(grades + unjudged)[: rng.integers(1, 15)].tolist())
    values = metrics.per_query(relevance_of(rankings, judged, 10), NAMES)
    for i, (ranking, grades) in enumerate(zip(rankings, judged, strict=True)):
        for column, name in enumerate(NAMES):
            assert values[i, column] == pytest.approx(slowly(ranking, grades, name), abs=1e-12), (name, i)


@pytest.mark.parametrize("n", range(1, 12))
def test_a_perfect_ranking_scores_no_more_than_1(n):
    relevance = Relevance.of_hits(np.arange(10)[None] < n, np.array([n]), 10)
    assert metrics.ndcg(relevance, 10).tolist() == [1.0]


def test_binary_hits():
    hits = np.array([[True, False], [False, False]])
    relevance = Relevance.of_hits(hits, np.array([2, 1]), 5)
    assert relevance.ideal.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert metrics.per_query(relevance, ["recall@5"]).ravel().tolist() == [0.5, 0.0]


def test_nothing_was_searched():
    relevance = Relevance(np.zeros((2, 0)), np.ones((2, 3)), np.ones(2, np.int64))
    assert not metrics.per_query(relevance, NAMES[:16]).any()
