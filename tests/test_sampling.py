"""What each strategy draws, what fills up short rows, and how negatives are read."""

from dataclasses import replace

import numpy as np
import pytest
from test_negatives import by_the_book, criteria_of, make_problem, mine

from utils.files.ragged import Ragged
from utils.mining import sampling
from utils.mining.margins import Background
from utils.mining.problem import Problem
from utils.mining.rules import Rules
from utils.mining.sampling import Negative, Negatives


def test_strategies_differ_in_how_near_their_negatives_are():
    problem = make_problem(n_queries=200)

    def mean_score(parts, **options):
        result, _, _ = mine(problem, Rules(parts=parts, window=(0, 50), **options))
        return np.mean([negative.score for row in result.negatives for negative in row])

    top, drawn = mean_score((("top", 8),)), mean_score((("random", 8),))
    easy, easiest = mean_score((("easy", 8),), temperature=2.0), mean_score((("easy", 8),), temperature=0.2)
    assert top > drawn > easy > easiest
    assert top > mean_score((("top", 4), ("easy", 4))) > easiest


def test_easy_draws_by_softmax_of_falling_similarity():
    rules, scores = Rules(parts=(("easy", 1),), temperature=0.5), np.array([0.9, 0.5, 0.1])
    criteria = replace(criteria_of(make_problem(), rules), background=Background(0.0, 0.0, 1.0))
    counts = np.zeros(3)
    for row in range(4000):
        copies, distances = sampling._Copies(criteria), sampling._Distances(criteria)
        picked, _ = sampling._draw(row, np.array([1, 2, 3]), scores, criteria, copies, distances)
        counts[picked] += 1
    expected = np.exp(-scores / 0.5)
    np.testing.assert_allclose(counts / 4000, expected / expected.sum(), atol=0.03)


def test_easy_can_be_measured_from_the_nearest_positive():
    """Against the softmax spelt out, of falling cosines with the nearer of two positives."""
    problem = make_problem()
    rules = Rules(parts=(("easy", 1),), temperature=0.5, easy_from="positive")
    criteria, rows, n = criteria_of(problem, rules), np.array([101, 120, 140, 149]), 4000
    query = int(np.flatnonzero(problem.positives.sizes() > 1)[0])
    asking = np.full(n, query)
    criteria = replace(criteria, problem=replace(problem, query_of_row=asking), background=Background(0.3, 0.1, 0.2))
    copies, distances, counts = sampling._Copies(criteria), sampling._Distances(criteria), np.zeros(len(rows))
    for row in range(n):
        picked, _ = sampling._draw(row, rows, np.zeros(len(rows)), criteria, copies, distances)
        counts[picked] += 1
    vectors = problem.passage_vectors
    nearest = np.array([max(float(vectors[p] @ vectors[row]) for p in problem.positives[query]) for row in rows])
    expected = np.exp(-(nearest - 0.1) / 0.9 / 0.5)
    np.testing.assert_allclose(counts / n, expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(problem.nearest_positive(query, rows), nearest, atol=1e-6)


@pytest.mark.parametrize("parts", [(("top", 6),), (("top", 3), ("random", 2), ("easy", 1))])
def test_own_negatives_come_first_and_the_rest_is_mined(parts):
    """As without them, but that they and their equals cannot be drawn, and that near-copies of them are not."""
    rng, plain = np.random.default_rng(0), make_problem()
    n = len(plain.query_of_row)
    kept = [rng.choice(np.arange(100, 150), size, replace=False).tolist() for size in rng.integers(0, 9, n)]
    repeats = [sorted({*own, *(passage + 1 for passage in own)}) for own in kept]
    problem = replace(plain, kept=Ragged.of(kept), repeats=Ragged.of(repeats))
    for backfill in (False, True):
        rules = Rules(parts=parts, negative_similarity=0.9, backfill=backfill, relative_margin=0.4)
        result, _, background = mine(problem, rules)
        limit = background.passages + 0.9 * (1 - background.passages)
        for row, (own, repeated) in enumerate(zip(kept, repeats, strict=True)):
            found = result.negatives[row]
            assert [negative.row for negative in found[: len(own)]] == own
            assert [negative.rank for negative in found if negative.rank == sampling.KEPT] == [-2] * len(own)
            mined = [negative.row for negative in found[len(own) :]]
            assert not {*mined} & {*repeated} and len(found) <= max(len(own), 6)
            query = problem.query_of_row[row]
            for negative in found[: len(own)]:
                score = problem.query_vectors[query] @ problem.passage_vectors[negative.row]
                assert abs(negative.score - score) < 1e-5
            if own and not backfill and mined:
                vectors = problem.passage_vectors
                assert (vectors[mined] @ vectors[own].T).max() < limit + 1e-5
            if len(found) < 6:
                assert row in result.short_queries
    bare, _, _ = mine(plain, rules)
    for row in (row for row in range(n) if not kept[row]):
        assert result.negatives[row] == bare.negatives[row]


def test_backfill_is_marked_and_avoids_presumed_positives():
    problem = make_problem()
    result, screened, _ = mine(problem, Rules(relative_margin=0.9, parts=(("top", 20),), backfill=True))
    assert len(result.short_queries)
    for row in result.short_queries:
        marked = [negative.row for negative in result.negatives[row] if negative.rank == -1]
        assert not set(marked) & set(screened.presumed[problem.query_of_row[row]].tolist())
    assert min(negative.rank for row in result.negatives for negative in row) == -1


def may_be_drawn(problem: Problem, query: int, rules: Rules, background: Background) -> set[int]:
    """What backfill may give a query, passage by passage: no rule but min_score speaks against it."""
    free = replace(rules, window=(rules.window[0], problem.n_candidates), parts=(("top", problem.n_candidates),))
    free = replace(free, min_score=None, negative_similarity=None)
    alone = replace(problem, query_of_row=np.array([query]))
    return {passage for passage, *_ in by_the_book(alone, free, background, problem.n_candidates)[0][0]}


@pytest.mark.parametrize("n_passages", [200, 3000])
@pytest.mark.parametrize("seed", range(3))
def test_backfill_draws_no_likely_answers(seed, n_passages):
    problem = make_problem(n_queries=12, n_passages=n_passages, seed=seed)
    problem = replace(problem, query_of_row=np.array([0, 1, 2, 2]))
    rules = Rules((12, 20), (("top", 25),), max_score=0.5, min_score=0.99, positive_similarity=0.7, backfill=True)
    result, _, background = mine(problem, rules, depth=40)
    for row, chosen in enumerate(result.negatives):
        query = int(problem.query_of_row[row])
        allowed = may_be_drawn(problem, query, rules, background)
        drawn = {negative.row for negative in chosen}
        assert len(drawn) == len(chosen) == 25 <= len(allowed) < n_passages - 12
        assert drawn <= allowed and all(negative.rank == -1 for negative in chosen)
    assert result.negatives[2] != result.negatives[3]  # each row has draws of its own


def test_backfill_takes_what_there_is():
    problem = replace(make_problem(n_queries=4, n_passages=120), query_of_row=np.arange(4))
    rules = Rules(window=(5, 6), relative_margin=0.95, min_score=2.0, parts=(("top", 25),), backfill=True)
    result, _, background = mine(problem, rules)
    sizes = set()
    for query in range(4):
        allowed = may_be_drawn(problem, query, rules, background)
        assert {negative.row for negative in result.negatives[query]} <= allowed
        assert len(result.negatives[query]) == min(25, len(allowed))
        sizes.add(len(allowed))
    assert min(sizes) < 25 < max(sizes)


def test_negatives_are_read_like_lists():
    columns = np.array([5, 3, 9]), np.array([0.5, 0.25, 0.75]), np.array([0, 2, -1])
    found = Negatives(Ragged(np.array([0, 2, 2, 3]), columns[0]), *columns[1:])
    lists = [[Negative(5, 0.5, 0), Negative(3, 0.25, 2)], [], [Negative(9, 0.75, -1)]]
    assert found == lists and found != lists[:2] and list(found) == lists and found.rows.sizes().tolist() == [2, 0, 1]
    assert found[-1] == lists[-1] and found[1:] == lists[1:] and type(found[0][0].row) is int
    with pytest.raises(IndexError):
        found[3]
