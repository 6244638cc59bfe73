"""The whole job with a tiny model: what is never mined, refilters, outputs, refusals, ranks."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, make_tiny_bert, read_jsonl, run_script, write_jsonl
from thread_ranks import on_ranks

from mining_negative_samples import MiningNegativeSamples
from utils.arguments import scripts
from utils.arguments.scripts import ArgumentError, EvaluateArguments, MiningArguments
from utils.encoding import cross_encoder, embed, encoder
from utils.encoding.encoder import Cut
from utils.evaluation import collection
from utils.evaluation.rankings import GivenRankings
from utils.files.jsonl import fold
from utils.mining import candidates, job
from utils.mining.inputs import Inputs
from utils.mining.problem import Problem
from utils.process import runtime
from utils.ranks.group import Ranks
from utils.ranks.mapped import is_mapped
from utils.search import bm25, fusion
from utils.search.exact import ExactIndex
from utils.search.scores import pair_scores
from utils.training import rows as training_rows


def mining_rows() -> list[dict]:
    """Repeated queries, several positives, copies of positives and of queries among the passages."""
    rows = make_rows(90, seed=4)
    for i in range(0, 30, 3):
        rows[i]["pos_passage"].append(f"{rows[i + 1]['query']} answer {i + 200}")
    for i in range(30, 40):
        rows[i]["query"] = rows[i - 30]["query"]  # a repeated query with positives of its own
    for i in range(40, 50):
        rows[i]["query"] = f"  {rows[i - 40]['query']}\u3000"  # equal after folding
    for i in range(50, 60):
        rows[i]["pos_passage"] = [rows[i - 50]["pos_passage"][0].replace(" ", "  ")]  # a copy of another's positive
    for i in range(60, 70):
        rows[i]["pos_passage"].append(rows[i - 60]["query"].title())  # near another query's text
        rows[i]["pos_passage"].append(rows[i - 60]["query"] + " ")  # another query's own text
    return rows


@pytest.fixture(scope="session")
def mining_file(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("mining") / "in.json", mining_rows())


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def mine(tiny_model, mining_file, cache, tmp_path):
    def run(**options):
        out = str(tmp_path / "out.json")
        given = {"model_path": tiny_model, "input_data_path": mining_file, "output_data_path": out}
        return MiningNegativeSamples(**given | {"embedding_cache": cache} | options).mining(), out

    return run


def forbidden_texts(rows: list[dict]) -> dict[str, set[str]]:
    """For each folded query, the folded texts that must never be its negatives."""
    banned: dict[str, set[str]] = {}
    for row in rows:
        group = banned.setdefault(fold(row["query"]), {fold(row["query"])})
        group |= {fold(text) for text in row["pos_passage"]}
    return banned


def test_rows_come_back_in_order_with_every_key(mine):
    result, out = mine(num_negatives=5)
    rows, mined = mining_rows(), read_jsonl(out)
    assert [{k: v for k, v in row.items() if k != "neg_passage"} for row in mined] == [
        {k: v for k, v in row.items() if k != "neg_passage"} for row in rows
    ]
    report = json.loads(Path(out + ".report.json").read_text())
    assert report == result.report
    assert set(report["seconds"]) == {"read", "encode", "search", "choose", "write", "total"}
    assert report["counts"]["input"] == 90 == report["counts"]["written"]
    assert report["counts"]["negatives"] == sum(len(row["neg_passage"]) for row in mined) > 100
    assert report["drops_by_reason"] == result.drops_by_reason and report["drops_by_reason"]["forbidden"] > 0
    assert -1 <= report["background"]["query_passage"]["mean"] <= 1
    assert report["scores"]["negatives"]["n"] == report["counts"]["negatives"]


def random_options(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    start = int(rng.integers(0, 8))
    options = {
        "range_for_sampling": f"{start}-{start + int(rng.integers(1, 70))}",
        "sampling_strategy": str(rng.choice(["top", "random", "easy"])),
        "num_negatives": int(rng.integers(1, 20)),
        "short_rows": str(rng.choice(["keep", "backfill", "drop"])),
        "seed": seed,
        "temperature": float(rng.uniform(0.01, 3)),
    }
    for name, low, high in (
        ("relative_margin", 0, 1), ("absolute_margin", 0, 0.2), ("max_score", 0.5, 1), ("min_score", -1, 0.3),
        ("positive_similarity", 0.2, 1), ("negative_similarity", 0.2, 1),
    ):  # fmt: skip
        if rng.random() < 0.5:
            options[name] = float(rng.uniform(low, high)) if rng.random() < 0.7 else None
    if rng.random() < 0.3:
        options["score_baseline"] = 0.0
    if rng.random() < 0.3:
        options |= {"mix": "hard:3,random:2,easy:4", "sampling_strategy": "top", "num_negatives": None}
    return options


@pytest.mark.parametrize("seed", range(20))
def test_nothing_forbidden_under_any_options(mine, seed, tmp_path):
    options = random_options(seed)
    rows = mining_rows()
    if seed % 4 == 3:  # a pool full of positives, copies and queries
        pool = [{"neg_passage": [p, f" {p}"]} for row in rows[:40] for p in row["pos_passage"]]
        pool += [{"text": row["query"], "title": ""} for row in rows]
        options["candidate_pool"] = write_jsonl(tmp_path / "pool.jsonl", pool)
        options["candidate_pool_only"] = seed % 8 == 7
    _, out = mine(**options)
    banned = forbidden_texts(rows)
    for row in read_jsonl(out):
        assert not {fold(text) for text in row["neg_passage"]} & banned[fold(row["query"])]


def test_neighbours_equal_brute_force(mine, tiny_model):
    result, _ = mine(relative_margin=None, positive_similarity=None, negative_similarity=None, num_negatives=40)
    rows = mining_rows()
    passages = list(dict.fromkeys(text for row in rows for text in row["pos_passage"]))
    query_encoder, passage_encoder = embed.build_encoders(scripts.build(MiningArguments, model_path=tiny_model))
    queries = list(dict.fromkeys(row["query"] for row in rows))
    query_vectors, vectors = query_encoder.encode(queries), passage_encoder.encode(passages)
    banned = forbidden_texts(rows)
    for row, found in zip(rows, result.negatives, strict=True):
        query = query_vectors[queries.index(row["query"])]
        scores = pair_scores(np.repeat(query[None], len(passages), 0), vectors)
        order = np.lexsort((np.arange(len(passages)), -scores)).tolist()
        order = [i for i in order if fold(passages[i]) not in banned[fold(row["query"])]][:40]
        assert [tuple(n) for n in found] == [(i, scores[i], rank) for rank, i in enumerate(order)]


def test_a_second_run_with_other_rules_encodes_and_searches_nothing(mine, monkeypatch):
    mine(range_for_sampling="0-60")

    def fail(*args, **kwargs):
        raise AssertionError("encoded or searched again")

    monkeypatch.setattr(embed, "_fill", fail)
    monkeypatch.setattr(ExactIndex, "search", fail)
    second, out = mine(range_for_sampling="5-40", relative_margin=0.4, num_negatives=3, output_format="triplet")
    assert second.report["counts"]["searched"] == second.report["counts"]["encoded"] == 0
    assert set(read_jsonl(out)[0]) == {"anchor", "positive", "negative"}


def test_a_killed_search_goes_on_where_it_stopped(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "_QUERY_BLOCK", 16)
    mine = partial(mine, range_for_sampling="0-50")
    _, out = mine(embedding_cache=None)
    whole = Path(out).read_bytes()
    search, calls = ExactIndex.search, []

    def dying(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return search(*args, **kwargs)

    fresh = str(tmp_path / "fresh")
    monkeypatch.setattr(ExactIndex, "search", dying)
    with pytest.raises(KeyboardInterrupt):
        mine(embedding_cache=fresh)
    monkeypatch.setattr(ExactIndex, "search", search)
    again, out = mine(embedding_cache=fresh)
    assert again.report["counts"]["encoded"] == 0
    assert again.report["counts"]["searched"] == again.report["counts"]["queries"] - 32
    assert Path(out).read_bytes() == whole


@pytest.mark.parametrize("retrievers", [{}, {"lexical": True}])
def test_only_queries_with_too_few_candidates_left_are_searched_further(mine, tmp_path, monkeypatch, retrievers):
    """They get what their larger window gives; the others what theirs gives; a second run searches nothing."""
    monkeypatch.setattr(scripts, "_USUAL_WINDOW", 12)
    monkeypatch.setattr(job, "FURTHEST", 60)
    options = {
        "embedding_cache": str(tmp_path / "cache"), "num_negatives": 6, "relative_margin": 0.3, "mix": None,
        "negative_similarity": None, **retrievers,
    }  # fmt: skip
    windows = {12: mine(**options, range_for_sampling="0-12")[0]}
    result, _ = mine(**options)
    for stop in (48, 60):
        windows[stop] = mine(**options, range_for_sampling=f"0-{stop}")[0]
    query_of_row = np.unique([fold(row["query"]) for row in mining_rows()], return_inverse=True)[1]
    stops = np.full(len(query_of_row), 12)
    for before, stop in ((12, 48), (48, 60)):
        stops[(stops == before) & (windows[before].negatives.rows.sizes() < 6)] = stop
    assert {*stops.tolist()} == {12, 48, 60}
    assert list(result.negatives) == [windows[stop].negatives[row] for row, stop in enumerate(stops.tolist())]
    n_further = {f"to {stop}": len({*query_of_row[stops >= stop].tolist()}) for stop in (48, 60)}
    assert result.report["queries_searched_further"] == n_further
    again, _ = mine(**options)
    assert again.report["counts"]["searched"] == 0 and again.negatives == result.negatives
    drops = windows[60].drops_by_reason["relative_margin"]
    assert windows[12].drops_by_reason["relative_margin"] < result.drops_by_reason["relative_margin"] <= drops


def hot_rows() -> list[dict]:
    """mining_rows, and 150 more that all ask the first one's query, each with a positive of its own."""
    rows = mining_rows()
    return rows + [{"query": rows[0]["query"], "pos_passage": [f"{rows[i % 90]['query']} no {i}"]} for i in range(150)]


def test_one_often_repeated_query_does_not_lengthen_all_lists(mine, tmp_path):
    rows, fresh = hot_rows(), str(tmp_path / "fresh")
    loose = {"relative_margin": None, "positive_similarity": None, "negative_similarity": None, "num_negatives": 20}
    source = write_jsonl(tmp_path / "hot.json", rows)
    result, out = mine(input_data_path=source, embedding_cache=fresh, range_for_sampling="0-20", **loose)
    stores = {int(path.parent.name): path.stat().st_size for path in Path(fresh).glob("neighbors-*/*/vectors")}
    n_queries = result.report["counts"]["queries"]
    # A query with its twins of other white space has more than 150 forbidden passages, the others a few.
    assert len(stores) == 2 and min(stores) < 40 and max(stores) > 170
    assert stores[max(stores)] < 16 * max(stores) * 4 and stores[min(stores)] > 16 * min(stores) * (n_queries - 4)
    assert result.report["counts"]["searched"] == n_queries
    whole, _ = mine(
        input_data_path=source, embedding_cache=fresh, range_for_sampling=f"0-{len(rows) + 60}", **loose
    )  # every list is as long as the corpus
    assert result.negatives == whole.negatives and all(len(row["neg_passage"]) == 20 for row in read_jsonl(out))
    again, _ = mine(input_data_path=source, embedding_cache=fresh, range_for_sampling="0-10", lexical=True)
    assert again.report["counts"]["searched"] == 0
    banned = forbidden_texts(rows)
    for row in read_jsonl(out):
        assert not {fold(text) for text in row["neg_passage"]} & banned[fold(row["query"])]


def test_a_search_killed_between_lists_of_two_lengths_goes_on(mine, tmp_path, monkeypatch):
    mine = partial(mine, range_for_sampling="0-50")
    source, fresh = write_jsonl(tmp_path / "hot.json", hot_rows()), str(tmp_path / "fresh")
    _, out = mine(input_data_path=source, embedding_cache=None)
    whole, search, depths = Path(out).read_bytes(), ExactIndex.search, []

    def dying(self, queries, k, *args):
        depths.append(k)
        if len(depths) == 2:
            raise KeyboardInterrupt
        return search(self, queries, k, *args)

    monkeypatch.setattr(ExactIndex, "search", dying)
    with pytest.raises(KeyboardInterrupt):
        mine(input_data_path=source, embedding_cache=fresh)
    monkeypatch.setattr(ExactIndex, "search", search)
    again, out = mine(input_data_path=source, embedding_cache=fresh)
    assert depths[0] < depths[1] and 0 < again.report["counts"]["searched"] < 4
    assert Path(out).read_bytes() == whole


def test_queries_of_one_text_are_one_however_they_are_written(mine, tmp_path):
    """By width, composition and white space; each row's query stays as it is, and each id names the one query."""
    spellings = ["café number 1", "cafe\u0301 number 1", "ｃａｆé\u3000number １", "café  number 1"]
    asking = [{"id": f"own{i}", "query": query, "pos_passage": [f"answer {i}"]} for i, query in enumerate(spellings)]
    source = write_jsonl(tmp_path / "in.json", [*asking, *mining_rows()])
    run = tmp_path / "run.trec"
    out = tmp_path / "ids.jsonl"
    mine(input_data_path=source, output_data_path=str(out), write_corpus=True)
    ids = {row["text"]: row["_id"] for row in read_jsonl(f"{out}.corpus.jsonl")}
    first, second = [text for text in ids if not text.startswith("answer")][:2]
    # The same passage for two of its ids is no passage named twice; the higher score counts.
    lines = [("own0", first, 0.2), ("own1", first, 0.9), ("own2", second, 0.5)]
    lines += [("own3", "answer 2", 1.0)]
    run.write_text("".join(f"{query} Q0 {ids[text]} 1 {score} t\n" for query, text, score in lines))
    _, out = mine(
        input_data_path=source, run_path=str(run), dense=False, relative_margin=None, positive_similarity=None
    )
    rows = read_jsonl(out)[: len(asking)]
    assert [row["query"] for row in rows] == spellings
    assert [row["neg_passage"] for row in rows] == [[first, second]] * len(asking)


def test_a_rows_prompt_is_its_querys_template(mine, tmp_path, caplog):
    """As rows that hold it already, with no template; positives hold for a text with any prompt."""
    caplog.set_level("INFO")
    prompts = ["where is the ", "", "my new "]
    rows = [row | {"prompt": prompts[i % 3]} for i, row in enumerate(mining_rows())]
    filled = [row | {"query": row["prompt"] + row["query"], "prompt": None} for row in rows]
    options = {"positive_similarity": None, "relative_margin": None, "num_negatives": 5}
    outs = []
    for name, part, template in (("a", rows, "old {text}"), ("b", filled, "{text}"), ("c", rows, "{text}")):
        part = [{k: v for k, v in row.items() if k != "prompt"} for row in part] if name == "c" else part
        path = write_jsonl(tmp_path / f"{name}.json", part)
        _, out = mine(input_data_path=path, query_template=template, **options)
        outs.append([row["neg_passage"] for row in read_jsonl(out)])
    banned = [forbidden_texts(rows)[fold(row["query"])] for row in rows]
    assert not any({*map(fold, mined)} & texts for mined, texts in zip(outs[0], banned, strict=True))
    # What is forbidden goes by the text without its prompt, so that a filled query may see more.
    same = [i for i, texts in enumerate(banned) if not {*map(fold, outs[1][i])} & texts]
    assert len(same) > len(rows) / 2 and [outs[0][i] for i in same] == [outs[1][i] for i in same]
    assert outs[2] != outs[0]
    assert f"{len(rows)} rows have a prompt: it stands before the query" in caplog.text


def graded_rows() -> list[dict]:
    """Queries, each of which has a positive that is as near to another query as can be."""
    rows = make_rows(60, seed=4)
    for i, row in enumerate(rows):
        row["pos_passage"].append(rows[(i + 7) % 60]["pos_passage"][0] + " as well")
    return rows


def test_the_positive_that_margins_are_measured_from(mine, tmp_path, caplog):
    source = write_jsonl(tmp_path / "graded.json", graded_rows())
    wanted = {"input_data_path": source, "positive_similarity": None, "range_for_sampling": "0-50"}
    bare, measured = [], []
    for which in ("lowest", "median", "highest"):
        caplog.clear()
        result, _ = mine(**wanted, relative_margin=0.25, margin_positive=which)
        assert result.report["counts"]["searched"] == (0 if bare else result.report["counts"]["queries"])
        bare.append(result.report["counts"]["without_negatives"])
        higher = {"lowest": "median or highest", "median": "highest"}.get(which)
        advice = f"margin_positive {higher} ({bare[-1]} of them have several positives)"
        assert (advice in caplog.text) == (3 * bare[-1] > 60 and higher is not None)
        auto, _ = mine(**wanted, margin_positive=which)
        measured.append(auto.report["relative_margin"]["counted"])
    assert bare[0] > 20 and bare[0] > bare[1] > bare[2]
    assert measured[0] != measured[1] != measured[2] != measured[0]
    rows = [row | {"query": f"{row['query']} {i}"} for i, row in enumerate(make_rows(60, seed=4))]  # none twice
    single = write_jsonl(tmp_path / "single.json", rows)
    caplog.clear()
    results = [mine(input_data_path=single, margin_positive=which)[0] for which in ("lowest", "median", "highest")]
    assert results[0].negatives == results[1].negatives == results[2].negatives
    mine(input_data_path=single, relative_margin=1.0, range_for_sampling="0-50")
    assert "have no negative at all" in caplog.text and "margin_positive" not in caplog.text
    assert "relative_margin dropped the most candidates" in caplog.text and "a smaller relative_margin" in caplog.text
    caplog.clear()
    mine(input_data_path=single, relative_margin=None, positive_similarity=None, max_score=-1.0)
    assert "max_score dropped the most" in caplog.text and "a higher max_score, or short_rows" in caplog.text
    caplog.clear()
    dropped, _ = mine(input_data_path=single, range_for_sampling="5000-5001", num_negatives=1, short_rows="drop")
    assert dropped.report["counts"]["dropped_short"] == 60 and "60 of 60 rows have no negative" in caplog.text
    assert "range_for_sampling holds no more passages" in caplog.text


def test_short_rows(mine, tmp_path):
    strict = {"relative_margin": 0.6, "num_negatives": 30}
    kept, out = mine(**strict)
    short = set(kept.short_queries.tolist())
    assert 0 < len(short) < 90 and len(read_jsonl(out)) == 90
    assert kept.report["counts"]["short"] == len(short)
    mine(**strict, short_rows="drop")
    rows = mining_rows()
    assert [row["id"] for row in read_jsonl(out)] == [row["id"] for i, row in enumerate(rows) if i not in short]
    assert [row["id"] for row in read_jsonl(out + ".short.jsonl")] == [rows[i]["id"] for i in sorted(short)]
    filled, out = mine(**strict, short_rows="backfill")
    for i, row in enumerate(read_jsonl(out)):
        assert row.get("neg_backfilled", 0) == len(row["neg_passage"]) - len(kept.negatives[i])
    assert filled.report["counts"]["backfilled"] > 0


@pytest.mark.parametrize("name", scripts.FORMATS)
def test_rows_that_other_tools_cannot_take_are_set_aside(mine, tmp_path, caplog, name):
    rows = [row | {"answer": "yes"} for row in mining_rows()]
    source = write_jsonl(tmp_path / "qa.json", rows)
    strict = {"input_data_path": source, "relative_margin": 0.6, "num_negatives": 12}
    kept, out = mine(**strict)
    sizes, plain, side = kept.negatives.rows.sizes(), read_jsonl(out), Path(out + ".short.jsonl")
    assert 0 < (sizes == 0).sum() < (sizes < 12).sum() < 90 == len(plain) and not side.exists()

    caplog.clear()
    result, _ = mine(**strict, output_format=name)
    needed = {"list": 0, "context_qa": 0, "n-tuple": 12}.get(name, 1)
    aside, counts = [i for i in range(90) if sizes[i] < needed], result.report["counts"]
    assert (counts["dropped_short"], counts["written"]) == (len(aside), 90 - len(aside))
    warnings = [record.getMessage() for record in caplog.records if " rows have " in record.getMessage()]
    loud = "warning: " if 2 * max(len(aside), (sizes == 0).sum()) > 90 else ""
    what = "fewer than 12 negatives" if name == "n-tuple" else "no negative at all"
    told = f"{loud}{len(aside)} of 90 rows have {what} and went to {side}, as tools that read {name} cannot take them: "
    assert len(warnings) == 1 and warnings[0].startswith(told) == (needed > 0)
    assert side.exists() == bool(aside) and (not aside or read_jsonl(side) == [plain[i] for i in aside])
    whole = [row for i, row in enumerate(plain) if sizes[i] >= needed]
    lines = read_jsonl(out)
    if name == "flagembedding":
        assert [row["neg"] for row in lines] == [row["neg_passage"] for row in whole] and all(r["neg"] for r in lines)
    elif name == "n-tuple":
        columns = {"anchor", "positive", *(f"negative_{i}" for i in range(1, 13))}
        assert len(lines) == sum(len(row["pos_passage"]) for row in whole) and all(set(r) == columns for r in lines)
    elif name == "labeled-list":
        assert [row["query"] for row in lines] == [row["query"] for row in whole]
        assert all(0 in row["labels"] for row in lines)
    elif name == "triplet":
        assert len(lines) == sum(len(row["pos_passage"]) * len(row["neg_passage"]) for row in whole)
    else:
        assert {row.get("query", row.get("question")) for row in lines} == {row["query"] for row in rows}

    for short_rows, n_aside in (("keep", 0), ("drop", int((sizes < 12).sum()))):  # what is asked for is done
        result, _ = mine(**strict, output_format=name, short_rows=short_rows)
        assert result.report["counts"]["dropped_short"] == n_aside
        assert len(read_jsonl(side)) == n_aside if n_aside else not side.exists()


def test_nothing_is_set_aside_where_every_row_has_negatives(mine):
    loose = {"relative_margin": None, "positive_similarity": None, "negative_similarity": None}
    result, out = mine(**loose, output_format="n-tuple")
    assert result.report["counts"]["dropped_short"] == 0 and not Path(out + ".short.jsonl").exists()


def test_output_formats(mine, tmp_path):
    rows = mining_rows()
    for row in rows:
        row["answer"] = ["yes", "no"]
    source = write_jsonl(tmp_path / "qa.json", rows)
    options = {"input_data_path": source, "num_negatives": 3, "output_scores": True, "relative_margin": None}
    result, out = mine(**options)
    plain = read_jsonl(out)
    first = plain[0]
    assert first["neg_scores"] == [negative.score for negative in result.negatives[0]]
    assert len(first["pos_scores"]) == len(first["pos_passage"]) == 2
    mine(**options, output_format="flagembedding")
    assert read_jsonl(out)[0] == {
        "query": first["query"], "pos": first["pos_passage"], "neg": first["neg_passage"], "id": 0,
        "answer": ["yes", "no"], "pos_scores": first["pos_scores"], "neg_scores": first["neg_scores"],
    }  # fmt: skip
    mine(**options, output_format="triplet")
    triplets = read_jsonl(out)
    assert len(triplets) == sum(len(row["pos_passage"]) * len(row["neg_passage"]) for row in plain)
    assert triplets[0] == {
        "anchor": first["query"], "positive": first["pos_passage"][0], "negative": first["neg_passage"][0],
        "scores": [first["pos_scores"][0], first["neg_scores"][0]],
    }  # fmt: skip
    mine(**options, output_format="n-tuple")
    assert list(read_jsonl(out)[0]) == ["anchor", "positive", "negative_1", "negative_2", "negative_3", "scores"]
    mine(**options | {"output_scores": False}, output_format="labeled-list")
    assert read_jsonl(out)[0] == {
        "query": first["query"], "docs": first["pos_passage"] + first["neg_passage"], "labels": [1, 1, 0, 0, 0]
    }  # fmt: skip
    mine(**options, output_format="context_qa", no_answer_text="none")
    answers = [(row["context"], row["answer"]) for row in read_jsonl(out)[:5]]
    assert answers == [(p, "yes") for p in first["pos_passage"]] + [(n, "none") for n in first["neg_passage"]]


def test_what_a_row_said_of_its_old_negatives_goes_with_them(mine, tmp_path):
    old = {"neg_passage": ["old"], "neg": ["old"], "neg_scores": [0.5], "neg_backfilled": 1, "pos_scores": [2.0, 1.0]}
    source = write_jsonl(tmp_path / "scored.jsonl", [row | old for row in mining_rows()])
    for shape in ("list", "flagembedding"):
        _, out = mine(input_data_path=source, output_format=shape)
        assert not {"neg_scores", "neg_backfilled"} & set().union(*read_jsonl(out))
        assert read_jsonl(out)[0]["pos_scores"] == [2.0, 1.0]


def rows_with_negatives() -> list[dict]:
    """Negatives that no other row has, others' positives, known positives, equal texts, and none."""
    rows = mining_rows()
    for i, row in enumerate(rows):
        other, same = rows[(i + 5) % len(rows)]["pos_passage"][0], row["pos_passage"][0]
        own = [f"old {i} lost", other, f"old  {i} lost", f"{same} ", f"ｏｌｄ {i} big"]
        row["neg_passage"] = own[: i % 7]
        row["neg_scores"] = [9.0] * len(row["neg_passage"])
    return rows


@pytest.mark.parametrize("name", ["list", "flagembedding", "triplet", "labeled-list", "context_qa"])
def test_own_negatives_are_kept_first_and_not_repeated(mine, tmp_path, name, caplog):
    caplog.set_level("INFO")
    rows = [row | {"answer": f"a{i}"} for i, row in enumerate(rows_with_negatives())]
    source = write_jsonl(tmp_path / "in.json", rows)
    options = {"input_data_path": source, "keep_negatives": True, "num_negatives": 4, "short_rows": "keep"}
    result, out = mine(**options, output_format=name, no_answer_text="none")
    banned, expected = forbidden_texts(rows), []
    for row in rows:
        stay = [text for text in row["neg_passage"] if fold(text) not in banned[fold(row["query"])]]
        first = {fold(text): text for text in reversed(stay)}
        expected.append([text for text in dict.fromkeys(stay) if text in first.values()])
    found = {
        "list": lambda lines: [line["neg_passage"] for line in lines],
        "flagembedding": lambda lines: [line["neg"] for line in lines],
        "labeled-list": lambda lines: [
            line["docs"][line["labels"].index(0) :] if 0 in line["labels"] else [] for line in lines
        ],
    }
    lines = read_jsonl(out)
    if name in found:
        negatives = found[name](lines)
        for own, got in zip(expected, negatives, strict=True):
            assert got[: len(own)] == own and len(got) <= max(4, len(own))
            assert len({*map(fold, got)}) == len(got)  # nothing is mined that the row has already
        assert sum(map(len, negatives)) > sum(map(len, expected))
        assert all("neg_scores" not in line for line in lines)
    else:
        key = "context" if name == "context_qa" else "negative"
        texts = {
            (line.get("question", line.get("anchor")), line[key])
            for line in lines
            if line.get("answer", "none") == "none"
        }
        assert texts >= {(row["query"], text) for row, own in zip(rows, expected, strict=True) for text in own}
    counts = result.report["counts"]
    assert counts["kept"] == sum(map(len, expected)) and counts["passages"] > counts["candidates"]
    assert f"{sum(i % 7 > 0 for i in range(len(rows)))} rows have negatives of their own, which are kept" in caplog.text
    assert "negatives of the rows are positives of their query, or its own text, and are left out" in caplog.text


def test_own_negatives_are_scored_as_others_are(mine, tmp_path):
    rows, folder = rows_with_negatives(), make_tiny_bert(tmp_path / "reranker", labels=1)
    source = write_jsonl(tmp_path / "in.json", rows)
    options = {"input_data_path": source, "keep_negatives": True, "num_negatives": 4, "output_scores": True}
    result, out = mine(**options)
    for row, negatives in zip(read_jsonl(out), result.negatives, strict=True):
        assert row["neg_scores"] == [negative.score for negative in negatives]
        assert all(abs(score) <= 1 + 1e-6 for score in row["neg_scores"])
    _, out = mine(**options, reranker_path=folder)
    scorer = cross_encoder.Reranker(folder, 512)
    for row in read_jsonl(out)[:20]:
        logits = scorer.score([(row["query"], text) for text in row["pos_passage"] + row["neg_passage"]])
        np.testing.assert_allclose(row["pos_scores"] + row["neg_scores"], logits, atol=1e-3)


def test_what_n_tuples_cannot_hold_is_a_bad_row(mine, tmp_path):
    source = write_jsonl(tmp_path / "in.json", rows_with_negatives())
    options = {"input_data_path": source, "keep_negatives": True, "num_negatives": 4, "output_format": "n-tuple"}
    with pytest.raises(ValueError, match=r"in\.json:6: 5 negatives; keep_negatives with output_format n-tuple expects"):
        mine(**options)
    _, out = mine(**options, on_bad_row="skip")
    assert all(set(line) == {"anchor", "positive", *(f"negative_{i}" for i in range(1, 5))} for line in read_jsonl(out))


def test_flagembedding_keys_are_read(mine, tmp_path):
    rows = [{"query": row["query"], "pos": row["pos_passage"], "neg": ["old"]} for row in mining_rows()]
    _, out = mine(input_data_path=write_jsonl(tmp_path / "fe.jsonl", rows), num_negatives=2)
    ours = read_jsonl(out)
    assert all(row.keys() == {"query", "pos", "neg"} for row in ours)  # the mined ones take the old ones' place
    _, out = mine(num_negatives=2)
    assert [row["neg"] for row in ours] == [row["neg_passage"] for row in read_jsonl(out)]


def test_a_corpus_smaller_than_what_is_asked_for(mine, tmp_path, caplog):
    rows = [{"query": "loan", "pos_passage": ["loan answer 1"]}, {"query": "card", "pos_passage": ["river 2"]}]
    source = write_jsonl(tmp_path / "few.jsonl", rows)
    result, out = mine(input_data_path=source, relative_margin=None, positive_similarity=None)
    assert [row["neg_passage"] for row in read_jsonl(out)] == [["river 2"], ["loan answer 1"]]
    assert result.short_queries.tolist() == [0, 1]
    caplog.set_level("INFO")
    mine(input_data_path=source, num_negatives=1, range_for_sampling="0-50")
    assert "range_for_sampling 0-50 goes beyond the 2 passages to mine from" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range_for_sampling": "50"}, "range_for_sampling is '50'; expected START-STOP"),
        ({"range_for_sampling": "50-10"}, "with START below STOP"),
        ({"range_for_sampling": "-5-10"}, "expected START-STOP"),
        ({"mix": "hard:10,esay:5"}, "did you mean easy?"),
        ({"mix": "hard"}, "expected a strategy and a count"),
        ({"mix": "hard:2", "num_negatives": 5}, "mix adds up to 2, but num_negatives is 5"),
        ({"mix": "hard:2", "sampling_strategy": "easy"}, "both given"),
        ({"num_negatives": 0}, "expected at least 1"),
        ({"relative_margin": 1.5}, "expected at least 0.0 and at most 1.0"),
        ({"relative_margin": "wide"}, "expected a number or 'auto' or null"),
        ({"relative_margn": 0.5}, "did you mean relative_margin?"),
        ({"candidate_pool_only": True}, "candidate_pool_only needs candidate_pool"),
        ({"min_score": 0.9, "max_score": 0.1}, "min_score is 0.9, above max_score"),
        ({"margin_positive": "meddian"}, "did you mean median?"),
        ({"temperature": 0.0}, "expected more than 0.0"),
        ({"easy_from": "positive"}, "easy_from is 'positive', but neither sampling_strategy nor mix has easy"),
        ({"output_format": "triplets"}, "did you mean triplet?"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ArgumentError) as caught:
        scripts.build(MiningArguments, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "pool", "options", "message"),
    [
        ([{"query": "a"}], None, {}, 'in.jsonl:1: "pos_passage" is missing'),
        ([{"query": "a", "pos_passage": []}], None, {}, 'in.jsonl:1: "pos_passage" is an empty list'),
        ([{"query": " ", "pos_passage": ["b"]}], None, {}, 'in.jsonl:1: "query" is empty'),
        ([{"query": "a", "pos_passage": ["b"]}], [{"neg_passage": 3}], {}, "pool.jsonl:1:"),
        ([{"query": "a", "pos_passage": ["b"]}], [{"body": "c"}], {}, 'pool.jsonl:1: neither "neg_passage" nor "text"'),
        ([{"query": "a", "pos_passage": ["b"]}], [{"text": 3}], {}, '"text" is 3; expected a string'),
        ([{"query": "a", "pos_passage": ["b"]}], [{"text": " ", "title": ""}], {}, '"text" is empty'),
        ([{"query": "a", "pos_passage": ["b"]}], None, {"output_format": "context_qa"}, 'in.jsonl:1: no "answer"'),
        ([{"query": "a", "pos_passage": ["b"]}], None, {"model_path": "./no-model"}, "no such model folder"),
    ],
)
def test_bad_inputs_are_refused_before_a_model_is_loaded(tiny_model, tmp_path, rows, pool, options, message):
    given = {"model_path": tiny_model, "input_data_path": write_jsonl(tmp_path / "in.jsonl", rows)} | options
    if pool is not None:
        given["candidate_pool"] = write_jsonl(tmp_path / "pool.jsonl", pool)
    with pytest.raises((ValueError, OSError)) as caught:
        MiningNegativeSamples(output_data_path=str(tmp_path / "out.json"), **given).mining()
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out.json*"))


def test_bad_rows_can_be_set_aside(mine, tmp_path):
    rows = [*mining_rows()[:20], {"query": "loan"}]
    pool = [{"neg_passage": ["river card 5"]}, {"other": 1}]
    source, pool_path = write_jsonl(tmp_path / "in.json", rows), write_jsonl(tmp_path / "pool.jsonl", pool)
    result, out = mine(input_data_path=source, candidate_pool=pool_path, on_bad_row="skip")
    assert result.report["counts"]["rejected"] == 1 and len(read_jsonl(out)) == 20
    assert [(row["path"], row["line"]) for row in read_jsonl(out + ".rejected.jsonl")] == [(source, 21), (pool_path, 2)]


def test_rows_that_one_run_cannot_use_can_be_set_aside(mine, tmp_path):
    rows = [row | {"id": str(i), "answer": "yes"} for i, row in enumerate(mining_rows()[:20])]
    rows[3].pop("answer")
    rows[5]["id"] = "1"
    source = write_jsonl(tmp_path / "in.json", rows)
    (tmp_path / "run.trec").write_text("0 Q0 1 1 0.5 t\n")
    for line, options in ((4, {"output_format": "context_qa"}), (6, {"run_path": str(tmp_path / "run.trec")})):
        with pytest.raises(ValueError, match=f"in.json:{line}: "):
            mine(input_data_path=source, **options)
        result, out = mine(input_data_path=source, **options, on_bad_row="skip")
        assert result.report["counts"]["rejected"] == 1
        assert [row["line"] for row in read_jsonl(out + ".rejected.jsonl")] == [line]


def test_passages_without_an_id_get_one_that_no_other_has(mine, tmp_path):
    pool = [{"_id": f"d{i}", "text": f"river card {i}"} for i in range(3)]
    _, out = mine(candidate_pool=write_jsonl(tmp_path / "pool.jsonl", pool), write_corpus=True)
    passages = ids_of(out)[1]
    assert all(passages[row["_id"]] == row["text"] for row in pool)
    assert passages["row-d1"] == mining_rows()[0]["pos_passage"][0]


def ids_of(out: str) -> tuple[dict[str, str], dict[str, str]]:
    """Text by id of the queries and of the passages that write_corpus wrote."""
    files = (read_jsonl(out + suffix) for suffix in (".queries.jsonl", ".corpus.jsonl"))
    queries, passages = ({row["_id"]: row["text"] for row in rows} for rows in files)
    return queries, passages


def test_candidates_of_a_run_file(mine, tmp_path):
    _, out = mine(write_corpus=True)
    queries, passages = ids_of(out)
    rows = mining_rows()
    assert queries["0"] == rows[0]["query"] and passages["d1"] == rows[0]["pos_passage"][0]
    wanted = list(passages)[::7]
    lines = [f"{q} Q0 {p} {i} {i / 10} bm25" for q in queries for i, p in enumerate(wanted)]
    run = tmp_path / "run.trec"
    run.write_text("\n".join(lines))
    loose = {"relative_margin": None, "positive_similarity": None, "negative_similarity": None}
    _, out = mine(run_path=str(run), dense=False, **loose)
    banned = forbidden_texts(rows)
    for row in read_jsonl(out):
        ranked = [passages[p] for p in reversed(wanted)]
        assert row["neg_passage"] == [t for t in ranked if fold(t) not in banned[fold(row["query"])]][:15]
    fused, out = mine(run_path=str(run), lexical=True)
    for row in read_jsonl(out):
        assert not {fold(text) for text in row["neg_passage"]} & banned[fold(row["query"])]
    assert fused.report["counts"]["negatives"] > 0


@pytest.mark.parametrize("pooled", [None, "candidate_pool", "candidate_pool_only"])
def test_a_run_file_names_the_same_texts_in_mining_and_evaluation(tmp_path, pooled, caplog):
    """Also where only one of the two knows a text, as evaluation does a row's negatives."""
    rows = [row | {"neg_passage": [f"own {i % 7}", f"river {i}"]} for i, row in enumerate(mining_rows()[:30])]
    for row in rows:
        del row["id"]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    pool = write_jsonl(
        tmp_path / "pool.jsonl",
        [{"text": f"pooled {i}"} for i in range(5)] + [{"text": text} for text in ("own 3", rows[4]["pos_passage"][0])],
    )
    mined = {"candidate_pool": pool} if pooled else {}
    mined |= {"candidate_pool_only": True} if pooled == "candidate_pool_only" else {}
    kept = {None: {}, "candidate_pool": {"neg_path": pool}, "candidate_pool_only": {"corpus_path": pool}}[pooled]
    (tmp_path / "run").write_text("q1 Q0 d1 1 1.0 t\n")
    run = {"run_path": str(tmp_path / "run")}
    judged = collection.read(scripts.build(EvaluateArguments, dev_path=source, **kept, **run))
    names = {judged.passage_id(row): text for row, text in enumerate(judged.passages)}
    found = Inputs.read(scripts.build(MiningArguments, input_data_path=source, **mined, **run))
    for name, number in found.passage_ids.items():
        assert names[name] == found.passages[number]
    assert {name: judged.queries[n] for n, name in enumerate(judged.query_ids)} == {
        name: found.queries[number] for name, number in found.query_ids.items()
    }
    every = [f"{query} Q0 {name} 1 {n} t" for query in judged.query_ids for n, name in enumerate(names)]
    (tmp_path / "run").write_text("\n".join(every))
    found = Inputs.read(scripts.build(MiningArguments, input_data_path=source, **mined, **run))
    assert {*found.run_lists[0]} == {*range(found.n_candidates)} and "now they are" not in caplog.text
    # Numbers from 0, as mining once counted, mean the same to both.
    older = [f"{i} Q0 {n} 1 {n} t" for i in range(len(judged.queries)) for n in range(found.n_candidates)]
    (tmp_path / "run").write_text("\n".join(older))
    found = Inputs.read(scripts.build(MiningArguments, input_data_path=source, **mined, **run))
    assert found.run_lists[0] == [*range(found.n_candidates)][::-1]
    assert caplog.text.count("name queries or passages by their numbers from 0") == 1
    ranked = GivenRankings(scripts.build(EvaluateArguments, dev_path=source, **kept, **run), judged).search(0, 1, 99)
    texts = [judged.passages[row] for row in ranked.rows[0] if row >= 0]
    assert texts == [found.passages[number] for number in found.run_lists[0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 my own id 1 0.5 t", "run.trec:2: 8 columns; expected 6: .*; 'my own id' cannot be a passage id, as"),
        ("nobody Q0 0 1 0.5 t", "run.trec:2: unknown query id 'nobody'"),
        ("0 Q0 nothing 1 0.5 t", "run.trec:2: unknown passage id 'nothing'"),
        ("0 Q0 1 2 0.4 t", "run.trec:2: passage '1' is named twice for query '0'"),
        ("0 Q0 0 1 high t", "run.trec:2: the score is 'high'; expected a number"),
        ("0 0 0.5", "run.trec:2: 3 columns; expected 6"),
    ],
)
def test_bad_run_files(mine, tmp_path, line, message):
    run = tmp_path / "run.trec"
    run.write_text(f"0 Q0 1 1 0.5 t\n{line}\n")
    with pytest.raises(ValueError, match=message):
        mine(run_path=str(run))
    result, out = mine(run_path=str(run), on_bad_row="skip")
    assert [row["line"] for row in read_jsonl(out + ".rejected.jsonl")] == [2]
    assert result.report["counts"]["rejected"] == 0  # no row of the input was lost


def test_bm25_finds_shared_words_in_both_languages():
    passages = ["the river is old", "长江发源于青藏高原", "visa card for students", "黄河流经黄土高原", "..."]
    rows = bm25.Bm25(passages).search(["RIVER　water", "长江从哪里发源", "unknown", "?"], 3)
    assert rows[:, 0].tolist() == [0, 1, -1, -1]
    assert (bm25.Bm25(["?", "!"]).search(["a"], 2) == -1).all()


def test_reciprocal_rank_fusion():
    fused = fusion.fuse([np.array([[5, 3, 1]]), np.array([[3, 9, -1]])], 5)
    assert fused.tolist() == [[3, 5, 9, 1, -1]]
    fused = fusion.fuse([np.array([[7, 2]]), np.array([[2, 7]])], 1)
    assert fused.tolist() == [[2]]  # a tie goes to the lower row


def write_beir(folder: Path) -> dict[str, set[str]]:
    """The rows of mining_rows as a BEIR folder; returns each query id's forbidden texts."""
    (folder / "qrels").mkdir(parents=True)
    rows = mining_rows()
    passages = list(dict.fromkeys(text for row in rows for text in row["pos_passage"]))
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(passages)])
    queries = [*rows, {"query": "unjudged query"}]
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(queries)])
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"q{i}\td{passages.index(t)}\t1" for i, row in enumerate(rows) for t in set(row["pos_passage"])]
    (folder / "qrels" / "test.tsv").write_text("\n".join([*lines, f"q{len(rows)}\td0\t0"]))
    banned = forbidden_texts(rows)
    return {f"q{i}": banned[fold(row["query"])] for i, row in enumerate(rows)}


def test_a_beir_folder(mine, tmp_path, caplog):
    caplog.set_level("INFO")
    banned = write_beir(tmp_path / "beir")
    result, out = mine(input_data_path=str(tmp_path / "beir"), num_negatives=4)
    rows = read_jsonl(out)
    assert [row["_id"] for row in rows] == list(banned) and result.report["counts"]["input"] == 90
    assert sum(len(row["neg_passage"]) for row in rows) > 100
    for row in rows:
        assert not {fold(text) for text in row["neg_passage"]} & banned[row["_id"]]
    with pytest.raises(FileNotFoundError, match="the splits there are test"):
        mine(input_data_path=str(tmp_path / "beir"), split="dev")
    with open(tmp_path / "beir" / "qrels" / "test.tsv", "a") as stream:
        stream.write("\nq0\tgone\t1\nq90\tmissing\t2\n")
    (tmp_path / "run.trec").write_text("q0 Q0 gone 1 0.5 t\nq0 Q0 d7 2 0.4 t\n")
    run = {"run_path": str(tmp_path / "run.trec")}
    result, out = mine(input_data_path=str(tmp_path / "beir"), num_negatives=4)
    assert read_jsonl(out) == rows and result.report["counts"]["input"] == 90
    assert "2 relevant passages are not in the corpus, and 1 queries have no other and are left out" in caplog.text
    mine(input_data_path=str(tmp_path / "beir"), num_negatives=4, **run)
    assert "run.trec: 1 of 2 lines name passages that are not searched; left out" in caplog.text


def test_own_vectors(mine, tmp_path, tiny_model):
    _, out = mine(write_corpus=True)
    expected = [row["neg_passage"] for row in read_jsonl(out)]
    _, passages = ids_of(out)
    query_encoder, passage_encoder = embed.build_encoders(scripts.build(MiningArguments, model_path=tiny_model))
    np.save(tmp_path / "q.npy", query_encoder.encode([row["query"] for row in mining_rows()]) * np.float32(3))
    np.save(tmp_path / "p.npy", passage_encoder.encode(list(passages.values())).astype(np.float64))
    own = {"embeddings_path": str(tmp_path / "q.npy"), "passage_embeddings_path": str(tmp_path / "p.npy")}
    result, out = mine(**own, model_path="./there-is-no-model")
    assert [row["neg_passage"] for row in read_jsonl(out)] == expected
    assert result.report["counts"]["encoded"] == 0
    np.save(tmp_path / "p.npy", np.ones((3, 32), np.float32))
    with pytest.raises(
        ValueError, match=r"p\.npy: has shape \[3, 32\]; expected .* for each different passage, in the order of"
    ):
        mine(**own)
    with pytest.raises(ArgumentError, match="go together"):
        mine(embeddings_path=own["embeddings_path"])


@pytest.fixture
def own(tmp_path) -> dict:
    """Options that give the rows of mining_rows vectors of their own, 21 wide."""
    rng = np.random.default_rng(3)
    rows = mining_rows()
    for name, n in (("q", len(rows)), ("p", len({text for row in rows for text in row["pos_passage"]}))):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((n, 21)).astype(np.float32))
    return {"embeddings_path": str(tmp_path / "q.npy"), "passage_embeddings_path": str(tmp_path / "p.npy")}


def test_own_vectors_stay_in_their_files(mine, own, tmp_path, monkeypatch):
    """Those of different queries too, though they are some of the file's rows, and bad rows have vectors."""
    source = write_jsonl(tmp_path / "in.json", [{"query": ""}, *mining_rows()])
    vectors = np.load(own["embeddings_path"])
    np.save(own["embeddings_path"], np.concatenate([np.ones((1, 21), np.float32), vectors]))
    seen = []
    monkeypatch.setattr(job, "Problem", lambda *given: seen.append(given) or Problem(*given))
    mine(**own, input_data_path=source, on_bad_row="skip", embedding_cache=None)
    _, queries, passages, *_ = seen[0]
    assert is_mapped(queries) and is_mapped(passages)
    texts = [fold(row["query"]) for row in mining_rows()]
    first = [texts.index(query) for query in dict.fromkeys(texts)]
    expected = vectors[first] / np.linalg.norm(vectors[first], axis=1, keepdims=True)
    np.testing.assert_allclose(queries, expected, rtol=1e-6)
    inputs = Inputs.read(scripts.build(MiningArguments, **own, input_data_path=source, on_bad_row="skip"))
    assert is_mapped(inputs.query_vectors)


def test_own_vectors_are_searched_at_the_width_that_they_are_cut_to(mine, own, tmp_path):
    options = own | {"index_factory": "IVF2,PQ2x4", "embedding_cache": None}
    with pytest.raises(ValueError, match="index_factory is 'IVF2,PQ2x4'"):  # 21 is odd
        mine(**options)
    result, _ = mine(**options, dimension=20)
    assert result.report["index"]["factory"] == "IVF2,PQ2x4"
    with pytest.raises(ValueError, match=r"dimension is 22; the vectors in .*q\.npy have only 21"):
        mine(**options, dimension=22)
    vectors = np.load(own["embeddings_path"])
    vectors[7, :20] = 0  # known only once the vectors are cut
    np.save(own["embeddings_path"], vectors)
    with pytest.raises(ValueError, match="all zeros in its first 20 dimensions"):
        mine(**own, embedding_cache=None, dimension=20)
    assert not (tmp_path / "out.json.work").exists()


def test_an_approximate_index_reports_its_recall(mine, caplog):
    exact, _ = mine()
    found, _ = mine(index_factory="IVF4,Flat", index_parameters="nprobe=4")  # every list is searched
    assert found.report["index"]["recall"] == 1.0
    assert found.negatives == exact.negatives
    found, _ = mine(index_factory="IVF8,Flat")
    assert 0 < found.report["index"]["recall"] < 1
    assert ("misses" in caplog.text) == (found.report["index"]["recall"] < 0.9)
    for options, message in (
        ({"index_factory": "IFV4,Flat"}, "index_factory is 'IFV4,Flat'; expected a faiss factory string"),
        ({"index_factory": "Flat", "index_parameters": "nprobs=2"}, "index_parameters is 'nprobs=2'"),
        ({"index_factory": "IVF9999,Flat"}, "index_factory 'IVF9999,Flat'"),
        ({"index_factory": "HNSW0"}, "index_factory is 'HNSW0', with a size of 0"),
        ({"index_factory": "IVF4,Flat", "index_parameters": "nprobe=0"}, "with 'nprobe=0'"),
    ):
        with pytest.raises(ValueError) as caught:
            mine(**options)
        assert message in str(caught.value)


def test_what_an_approximate_index_found_is_kept_for_its_own_depth_with_its_recall(mine, tmp_path):
    options = {"index_factory": "IVF8,Flat", "embedding_cache": str(tmp_path / "fresh")}
    deep, _ = mine(**options, range_for_sampling="0-60")
    first, _ = mine(**options, range_for_sampling="0-10")
    again, _ = mine(**options, range_for_sampling="0-10", relative_margin=0.4)
    searched = [result.report["counts"]["searched"] for result in (deep, first, again)]
    assert searched[0] == searched[1] > 0 and searched[2] == 0
    assert again.report["index"] == first.report["index"] and first.report["index"]["recall"] < 1
    assert deep.report["index"]["depth"] > first.report["index"]["depth"]


def test_what_fails_on_the_first_rank_fails_on_all(tmp_path):
    pairs, queries = [("a", "bc")] * 5, np.zeros((2, 4), np.float32)
    cross_encoder.rerank(LengthReranker(), pairs, Ranks(), tmp_path / "logits")
    embed.embed(Alike(), ["a"] * 5, Ranks(), tmp_path / "vectors", "texts")
    for path in tmp_path.glob("*/*/vectors"):
        path.write_bytes(b"1" * path.stat().st_size)

    class Failing:
        def search(self, queries, k):
            raise ValueError("is damaged")

    def work(ranks):
        for collective in (
            lambda: cross_encoder.rerank(
                LengthReranker(), pairs if ranks.is_first else None, ranks, tmp_path / "logits"
            ),
            lambda: embed.embed(Alike(), ["a"] * 5 if ranks.is_first else None, ranks, tmp_path / "vectors", "texts"),
            lambda: candidates._OnFirst(ranks, Failing() if ranks.is_first else None).search(queries, 3),
        ):
            with pytest.raises(ValueError, match="is damaged"):
                collective()
        return True

    assert on_ranks(2, work) == [True, True]


class Alike:
    """Gives every text the same vector."""

    dim = 2

    def description(self) -> dict:
        return {}

    def token_lengths(self, texts) -> np.ndarray:
        return np.ones(len(texts), np.int64)

    def cut(self, texts, lengths) -> Cut:
        return Cut(0, 0, 512)

    def plan(self, lengths) -> list[np.ndarray]:
        return [np.arange(len(lengths))]

    def encode_batches(self, texts, batches):
        return (np.ones((len(rows), 2), np.float32) for rows in batches)


def test_a_reranker_has_the_last_word(mine, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "reranker"
    make_tiny_bert(folder, labels=1)
    wide, _ = mine(reranker_path=str(folder), reranker_margin=-1000.0)
    assert wide.drops_by_reason["reranker_margin"] == 0 and wide.report["counts"]["reranked"] > 100
    narrow, out = mine(reranker_path=str(folder), reranker_margin=0.0, output_scores=True)
    assert narrow.drops_by_reason["reranker_margin"] > 0
    scorer = cross_encoder.Reranker(str(folder), 512)
    for row in read_jsonl(out)[:20]:
        texts = row["pos_passage"] + row["neg_passage"]
        logits = scorer.score([(row["query"], text) for text in texts])
        n = len(row["pos_passage"])
        assert len(texts) == n or logits[n:].max() <= logits[:n].min() + 1e-4
    higher, _ = mine(reranker_path=str(folder), reranker_margin=0.0, margin_positive="highest", relative_margin=None)
    lower, _ = mine(reranker_path=str(folder), reranker_margin=0.0, relative_margin=None)
    assert 0 < higher.drops_by_reason["reranker_margin"] < lower.drops_by_reason["reranker_margin"]
    assert not list(folder.glob("*.pdparams"))  # nothing is left in the user's folder
    with pytest.raises(ValueError, match="expected a reranker with one logit"):
        mine(reranker_path=tiny_model)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_cross_encoders_logits_reach_the_rows_and_a_training(tiny_model, tmp_path, nproc):
    """Two commands: mining with output_scores, backfilled passages scored too, then a training that learns from it."""
    folder, out = make_tiny_bert(tmp_path / "reranker", labels=1), tmp_path / "mined.jsonl"
    source = write_jsonl(tmp_path / "in.json", mining_rows())
    done = run_script(
        "mining_negative_samples.py", "--model_path", tiny_model, "--input_data_path", source,
        "--output_data_path", out, "--reranker_path", folder, "--output_scores", "true", "--num_negatives", "6",
        "--range_for_sampling", "0-5", "--short_rows", "backfill", "--reranker_margin", "0", nproc=nproc,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.with_name(out.name + ".report.json").read_text())
    assert report["counts"]["backfilled"] > 0 and report["output_scores"]["kind"] == "logits of the cross-encoder"
    assert report["scores"]["positives"]["max"] <= 1 < report["output_scores"]["positives"]["max"]
    scorer, rows = cross_encoder.Reranker(folder, 512), read_jsonl(out)
    for row in rows:
        logits = scorer.score([(row["query"], text) for text in row["pos_passage"] + row["neg_passage"]])
        np.testing.assert_allclose(row["pos_scores"] + row["neg_scores"], logits, atol=1e-3)
    read = training_rows.read([str(out)], None, "error", True)
    assert [sorted(scores.values()) for scores in read.scores] == [
        sorted({fold(t): s for t, s in zip(texts, scores, strict=True)}.values())
        for texts, scores in (
            (row["neg_passage"] + row["pos_passage"], row["neg_scores"] + row["pos_scores"]) for row in rows
        )
    ]
    done = run_script(
        "run_embedding.py", "--model_name_or_path", tiny_model, "--dataset_name_or_path", out, "--output_dir",
        tmp_path / "model", "--loss_type", "kl", "--group_size", "4", "--max_steps", "3", "--report_to", "none",
        "--save_strategy", "no", "--freeze_layers", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "report.json").read_text())["loss"] > 0


def test_a_killed_reranking_goes_on_where_it_stopped(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(cross_encoder, "_BATCHES_A_ROUND", 2)
    options = {"reranker_path": make_tiny_bert(tmp_path / "reranker", labels=1), "embedding_cache": None}
    _, out = mine(**options, reranker_margin=0.0)
    whole, score, calls = Path(out).read_bytes(), cross_encoder.Reranker.score, []

    def dying(self, pairs):
        calls.append(pairs)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(self, pairs)

    monkeypatch.setattr(cross_encoder.Reranker, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        mine(**options, reranker_margin=0.0)
    monkeypatch.setattr(cross_encoder.Reranker, "score", score)
    again, out = mine(**options, reranker_margin=0.0)
    assert Path(out).read_bytes() == whole and again.report["counts"]["encoded"] == 0
    options["embedding_cache"] = str(tmp_path / "fresh")
    fresh, out = mine(**options, reranker_margin=0.0)
    assert fresh.report["counts"]["reranked"] == again.report["counts"]["reranked"] + 4 * 32
    other, _ = mine(**options, reranker_margin=1.0)  # the same pairs are looked at
    assert other.report["counts"]["reranked"] == 0
    assert other.drops_by_reason["reranker_margin"] > fresh.drops_by_reason["reranker_margin"]


def test_what_is_cut_of_a_cross_encoders_pairs_is_counted(mine, tmp_path, caplog, monkeypatch):
    """With a cache, and on a second run that scores nothing, too; of many pairs it is estimated."""
    folder = make_tiny_bert(tmp_path / "reranker", labels=1)
    options = {"reranker_path": folder, "reranker_margin": -1000.0, "reranker_max_len": 16, "num_negatives": 50}
    options |= {"relative_margin": None, "positive_similarity": None, "negative_similarity": None}
    result, out = mine(**options)
    lengths = [
        len(f"{row['query']} {t}".split()) + 3
        for row in read_jsonl(out)
        for t in row["pos_passage"] + row["neg_passage"]
    ]
    assert max(lengths) > 16  # of all rows; pairs of a query that several rows ask are asked about once
    found = result.report["cut"]["pairs"]
    assert 0 < found["texts"] <= sum(n > 16 for n in lengths) and found["limit"] == 16
    assert "pairs are longer than 16 tokens" in caplog.text and "See reranker_max_len" in caplog.text
    again, _ = mine(**options)
    assert again.report["counts"]["reranked"] == 0 and again.report["cut"] == result.report["cut"]
    scorer = cross_encoder.Reranker(folder, 16)
    pairs = [("loan " * n, "card " * 3) for n in range(1, 31)]
    assert scorer.cut(pairs) == (
        sum(n + 6 > 16 for n in range(1, 31)),
        sum(max(0, n - 10) for n in range(1, 31)),
        16,
        False,
    )
    monkeypatch.setattr(encoder, "_MEASURED_TEXTS", 10)
    assert scorer.cut(pairs).is_estimated and abs(scorer.cut(pairs).texts - 20) <= 3


class LengthReranker:
    """Scores a pair by its length, as a model would by what it says."""

    def description(self) -> dict:
        return {"by": "length"}

    def score(self, pairs):
        return np.array([len(query) + len(passage) / 64 for query, passage in pairs], np.float32)


def test_logits_on_any_number_of_ranks(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [("q" * int(a), "p" * int(b)) for a, b in rng.integers(1, 60, (1000, 2))]
    for size in (1, 2, 3):

        def work(ranks, folder=tmp_path / str(size)):
            return cross_encoder.rerank(LengthReranker(), pairs if ranks.is_first else None, ranks, folder)

        (logits, n), *others = on_ranks(size, work)
        assert np.array_equal(logits, LengthReranker().score(pairs)) and n == 1000
        assert others == [(None, 1000)] * (size - 1)
        (again, n), *_ = on_ranks(size, work)
        assert np.array_equal(again, logits) and n == 0
    broken = LengthReranker()
    broken.score = lambda pairs: np.full(len(pairs), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN or infinity"):
        cross_encoder.rerank(broken, pairs, Ranks(), tmp_path / "broken")
    assert not list((tmp_path / "broken").iterdir())  # nothing of it is kept


@pytest.mark.parametrize("nproc", [2, 3])
def test_the_number_of_processes_changes_nothing(tiny_model, tmp_path, nproc):
    source = write_jsonl(tmp_path / "hot.json", hot_rows())
    options = {"mix": "hard:4,random:3,easy:3", "short_rows": "backfill", "relative_margin": 0.5, "output_scores": True}
    single = tmp_path / "single.json"
    MiningNegativeSamples(tiny_model, input_data_path=source, output_data_path=str(single), **options).mining()
    several = tmp_path / "several.json"
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--model_path={tiny_model}", f"--input_data_path={source}", f"--output_data_path={several}"]
    done = run_script("mining_negative_samples.py", *flags, nproc=nproc)
    assert done.returncode == 0, done.stdout + done.stderr
    assert several.read_bytes() == single.read_bytes()


def test_jiebas_dictionary_is_read_from_a_private_folder_only(tmp_path, monkeypatch):
    """It is loaded whoever has written it. Where the user's cache is not his alone, nothing is left behind."""
    common = tmp_path / "common"
    common.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(common))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = runtime.cache_root() / "jieba"
    with bm25._private_folder() as folder:
        assert folder == str(own) and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    with bm25._private_folder() as folder:
        assert Path(folder).parent == common
    own.rmdir()
    (tmp_path / "planted").mkdir()
    own.symlink_to(tmp_path / "planted")
    with bm25._private_folder() as folder:
        assert Path(folder).parent == common
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with bm25._private_folder() as folder:
        assert Path(folder).parent == common
    assert not list(common.iterdir())
