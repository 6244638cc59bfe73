"""Exact search against one-by-one float64 scoring, with ties and near-ties planted."""

import numpy as np
import pytest
from conftest import resident
from thread_ranks import on_ranks

from utils.kernels import onednn
from utils.ranks.group import Ranks
from utils.ranks.mapped import release
from utils.search import exact as search
from utils.search.exact import ExactIndex, ShardedIndex
from utils.search.scores import Neighbors, evenly, merge, pair_scores, rounding_bound
from utils.search.screens import Bfloat16Screen, Float32Screen, Shape


def brute_force(queries, corpus, k, floor=-np.inf) -> Neighbors:
    result = Neighbors(np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1))
    for i, query in enumerate(queries):
        scores = pair_scores(np.repeat(query[None], len(corpus), 0), corpus)
        order = np.lexsort((np.arange(len(corpus)), -scores))
        order = order[scores[order] >= floor][:k]
        result.scores[i, : len(order)], result.rows[i, : len(order)] = scores[order], order
    return result


def unit(rng, n, dim) -> np.ndarray:
    vectors = rng.standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("floor", [-np.inf, 0.3])
@pytest.mark.parametrize(
    ("n", "dim", "n_queries", "k"), [(9000, 8, 600, 20), (1000, 64, 100, 5), (3, 4, 5, 10), (9000, 32, 40, 300)]
)
def test_equals_brute_force_with_ties(n, dim, n_queries, k, floor, arithmetic):
    rng = np.random.default_rng(n)
    corpus = unit(rng, n, dim)
    corpus[n // 2 :] = corpus[: n - n // 2]  # every score occurs twice
    queries = corpus[rng.integers(0, n, n_queries)] + np.float32(1e-7)
    found = ExactIndex(dim, vectors=corpus).search(queries, k, floor)
    expected = brute_force(queries, corpus, k, floor)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_scores_a_few_units_apart_are_settled_in_float64(arithmetic):
    rng = np.random.default_rng(0)
    base = unit(rng, 1, 384)
    noise = rng.standard_normal((6000, 384)).astype(np.float32) * np.float32(1e-8)
    corpus = base + noise  # all within float32's rounding of one another
    found = ExactIndex(384, vectors=corpus).search(base, 50)
    expected = brute_force(base, corpus, 50)
    np.testing.assert_array_equal(found.rows, expected.rows)


def test_a_corpus_that_is_its_own_mean_is_settled_in_float64(arithmetic):
    """Nothing is left to multiply then, and only float64's own roundings tell the two sides apart."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = (rng.standard_normal((1, 384)) / 20).astype(np.float32)
        row = (onednn.to_bfloat16(row).astype(np.uint32) << 16).view(np.float32)
        query = (rng.standard_normal((1, 384)) / 20).astype(np.float32)
        floor = pair_scores(query, row)[0]
        assert ExactIndex(384, vectors=row).search(query, 1, floor).rows[0, 0] == 0
        row[0, 3] = 0
        other = row.copy()
        other[0, 3] = 1e-18
        corpus = np.concatenate([row, other])
        if len(set(pair_scores(query, corpus))) == 1:
            assert ExactIndex(384, vectors=corpus).search(query, 1).rows[0, 0] == 0


@pytest.mark.parametrize(("common", "scale"), [(3.0, 1.0), (0.0, 1e3), (0.0, 1e-18)])
def test_vectors_about_a_common_mean_and_of_any_length(common, scale, arithmetic):
    rng = np.random.default_rng(5)
    corpus = (unit(rng, 5000, 48) + np.float32(common) * unit(rng, 1, 48)) * np.float32(scale)
    corpus *= rng.uniform(0.1, 1, (len(corpus), 1)).astype(np.float32)
    queries = corpus[:70] + unit(rng, 70, 48) * np.float32(0.1 * scale)
    found, expected = ExactIndex(48, vectors=corpus).search(queries, 30), brute_force(queries, corpus, 30)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_screened_score_lies_within_its_slack(arithmetic):
    rng = np.random.default_rng(6)
    mean = unit(rng, 1, 64)
    corpus, queries = (vectors + mean for vectors in (unit(rng, 900, 64), unit(rng, 50, 64)))
    screen = (Float32Screen if arithmetic == "float32" else Bfloat16Screen)(queries, Shape.of(corpus))
    scores = np.empty((50, 900), np.float32)
    screen.take(corpus)
    screen.multiply(slice(0, 50), scores)
    exact = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    apart = np.abs(scores + screen.offset[:, None] - exact)
    assert (apart <= screen.slack[:, None]).all()
    assert apart.max() > 0.01 * screen.slack.max()  # and the bound is not idle


def test_a_mapped_corpus_is_searched_alike_and_handed_back(tmp_path, arithmetic):
    rng = np.random.default_rng(7)
    corpus = unit(rng, 20_000, 64)
    np.save(tmp_path / "corpus.npy", corpus)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    queries = corpus[::100] + unit(rng, 200, 64) * np.float32(0.2)
    index = ExactIndex(64, vectors=mapped)
    found, expected = index.search(queries, 10), ExactIndex(64, vectors=corpus).search(queries, 10)
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert resident(mapped) < corpus.nbytes / 2
    total = mapped.sum()
    assert resident(mapped) > corpus.nbytes / 2
    release(mapped[100:])
    assert resident(mapped) < corpus.nbytes / 2
    assert mapped.sum() == total


@pytest.mark.parametrize("rows", [[], [3], [2, 3, 4], [1, 4, 7], [0, 1, 3], [0, 1, 2, 3, 5, 6]])
def test_evenly_spaced_rows_are_those_rows(rows):
    array = np.arange(30).reshape(10, 3)
    taken = evenly(array, np.array(rows, np.int64))
    np.testing.assert_array_equal(taken, array[np.array(rows, np.int64)])
    assert np.shares_memory(taken, array) == (rows in ([2, 3, 4], [1, 4, 7]))


def test_rounding_bound_holds():
    rng = np.random.default_rng(1)
    a, b = unit(rng, 2000, 128), unit(rng, 2000, 128)
    screened = a @ b.T
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    assert np.abs(screened - exact).max() <= rounding_bound(128, 1.0)


def test_rows_can_be_added_in_blocks():
    rng = np.random.default_rng(2)
    corpus, queries = unit(rng, 500, 16), unit(rng, 40, 16)
    index = ExactIndex(16, capacity=500)
    for start in range(0, 500, 130):
        index.add(corpus[start : start + 130])
    np.testing.assert_array_equal(index.search(queries, 7).rows, brute_force(queries, corpus, 7).rows)


def test_an_empty_index_finds_nothing():
    found = ExactIndex(4, capacity=10).search(np.ones((2, 4), np.float32), 3)
    assert (found.rows == -1).all() and np.isneginf(found.scores).all()


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("floor", [-np.inf, 0.3])
@pytest.mark.parametrize("can_map", [True, False])
def test_any_number_of_ranks_finds_the_same(size, floor, can_map, arithmetic, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_EXCHANGE_QUERIES", 50)
    rng = np.random.default_rng(size)
    corpus, queries = unit(rng, 2000, 32), unit(rng, 120, 32)
    corpus[1000:] = corpus[:1000]  # every score occurs twice, in different parts
    corpus[5:400] = corpus[5] + np.float32(1e-8) * unit(rng, 395, 32)  # more near-ties in one part than k
    queries[:40] = corpus[5]
    np.save(tmp_path / "corpus.npy", corpus)
    given = np.load(tmp_path / "corpus.npy", mmap_mode="r") if can_map else corpus

    def run(ranks: Ranks) -> tuple[Neighbors, int]:
        index = ShardedIndex.of(ranks, given if ranks.is_first else None, len(corpus), 32)
        found = index.search_all(queries if ranks.is_first else None, len(queries), 30, floor)
        return found, len(index._index)

    expected = brute_force(queries, corpus, 30, floor)
    for found, n in on_ranks(size, run):
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert (n == len(corpus)) == can_map


def test_what_another_rank_has_found_spares_scoring():
    rng = np.random.default_rng(1)
    corpus, queries = unit(rng, 3000, 16), unit(rng, 50, 16)
    begun = ExactIndex(16, vectors=corpus).begin(queries, 10)
    expected = brute_force(queries, corpus, 10)
    bounds = begun.lower_bounds()
    assert (np.sort(bounds, axis=1) <= expected.scores[:, ::-1]).all()
    np.testing.assert_allclose(np.sort(bounds, axis=1), expected.scores[:, ::-1], atol=0.05)
    cut = expected.scores[:, 3].astype(np.float32)
    found = begun.finish(cut)
    np.testing.assert_array_equal(found.rows[:, :3], expected.rows[:, :3])
    assert (found.rows[:, 9] < 0).any()  # it need not look for what cannot count


def test_merge_breaks_ties_by_row():
    a = Neighbors(np.array([[0.9, 0.5]]), np.array([[7, 3]]))
    b = Neighbors(np.array([[0.9, -np.inf]]), np.array([[2, -1]]))
    assert merge([a, b], 3).rows.tolist() == [[2, 7, 3]]


def test_sharded_index_with_one_rank_is_the_plain_search():
    rng = np.random.default_rng(3)
    corpus, queries = unit(rng, 300, 16), unit(rng, 30, 16)
    found = ShardedIndex.of(Ranks(), corpus, 300, 16).search_all(queries, 30, 5)
    np.testing.assert_array_equal(found.rows, brute_force(queries, corpus, 5).rows)


def test_a_gpu_is_used_only_where_faiss_has_one(caplog, monkeypatch):
    import faiss

    corpus = unit(np.random.default_rng(4), 50, 8)
    monkeypatch.setenv("FLAGS_selected_gpus", "3")  # as the launcher does
    for n_gpus in (0, 4):
        monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda n=n_gpus: n, raising=False)
        search.gpu_is_usable.cache_clear()
        caplog.clear()
        index = ExactIndex(8, vectors=corpus, device="gpu")
        assert ("faiss has no GPU support here" in caplog.text) == (n_gpus == 0)
        if n_gpus:
            assert (index._gpu.resources, index._gpu.device) == ("resources", 3)
        else:
            assert index._gpu is None
            found = index.search(corpus[:5], 3)
            np.testing.assert_array_equal(found.rows, brute_force(corpus[:5], corpus, 3).rows)
        assert ExactIndex(8, vectors=corpus)._gpu is None
    search.gpu_is_usable.cache_clear()


@pytest.mark.parametrize("floor", [-np.inf, 0.2])
def test_what_a_gpu_finds_is_settled_like_the_rest(floor):
    """faiss's CPU search stands in for its GPU twin, which takes the same arguments behind its resources."""
    import faiss

    from utils.search.exact import _Gpu

    rng = np.random.default_rng(5)
    corpus = unit(rng, 400, 16)
    corpus[200:] = corpus[:200]
    corpus[300:] = corpus[0]  # more ties than are fetched: left to the CPU
    queries = corpus[:30]
    index = ExactIndex(16, vectors=corpus)
    index._gpu = object.__new__(_Gpu)
    index._gpu.resources, index._gpu.device = None, 0
    index._gpu.faiss = type("faiss", (), {
        "knn_gpu": staticmethod(lambda resources, q, c, k, metric, **where: faiss.knn(q, c, k, metric=metric)),
        "METRIC_INNER_PRODUCT": faiss.METRIC_INNER_PRODUCT,
    })  # fmt: skip
    for k in (1, 7, 500):
        found, expected = index.search(queries, k, floor), brute_force(queries, corpus, k, floor)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.scores, expected.scores)
