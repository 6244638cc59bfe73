"""The rules against a loop that spells them out, and every rule's own promise."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from utils.arguments.scripts import MARGIN_POSITIVES
from utils.files.ragged import Ragged
from utils.mining import rules as negatives
from utils.mining.margins import Background, measure_background
from utils.mining.problem import Problem
from utils.mining.rules import Criteria, Rules, screen
from utils.mining.sampling import choose
from utils.mining.tiers import Rankings, tiers_of
from utils.search.exact import ExactIndex
from utils.search.scores import Neighbors, pair_scores


def make_problem(n_queries=60, n_passages=200, dim=16, seed=0) -> Problem:
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((12, dim))

    def vectors(n):
        found = topics[rng.integers(0, 12, n)] + 0.6 * rng.standard_normal((n, dim))
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    queries, passages = vectors(n_queries), vectors(n_passages)
    passages[-20:] = passages[:20]  # copies of positives that no label mentions
    positives = [sorted({int(p) for p in rng.integers(0, 100, rng.integers(1, 4))}) for _ in range(n_queries)]
    forbidden = [[*own, 150 + i % 7] for i, own in enumerate(positives)]
    rows = np.concatenate([np.arange(n_queries), [3, 3, 7]])
    return Problem(rows, queries, passages, Ragged.of(positives), Ragged.of(forbidden), n_passages)


def neighbors_of(problem: Problem, depth: int) -> Neighbors:
    return ExactIndex(problem.passage_vectors.shape[1], vectors=problem.passage_vectors).search(
        problem.query_vectors, depth
    )


def criteria_of(problem: Problem, rules: Rules) -> Criteria:
    positives = problem.positive_scores()
    return Criteria(problem, positives, rules, measure_background(problem, positives)[0])


def mine(problem: Problem, rules: Rules, depth: int = 60, baseline: float | None = None):
    criteria = criteria_of(problem, rules)
    if baseline is not None:
        criteria = replace(criteria, background=Background(baseline, baseline, criteria.background.spread))
    screened = screen(criteria, Rankings.of(neighbors_of(problem, depth)))
    return choose(criteria, screened), screened, criteria.background


def by_the_book(problem: Problem, rules: Rules, background: Background, depth: int) -> tuple[list, dict]:
    """One row, one candidate, one test at a time; strategy top only."""
    drops = dict.fromkeys(negatives.REASONS, 0)
    neighbors = neighbors_of(problem, depth)

    def cosine(a, b):
        return pair_scores(problem.passage_vectors[[a]], problem.passage_vectors[[b]])[0]

    def similar(x):
        return background.passages + x * (1 - background.passages)

    result = []
    for query in problem.query_of_row:
        own = problem.positives[query]
        scores = [pair_scores(problem.query_vectors[[query]], problem.passage_vectors[[p]])[0] for p in own]
        start = {"lowest": min, "median": np.median, "highest": max}[rules.margin_positive](scores)
        chosen, rank = [], -1
        for passage, score in zip(neighbors.rows[query], neighbors.scores[query], strict=True):
            if passage in problem.forbidden[query]:
                drops["forbidden"] += rank + 1 < rules.window[1]
                continue
            rank += 1
            if not rules.window[0] <= rank < rules.window[1]:
                continue
            limit = start - (rules.relative_margin or 0) * abs(start - background.pairs)
            if rules.relative_margin is not None and score > limit:
                drops["relative_margin"] += 1
            elif rules.absolute_margin is not None and score > start - rules.absolute_margin:
                drops["absolute_margin"] += 1
            elif rules.max_score is not None and score > rules.max_score:
                drops["max_score"] += 1
            elif rules.min_score is not None and score < rules.min_score:
                drops["min_score"] += 1
            elif rules.positive_similarity is not None and any(
                cosine(p, passage) >= similar(rules.positive_similarity) for p in own
            ):
                drops["positive_similarity"] += 1
            elif len(chosen) == rules.wanted:
                continue
            elif rules.negative_similarity is not None and any(
                cosine(n[0], passage) >= similar(rules.negative_similarity) for n in chosen
            ):
                drops["negative_similarity"] += 1
            else:
                chosen.append((int(passage), float(score), rank))
        result.append(chosen)
    return result, drops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative_margin": 0.2, "positive_similarity": 0.7, "negative_similarity": 0.9},
        {"relative_margin": 0.0, "window": (5, 30), "negative_similarity": 0.6},
        {"absolute_margin": 0.1, "max_score": 0.7, "min_score": 0.0},
        {"relative_margin": 0.3, "margin_positive": "median", "parts": (("top", 40),)},
        {"relative_margin": 0.3, "margin_positive": "highest", "parts": (("top", 40),)},
        {"absolute_margin": 0.2, "margin_positive": "median", "parts": (("top", 40),)},
        {"absolute_margin": 0.2, "margin_positive": "highest", "parts": (("top", 40),)},
        {"positive_similarity": 0.5, "negative_similarity": 0.5, "parts": (("top", 30),)},
    ],
)
def test_equals_the_rules_spelt_out(options, monkeypatch):
    monkeypatch.setattr(negatives, "_BLOCK_ROWS", 17)
    problem, rules = make_problem(), Rules(**options)
    result, screened, background = mine(problem, rules)
    expected, drops = by_the_book(problem, rules, background, 60)
    assert [[tuple(n) for n in row] for row in result.negatives] == expected
    assert result.drops_by_reason == drops
    left = screened.n_window - sum(drops.values()) + drops["forbidden"]
    assert sum(map(len, expected)) <= left
    assert result.short_queries.tolist() == [i for i, row in enumerate(expected) if len(row) < rules.wanted]


def test_what_is_forbidden_is_counted_to_the_end_of_the_window():
    problem, rules = make_problem(), Rules(window=(2, 20))
    shallow, deep = (mine(problem, rules, depth)[0] for depth in (30, 200))
    assert shallow.drops_by_reason == deep.drops_by_reason and shallow.negatives == deep.negatives
    _, drops = by_the_book(problem, rules, Background(0.0, 0.0, 1.0), 30)
    assert 0 < drops["forbidden"] == deep.drops_by_reason["forbidden"] < problem.forbidden.sizes().sum()


def often_asked(n_rows: int, n_passages: int = 500) -> tuple[Problem, Rankings]:
    """A problem whose query 5 is asked by ``n_rows`` rows, has 120 positives, and a longer list than the others."""
    problem = make_problem(n_passages=n_passages)
    positives = [problem.positives[query].tolist() for query in range(60)]
    positives[5] = list(range(0, 480, 4))
    groups = Ragged.of(positives)
    rows = np.concatenate([np.arange(60), np.full(n_rows, 5)])
    problem = replace(problem, query_of_row=rows, positives=groups, forbidden=groups)
    lists = [(tier.queries, tier.depth(30, n_passages)) for tier in tiers_of(groups)]
    assert [depth for _, depth in lists] == [33, 150]
    found = neighbors_of(problem, 150)
    lists = [(own, Neighbors(found.scores[own, :depth], found.rows[own, :depth])) for own, depth in lists]
    return problem, Rankings(60, lists)


@pytest.mark.parametrize("pairs", [7, 1 << 18])
def test_a_query_that_many_rows_ask_gets_what_the_rules_say(monkeypatch, pairs):
    monkeypatch.setattr(negatives, "_BLOCK_ROWS", 17)
    monkeypatch.setattr(negatives, "_PAIRS", pairs)
    problem, rankings = often_asked(6)
    rules = Rules(window=(0, 30), max_score=0.9, positive_similarity=0.95, negative_similarity=0.9)
    criteria = criteria_of(problem, rules)
    result = choose(criteria, screen(criteria, rankings))
    expected, drops = by_the_book(problem, rules, criteria.background, 150)
    assert [[tuple(n) for n in row] for row in result.negatives] == expected
    assert drops["positive_similarity"] > 0 and drops["forbidden"] > 0
    assert result.drops_by_reason == drops


def test_memory_does_not_grow_with_how_often_a_query_is_asked():
    problem, rankings = often_asked(1000)
    criteria = criteria_of(problem, Rules(window=(0, 30), positive_similarity=0.8))
    screen(criteria, rankings)  # what is compiled or imported once
    tracemalloc.start()
    screen(criteria, rankings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # a comparison for each row would make 1,000 x 30 x 120 pairs, of 16 bytes and more


def random_rules(seed: int) -> Rules:
    rng = np.random.default_rng(seed)

    def maybe(low, high):
        return float(rng.uniform(low, high)) if rng.random() < 0.6 else None

    start = int(rng.integers(0, 10))
    parts = [(str(rng.choice(["top", "random", "easy"])), int(rng.integers(1, 12))) for _ in range(rng.integers(1, 4))]
    return Rules(
        window=(start, start + int(rng.integers(1, 60))),
        parts=tuple(parts),
        relative_margin=maybe(0, 1),
        absolute_margin=maybe(0, 0.3),
        max_score=maybe(0.5, 1),
        min_score=maybe(-1, 0.2),
        positive_similarity=maybe(0.3, 1),
        negative_similarity=maybe(0.3, 1),
        temperature=float(rng.uniform(0.01, 2)),
        seed=seed,
        backfill=bool(rng.random() < 0.6),
        margin_positive=str(rng.choice(MARGIN_POSITIVES)),
    )


@pytest.mark.parametrize("margin", ["relative_margin", "absolute_margin"])
def test_a_higher_positive_drops_fewer_and_a_single_one_is_all_three(margin):
    problem = make_problem()
    single = replace(
        problem, positives=Ragged.of([own[:1].tolist() for own in map(problem.positives.__getitem__, range(60))])
    )
    several, alone = (
        [mine(given, Rules((0, 150), margin_positive=which, **{margin: 0.2}), 200)[0] for which in MARGIN_POSITIVES]
        for given in (problem, single)
    )
    dropped = [result.drops_by_reason[margin] for result in several]
    assert dropped[0] > dropped[1] > dropped[2] > 0
    assert alone[0].drops_by_reason[margin] > 0
    for result in alone[1:]:
        assert result.negatives == alone[0].negatives and result.drops_by_reason == alone[0].drops_by_reason


def test_a_reranker_s_margin_is_measured_from_the_same_positive():
    problem = make_problem()
    _, screened, _ = mine(problem, Rules())
    rng = np.random.default_rng(8)
    logits, own = rng.standard_normal(len(screened.left.scores)), rng.standard_normal(len(problem.positives.values))
    groups = np.split(own, problem.positives.lims[1:-1])
    query = screened.left.rows.owners()
    for which, of in (("lowest", min), ("median", np.median), ("highest", max)):
        kept = np.array([logit <= of(groups[i]) - 0.5 for i, logit in zip(query, logits, strict=True)])
        found = negatives.apply_reranker(criteria_of(problem, Rules(margin_positive=which)), screened, logits, own, 0.5)
        assert found.left.rows.values.tolist() == screened.left.rows.values[kept].tolist()
        assert found.by_margin.tolist() == [bool((~kept[query == i]).any()) for i in range(60)]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_forbidden_under_any_options(seed):
    problem, rules = make_problem(seed=seed), random_rules(seed)
    result, _, _ = mine(problem, rules, depth=80, baseline=[None, 0.0][seed % 2])
    for row, chosen in enumerate(result.negatives):
        rows = [negative.row for negative in chosen]
        assert not set(rows) & set(problem.forbidden[problem.query_of_row[row]].tolist())
        assert len(set(rows)) == len(rows) <= rules.wanted
        assert all(0 <= r < problem.n_candidates for r in rows)
    again, _, _ = mine(problem, rules, depth=80, baseline=[None, 0.0][seed % 2])
    assert again.negatives == result.negatives


def test_unlabelled_copies_of_positives_are_not_taken_by_default():
    problem = make_problem()
    result, _, _ = mine(problem, Rules(relative_margin=0.2, positive_similarity=0.7))
    for row, chosen in enumerate(result.negatives):
        own = problem.positives[problem.query_of_row[row]]
        copies = {int(p) + 180 for p in own if p < 20}
        assert not copies & {negative.row for negative in chosen}


def test_a_vector_of_zeros_is_like_nothing():
    problem = make_problem()
    vectors = 3 * problem.passage_vectors
    vectors[:20] = 0
    problem = replace(problem, passage_vectors=vectors, unit=False)
    assert not problem.cosines(np.arange(20), np.arange(20, 40)).any()
    np.testing.assert_allclose(problem.cosines(np.arange(20, 40), np.arange(20, 40)), 1)
    _, about = measure_background(problem, problem.positive_scores())
    assert np.isfinite(list(about["passage_passage"].values())).all()


def test_passages_outside_the_pool_are_never_mined():
    problem = make_problem()
    problem = Problem(
        problem.query_of_row, problem.query_vectors, problem.passage_vectors, problem.positives, problem.forbidden, 40
    )
    neighbors = ExactIndex(16, vectors=problem.passage_vectors[:40]).search(problem.query_vectors, 40)
    criteria = criteria_of(problem, Rules(parts=(("top", 30),), relative_margin=0.3, backfill=True))
    result = choose(criteria, screen(criteria, Rankings.of(neighbors)))
    assert max(negative.row for row in result.negatives for negative in row) < 40


def test_vectors_of_any_length_are_compared_by_their_cosine():
    problem = make_problem()
    rng = np.random.default_rng(5)
    stretched = problem.passage_vectors * rng.uniform(0.5, 2, (200, 1)).astype(np.float32)
    rules = Rules(positive_similarity=0.5)
    scaled = Problem(
        problem.query_of_row, problem.query_vectors, stretched, problem.positives, problem.forbidden, 200, unit=False
    )
    _, plain, _ = mine(problem, rules, depth=200)
    _, other, _ = mine(scaled, rules, depth=200)
    near = [set(plain.presumed[row].tolist()) for row in range(60)]
    # The windows differ, for they go by the product; within them the same passages are near-copies.
    for row, there in enumerate(near):
        seen = there | set(plain.left.rows[row].tolist())
        assert set(other.presumed[row].tolist()) & seen <= there


def test_no_candidates_at_all():
    problem = make_problem(n_queries=3)
    nothing = Neighbors(np.full((3, 5), -np.inf), np.full((3, 5), -1))
    problem = Problem(
        np.arange(3), problem.query_vectors, problem.passage_vectors, problem.positives, problem.forbidden, 200
    )
    criteria = criteria_of(problem, Rules(positive_similarity=0.7, negative_similarity=0.9))
    result = choose(criteria, screen(criteria, Rankings.of(nothing)))
    assert result.negatives == [[], [], []] and result.short_queries.tolist() == [0, 1, 2]
