"""Lists are as long as their queries need, and no longer; and they come back as they were given."""

import numpy as np

from utils.files.ragged import Ragged
from utils.mining import tiers as rankings
from utils.mining.tiers import Rankings, tiers_of
from utils.search.scores import Neighbors


def test_few_queries_with_most_of_the_positives_do_not_lengthen_all_lists():
    rng = np.random.default_rng(0)
    sizes = np.where(rng.random(5000) < 0.01, rng.integers(65, 3000, 5000), rng.integers(1, 4, 5000))
    tiers = tiers_of(Ragged.cut(sizes, np.zeros(sizes.sum(), np.int64)))
    assert np.array_equal(np.sort(np.concatenate([tier.queries for tier in tiers])), np.arange(5000))
    for tier in tiers:
        assert tier.most_forbidden == sizes[tier.queries].max() and (np.diff(tier.queries) > 0).all()
        assert tier.depth(50, 10**6) == 50 + tier.most_forbidden and tier.depth(50, 60) == min(60, tier.depth(50, 99))
    entries = sum(len(tier.queries) * tier.depth(50, 10**6) for tier in tiers)
    assert entries <= 5000 * (50 + 64) + 2 * sizes.sum() and entries < 0.1 * 5000 * (50 + sizes.max())


def test_queries_with_few_forbidden_passages_share_one_length():
    tiers = tiers_of(Ragged.cut([1, 64, 3], np.zeros(68, np.int64)))
    assert [(tier.queries.tolist(), tier.most_forbidden) for tier in tiers] == [([0, 1, 2], 64)]


def test_lists_come_back_in_bounded_parts(monkeypatch):
    monkeypatch.setattr(rankings, "_CANDIDATES", 12)
    given = []
    for queries, depth in (np.array([0, 2, 3, 5, 6]), 3), (np.array([1, 4]), 20):
        rows = 100.0 * queries[:, None] + np.arange(depth)  # whole numbers, as the store keeps them
        given.append((queries, Neighbors(-rows, rows)))
    asked = np.array([6, 4, 3, 2, 1, 0, 5])
    seen = {}
    for place, (scores, rows) in Rankings(7, given).parts(asked):
        assert rows.dtype == np.int64 and (rows.size <= 12 or len(rows) == 1) and (np.diff(place) > 0).all()
        seen |= dict(zip(asked[place].tolist(), zip(scores.tolist(), rows.tolist(), strict=True), strict=True))
    assert len(seen) == 7
    for queries, neighbors in given:
        for query, scores, rows in zip(queries, *neighbors, strict=True):
            assert seen[query] == (scores.tolist(), rows.tolist())
