"""The margin that is measured, against what is counted one by one, and what it promises."""

from dataclasses import replace

import numpy as np
import pytest

from utils.files.ragged import Ragged
from utils.mining import margins
from utils.mining.problem import Problem
from utils.mining.tiers import Rankings
from utils.search.exact import ExactIndex
from utils.search.scores import Neighbors


def neighbors_of(problem: Problem, depth: int) -> Neighbors:
    return ExactIndex(problem.passage_vectors.shape[1], vectors=problem.passage_vectors).search(
        problem.query_vectors, depth
    )


def rankings_of(problem: Problem, depth: int) -> Rankings:
    return Rankings.of(neighbors_of(problem, depth))


def test_a_margin_never_loosens_when_the_positive_is_below_the_background():
    lowest = np.array([0.5, -0.5, 0.1])
    limits = margins.score_limit(lowest, 0.2, margins.Background(0.2, 0.3, 0.1))
    assert (limits <= lowest).all()
    assert limits[0] == pytest.approx(0.2 + 0.8 * 0.3)
    assert (margins.score_limit(lowest, 0.0, margins.Background(0.2, 0.3, 0.1)) == lowest).all()


def answered_problem(n_answers: int, n_queries: int = 1000) -> tuple[Problem, list[set[int]]]:
    """Queries with some answers, one of which is labelled by chance, and passages that come a little less near."""
    rng = np.random.default_rng(n_answers)

    def unit(values):
        return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)

    queries = unit(rng.standard_normal((n_queries, 64)))
    levels = ((0.8, 0.1, n_answers), (0.5, 0.05, 20))
    near = np.concatenate([rng.normal(mean, spread, (n_queries, n)) for mean, spread, n in levels], axis=1).clip(
        0, 0.99
    )
    across = unit(rng.standard_normal((*near.shape, 64)))
    passages = unit(near[..., None] * queries[:, None] + np.sqrt(1 - near**2)[..., None] * across).reshape(-1, 64)
    answers = [set(range(first, first + n_answers)) for first in range(0, len(passages), near.shape[1])]
    labelled = Ragged.of([[int(rng.choice(sorted(own)))] for own in answers])
    return Problem(np.arange(n_queries), queries, passages, labelled, labelled, len(passages)), answers


def test_a_measured_margin_is_as_wide_as_unlabelled_answers_make_it():
    found = []
    for n_answers in (1, 2, 5):
        problem, answers = answered_problem(n_answers)
        neighbors, scores = neighbors_of(problem, 25), problem.positive_scores()
        lowest = problem.positives.lowest(scores)
        background, _ = margins.measure_background(problem, scores)
        margin, about = margins.measure_margin(problem, Rankings.of(neighbors), lowest, 20, background)
        found.append(margin)
        wrong, below, above = counted_one_by_one(problem, neighbors, lowest, background, answers, len(about))
        assert [counted["below"] for counted in about] == below
        assert [counted["above"] for counted in about] == above
        answers_at_most = [counted["answers_at_most"] for counted in about]
        assert all(own <= most for own, most in zip(wrong, answers_at_most, strict=True))
        clear = [2 * most <= n for most, n in zip(answers_at_most, below, strict=True)]
        steps = round(margin / margins.MARGIN_STEP)
        assert all(clear[steps:]) and (steps == 1 or not clear[steps - 1])
    assert found[0] <= found[1] < found[2]


def counted_one_by_one(problem, neighbors, lowest, background, answers, n_bands) -> list[list[int]]:
    """Unlabelled answers below the labelled one, all candidates below it, and all above, at each distance."""
    wrong, below, above = [[0] * n_bands for _ in range(3)]
    for query, own in enumerate(answers):
        candidates = zip(neighbors.rows[query].tolist(), neighbors.scores[query].tolist(), strict=True)
        for passage, score in [pair for pair in candidates if pair[0] not in problem.forbidden[query]][:20]:
            distance = (score - lowest[query]) / (max(score, lowest[query]) - background.pairs)
            band = int(abs(distance) // margins.MARGIN_STEP)
            if band < n_bands:
                (above if distance > 0 else below)[band] += 1
                wrong[band] += distance < 0 and passage in own
    return [wrong, below, above]


def measured(problem: Problem, n_neighbors: int = 25, depth: int = 20) -> float:
    scores = problem.positive_scores()
    lowest, (background, _) = problem.positives.lowest(scores), margins.measure_background(problem, scores)
    return margins.measure_margin(problem, rankings_of(problem, n_neighbors), lowest, depth, background)[0]


def test_a_margin_that_few_queries_can_tell_of_is_the_widest():
    problem, _ = answered_problem(1)
    few = replace(problem, query_of_row=np.repeat(np.arange(99), 20))
    assert measured(problem) < measured(few) == margins.WIDEST_MARGIN


def test_rows_of_the_same_query_count_once_for_a_margin():
    problem, _ = answered_problem(2)
    scores = problem.positive_scores()
    lowest, (background, _) = problem.positives.lowest(scores), margins.measure_background(problem, scores)
    counts = [
        margins.measure_margin(replace(problem, query_of_row=rows), rankings_of(problem, 25), lowest, 20, background)
        for rows in (np.arange(1000), np.repeat(np.arange(1000), 3)[::-1])
    ]
    assert counts[0] == counts[1]


def test_looking_no_further_than_the_positive_does_not_widen_the_margin():
    problem, _ = answered_problem(1)
    assert measured(problem, 8, 3) == measured(problem, 4, 1) <= 0.1
