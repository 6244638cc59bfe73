"""embedding_evaluate.py from end to end, with a tiny model, against search and judging by brute force."""

import json
import math

import numpy as np
import pytest
from conftest import FILLERS, TOPICS, read_jsonl, run_script, write_jsonl

from embedding_evaluate import Embedding_Evaluation
from utils.arguments import scripts
from utils.arguments.scripts import EvaluateArguments
from utils.encoding.embed import build_encoders
from utils.evaluation import job as evaluation_module
from utils.files import trec
from utils.process import interruption
from utils.search.scores import pair_scores

KEYS = ["hit_rate@10", "hit_rate@5", "hit_rate@3", "hit_rate@1", "mrr@10", "mrr@5", "mrr@3", "ndcg@10", "ndcg@5"]
KEYS += ["ndcg@3"]


def sentences(n: int, seed: int, words: int = 9) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(TOPICS, 2), *rng.choice(FILLERS, words)]) + f" {i}" for i in range(n)]


@pytest.fixture
def dev(tmp_path) -> dict:
    """60 rows, some with two positives, two with the same query; 80 more passages, one a positive again."""
    passages = sentences(100, seed=1)
    queries = [" ".join(passage.split()[:6]) for passage in passages[:60]]
    rows = [{"query": query, "pos_passage": [passages[i]]} for i, query in enumerate(queries)]
    for i in range(0, 60, 7):
        rows[i]["pos_passage"].append(passages[60 + i // 7])
        rows[i]["neg_passage"] = [passages[90], passages[(i + 1) % 60]]
    rows[5]["query"] = rows[4]["query"]
    negatives = [{"neg_passage": [text, passages[3]]} for text in sentences(80, seed=2)]
    return {
        "dev_path": write_jsonl(tmp_path / "dev.json", rows),
        "neg_path": write_jsonl(tmp_path / "neg.json", negatives),
        "rows": rows,
        "corpus": list(
            dict.fromkeys(
                text for row in rows + negatives for text in (*row.get("pos_passage", []), *row.get("neg_passage", []))
            )
        ),
    }


def evaluation(tiny_model, tmp_path, **options) -> Embedding_Evaluation:
    options = {"output_data_path": str(tmp_path / "out" / "eval.jsonl"), "dtype": "float32", **options}
    return Embedding_Evaluation(tiny_model, tiny_model, **options)


def expected_ranking(tiny_model, queries, corpus, **options):
    given = scripts.build(EvaluateArguments, model_path=tiny_model, dtype="float32", **options)
    given.dimension = given.dimension[0] if given.dimension else None
    query_encoder, passage_encoder = build_encoders(given)
    vectors, passages = query_encoder.encode(queries), passage_encoder.encode(corpus)
    scores = np.array([pair_scores(np.repeat(v[None], len(corpus), 0), passages) for v in vectors])
    return np.argsort(-scores, axis=1, kind="stable"), scores


@pytest.mark.parametrize("nproc", [1, 2])
def test_bm25_is_judged_instead_of_a_model(tiny_model, tmp_path, dev, nproc):
    """And its own run file, read again, gives the same values; also of queries in another order, and of others."""
    from utils.search.bm25 import Bm25

    options = {**paths(dev), "ignore_identical": True}
    names = [f"--{name}={value}" for name, value in {**options, "lexical": True, "write_trec": True}.items()]
    done = run_script("embedding_evaluate.py", *names, f"--output_data_path={tmp_path / 'bm25'}", nproc=nproc)
    assert done.returncode == 0, done.stderr
    positives: dict[str, set] = {}
    for row in dev["rows"]:
        positives.setdefault(row["query"], set()).update(row["pos_passage"])
    ranked = Bm25(dev["corpus"]).search(list(positives), len(dev["corpus"]))
    found = read_jsonl(tmp_path / "bm25")
    for entry, rows, (query, wanted) in zip(found, ranked, positives.items(), strict=True):
        texts = [dev["corpus"][row] for row in rows if row >= 0 and dev["corpus"][row] != query]
        ranks = [rank for rank, text in enumerate(texts[:10], 1) if text in wanted]
        assert entry["mrr@10"] == (1 / ranks[0] if ranks else 0.0)
        assert [passage["text"] for passage in entry["passages"]] == texts[:3]
    run = (tmp_path / "bm25.run.trec").read_text().splitlines()
    lines = [f"{line}\n" for line in ["q9999 Q0 d1 1 0.5 x", *sorted(run, key=lambda line: line[::-1])]]
    (tmp_path / "run").write_text("".join(lines))
    again = evaluation(
        tiny_model, tmp_path, **options, run_path=str(tmp_path / "run"), compare_with=tiny_model
    ).evaluate()
    report = json.loads((tmp_path / "bm25.report.json").read_text())
    assert dict(again) == {name: values["value"] for name, values in report["metrics"].items()}
    assert "encoder" not in report and again.report["comparison"]["with"] == tiny_model
    alone = evaluation(tiny_model, tmp_path, **options).evaluate()
    assert again.report["comparison"]["metrics"]["ndcg@10"]["other"] == alone["ndcg@10"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("q1 Q0 d1 1 x y", "run:1: the score is 'x'; expected a number"),
        ("q1 Q0 none 1 2 y", "run:1: unknown passage id 'none'; expected one such as 'd1'"),
        ("none Q0 d1 1 2 y", "run: no line is of a query of .*; expected ids as 'q1'"),
        ("", "run: the file is empty"),
    ],
)
def test_a_run_that_cannot_be_judged_is_refused(tiny_model, tmp_path, dev, line, expected):
    (tmp_path / "run").write_text(line and f"{line}\n")
    with pytest.raises(ValueError, match=expected):
        evaluation(tiny_model, tmp_path, **paths(dev), run_path=str(tmp_path / "run")).evaluate()
    assert not (tmp_path / "out" / "eval.jsonl").exists()


def test_what_stands_in_for_a_model_stands_alone(tiny_model, tmp_path):
    for options, expected in (
        ({"lexical": True, "run_path": "run"}, "lexical and run_path are both given"),
        ({"lexical": True, "dimension": [8]}, "dimension is given with lexical, which has no vectors"),
    ):
        with pytest.raises(scripts.ArgumentError, match=expected):
            evaluation(tiny_model, tmp_path, dev_path="dev.json", **options)


def paths(dev: dict) -> dict:
    return {name: dev[name] for name in ("dev_path", "neg_path")}


def test_queries_of_one_text_are_one_however_they_are_written(tiny_model, tmp_path):
    spellings = ["café number 1", "cafe\u0301 number 1", "ｃａｆé\u3000number １", "café  number 1"]
    rows = [{"query": query, "pos_passage": [f"answer {i}"]} for i, query in enumerate(spellings)]
    rows.append({"query": "café number ¹", "pos_passage": ["another answer"]})
    path = write_jsonl(tmp_path / "dev.json", rows)
    result = evaluation(tiny_model, tmp_path, dev_path=path).evaluate()
    counts = result.report["counts"]
    assert (counts["queries"], counts["query_rows_merged"], counts["positives"]) == (2, 3, 5)
    assert read_jsonl(tmp_path / "out" / "eval.jsonl")[0]["query"] == spellings[0]


def test_an_interrupted_search_says_that_it_begins_again(tiny_model, tmp_path, dev, monkeypatch):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_module.ShardedIndex, "of", interrupted)
    with pytest.raises(interruption.Interrupted, match="encodes nothing again, but searches from the first query on"):
        evaluation(tiny_model, tmp_path, **paths(dev)).evaluate()


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_rows_prompt_is_its_querys_template(tiny_model, tmp_path, nproc):
    """As rows that hold it already, with no template; rows of one text with two prompts are two queries."""
    texts = sentences(40, seed=3)
    prompts = ["where is the ", "", "my new "]
    rows = [{"query": texts[i % 10], "pos_passage": [texts[10 + i]], "prompt": prompts[i % 3]} for i in range(30)]
    filled = [{"query": row["prompt"] + row["query"], "pos_passage": row["pos_passage"]} for row in rows]
    path = write_jsonl(tmp_path / "a.json", rows)
    out = tmp_path / "a.jsonl"
    options = ["--model_path", tiny_model, "--dev_path", path, "--query_template", "old {text}", "--dtype", "float32"]
    done = run_script("embedding_evaluate.py", *options, "--output_data_path", out, nproc=nproc)
    assert done.returncode == 0, done.stderr
    assert nproc > 1 or "30 rows have a prompt: it stands before the query" in done.stderr
    report = json.loads(out.with_name(out.name + ".report.json").read_text())
    assert report["encoder"]["queries"]["own_prompts"] == 30
    found = read_jsonl(out)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    # An earlier run of the same queries, two of a text among them, can be compared with; of the filled ones, it cannot.
    again = evaluation(tiny_model, tmp_path, dev_path=path, query_template="{text}", compare_with=str(out)).evaluate()
    assert again.report["comparison"]["n_equal"] == 30
    assert again.report["comparison"]["settings_apart"] == ["queries: template is '{text}', the other's 'old {text}'"]
    path = write_jsonl(tmp_path / "b.json", filled)
    result = evaluation(tiny_model, tmp_path, dev_path=path, query_template="{text}").evaluate()
    expected = read_jsonl(tmp_path / "out" / "eval.jsonl")
    names = [name for name in result if name in found[0]]
    assert [[row[name] for name in names] for row in found] == [[row[name] for name in names] for row in expected]
    plain = write_jsonl(tmp_path / "plain.json", [row | {"prompt": None} for row in rows])
    other = evaluation(tiny_model, tmp_path, dev_path=plain, query_template="{text}").evaluate()
    assert other.report["counts"]["queries"] == 10 and dict(other) != dict(result)


def test_a_prompt_or_type_without_a_meaning_is_said(tiny_model, tmp_path, caplog):
    rows = [{"query": f"q{i}", "pos_passage": ["p"], "prompt": "x", "type": "symmetric_class"} for i in range(3)]
    rows.append({"query": "r", "pos_passage": ["p"], "prompt": 7, "type": ["odd"]})
    path = write_jsonl(tmp_path / "dev.json", rows)
    evaluation(tiny_model, tmp_path, dev_path=path, lexical=True).evaluate()
    assert "3 rows have a prompt, which is not used: no query is encoded" in caplog.text
    assert "warning: 1 rows have a prompt that is not a string" in caplog.text
    assert "warning: 4 rows have a type (symmetric_class, ['odd']), which only training uses" in caplog.text


def test_values_against_brute_force(tiny_model, tmp_path, dev):
    result = evaluation(tiny_model, tmp_path, **paths(dev)).evaluate()
    assert list(result) == KEYS
    positives: dict[str, set] = {}
    for row in dev["rows"]:
        positives.setdefault(row["query"], set()).update(row["pos_passage"])
    assert len(positives) == 59
    order, _ = expected_ranking(tiny_model, list(positives), dev["corpus"])
    total = dict.fromkeys(KEYS, 0.0)
    for ranking, wanted in zip(order, positives.values(), strict=True):
        hits = [dev["corpus"][row] in wanted for row in ranking]
        for key in KEYS:
            metric, _, k = key.partition("@")
            top = hits[: int(k)]
            ideal = sum(1 / math.log2(i + 2) for i in range(min(len(wanted), int(k))))
            total[key] += {
                "hit_rate": any(top),
                "mrr": 1 / (top.index(True) + 1) if any(top) else 0,
                "ndcg": sum(hit / math.log2(i + 2) for i, hit in enumerate(top)) / ideal,
            }[metric]
    assert result == pytest.approx({key: value / 59 for key, value in total.items()}, abs=1e-12)
    report = json.loads((tmp_path / "out" / "eval.jsonl.report.json").read_text())
    assert report == result.report
    assert set(report["seconds"]) == {"read", "encode", "search", "write", "total"}
    counts = result.report["counts"]
    assert (counts["query_rows"], counts["queries"], counts["query_rows_merged"]) == (60, 59, 1)
    assert counts["passages"] == len(dev["corpus"]) and counts["passages_merged"] > 80
    for key in KEYS:
        interval = result.report["metrics"][key]
        assert interval["low"] <= interval["value"] == result[key] <= interval["high"]
    lines = read_jsonl(tmp_path / "out" / "eval.jsonl")
    assert [np.mean([line[key] for line in lines]) for key in KEYS] == pytest.approx(list(result.values()))
    assert [p["text"] for p in lines[9]["passages"]] == [dev["corpus"][row] for row in order[9, :3]]
    assert not list((tmp_path / "out").glob("*.work"))


def test_processes_agree(tiny_model, tmp_path, dev):
    """2 and 3 processes against 1: the same files, the same report but for times."""
    options = {"dimension": [16, 8], "write_trec": True, "ignore_identical": True, **paths(dev)}
    contents, reports = [], []
    for nproc in (1, 2, 3):
        output = tmp_path / str(nproc) / "eval.jsonl"
        config = {"model_path": tiny_model, "dtype": "float32", "output_data_path": str(output), **options}
        if nproc == 1:
            result = evaluation(tiny_model, tmp_path, **options, output_data_path=str(output)).evaluate()
            assert "dimension" in result.summary()
        else:
            (tmp_path / "config.json").write_text(json.dumps(config))
            done = run_script("embedding_evaluate.py", tmp_path / "config.json", nproc=nproc)
            assert done.returncode == 0, done.stderr + done.stdout
        report = json.loads((output.parent / "eval.jsonl.report.json").read_text())
        reports.append({key: report[key] for key in ("counts", "metrics", "dimensions")})
        contents.append([(output.parent / f"eval.jsonl{suffix}").read_bytes() for suffix in ("", ".run.trec")])
    assert contents[0] == contents[1] == contents[2]
    assert reports[0] == reports[1] == reports[2]


def test_dimensions_are_cut_from_one_encoding(tiny_model, tmp_path, dev):
    result = evaluation(tiny_model, tmp_path, dimension=[4, 12], **paths(dev)).evaluate()
    assert list(result.report["dimensions"]) == ["12", "4"]
    assert result.report["counts"]["encoded"] == 59 + len(dev["corpus"])
    alone = evaluation(tiny_model, tmp_path, dimension=4, **paths(dev)).evaluate()
    curve = {key: value["value"] for key, value in result.report["dimensions"]["4"].items()}
    assert curve == alone != result
    with pytest.raises(ValueError, match=r"dimension is 33; the model .* has only 32"):
        evaluation(tiny_model, tmp_path, dimension=[8, 33], **paths(dev)).evaluate()


def test_own_vectors_need_no_model_and_the_cache_encodes_once(tiny_model, tmp_path, dev):
    cache = {"embedding_cache": str(tmp_path / "cache"), **paths(dev)}
    first = evaluation(tiny_model, tmp_path, **cache).evaluate()
    again = evaluation(tiny_model, tmp_path, **cache).evaluate()
    assert again == first and again.report["counts"]["encoded"] == 0
    given = scripts.build(EvaluateArguments, model_path=tiny_model, dtype="float32")
    query_encoder, passage_encoder = build_encoders(given)
    rows = dev["rows"] + read_jsonl(dev["neg_path"])
    passages = [text for row in rows for text in (*row.get("pos_passage", []), *row.get("neg_passage", []))]
    np.save(tmp_path / "q.npy", 3 * query_encoder.encode([row["query"] for row in dev["rows"]]).astype(np.float64))
    np.save(tmp_path / "p.npy", passage_encoder.encode(passages))
    vectors = {"query_embeddings_path": str(tmp_path / "q.npy"), "passage_embeddings_path": str(tmp_path / "p.npy")}
    own = evaluation("no such model", tmp_path, **vectors, **paths(dev)).evaluate()
    assert own == pytest.approx(dict(first), abs=1e-9)
    np.save(tmp_path / "p.npy", np.zeros((5, 32), np.float32))
    with pytest.raises(ValueError, match=r"p\.npy: has shape \[5, 32\]; expected .* for each passage in reading order"):
        evaluation("no such model", tmp_path, **vectors, **paths(dev)).evaluate()


def beir_folder(tmp_path, passages, queries, qrels):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": key, "title": "", "text": text} for key, text in passages])
    write_jsonl(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries])
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def graded(tmp_path):
    """40 passages, 12 queries, 10 of them judged with grades from -1 to 3; the last passage repeats the first."""
    passages = [(f"p{i}", text) for i, text in enumerate(sentences(40, seed=3))]
    passages.append(("p40", passages[0][1]))
    queries = [(f"q{i}", " ".join(passages[i][1].split()[:7])) for i in range(12)]
    rng = np.random.default_rng(0)
    qrels = [(f"q{i}", f"p{j}", int(rng.integers(-1, 4))) for i in range(10) for j in {i, (i * 7) % 40, i + 20}]
    return beir_folder(tmp_path, passages, queries, qrels), passages, queries, qrels


def test_beir_folder_with_grades(tiny_model, tmp_path, graded):
    folder, passages, queries, qrels = graded
    options = {"dev_path": str(folder), "k_values": [3, 10, 60], "metrics": ["ndcg", "recall", "map"]}
    result = evaluation(tiny_model, tmp_path, write_trec=True, **options).evaluate()
    assert list(result) == [f"{m}@{k}" for m in ("ndcg", "recall", "map") for k in (3, 10, 60)]
    assert result.report["counts"]["queries"] == 10 and result.report["counts"]["queries_not_judged"] == 2
    order, _ = expected_ranking(tiny_model, [text for _, text in queries[:10]], [text for _, text in passages])
    grade = {(q, p): g for q, p, g in qrels}
    total = 0.0
    for i, ranking in enumerate(order):
        gains = [max(grade.get((f"q{i}", passages[row][0]), 0), 0) for row in ranking]
        best = sorted(gains, reverse=True)[:3]
        ideal = sum(g / math.log2(rank + 2) for rank, g in enumerate(best))
        total += sum(g / math.log2(rank + 2) for rank, g in enumerate(gains[:3])) / ideal if ideal else 0
    assert result["ndcg@3"] == pytest.approx(total / 10, abs=1e-12)
    run = [line.split() for line in (tmp_path / "out" / "eval.jsonl.run.trec").read_text().splitlines()]
    assert [line[2] for line in run[:41]] == [passages[row][0] for row in order[0]]
    scores = np.array([float(line[4]) for line in run], np.float32).reshape(10, 41)
    assert (np.diff(scores, axis=1) < 0).all()
    written = [line.split() for line in (tmp_path / "out" / "eval.jsonl.qrels.trec").read_text().splitlines()]
    assert {(q, p): int(g) for q, _, p, g in written} == grade
    merged = evaluation(tiny_model, tmp_path, merge_equal_texts=True, **options).evaluate()
    assert merged.report["counts"]["passages"] == 40 and merged.report["counts"]["passages_merged"] == 1


def test_a_corpus_file_says_what_is_in_the_corpus(tiny_model, tmp_path, caplog):
    texts = sentences(30, seed=4)
    rows = [{"query": texts[i], "pos_passage": [texts[i], texts[i + 10]]} for i in range(10)]
    corpus = [
        {"neg_passage": texts[:5], "title": "of a row that holds several"},
        *(dict(zip(("title", "text"), t.split(" ", 1), strict=True)) for t in texts[5:15]),
    ]
    options = {
        "dev_path": write_jsonl(tmp_path / "dev.jsonl", rows),
        "corpus_path": write_jsonl(tmp_path / "corpus.jsonl", corpus),
        "metrics": ["hit_rate", "recall"],
        "k_values": [1, 15, 99],
    }
    with caplog.at_level("INFO", "utils"):
        result = evaluation(tiny_model, tmp_path, **options).evaluate()
    assert "cut-offs larger than the corpus of 15 passages: 99" in caplog.text
    counts = result.report["counts"]
    assert (counts["passages"], counts["positives"], counts["positives_not_in_corpus"]) == (15, 20, 5)
    assert result["recall@99"] == result["recall@15"] == 15 / 20
    # Each query's own text is in the corpus and comes first, until it is ignored.
    assert result["hit_rate@1"] >= 0.9
    ignoring = evaluation(tiny_model, tmp_path, ignore_identical=True, **options).evaluate()
    line = read_jsonl(tmp_path / "out" / "eval.jsonl")[0]
    assert rows[0]["query"] not in [p["text"] for p in line["passages"]] and line["relevant"] == 1
    shallow = {"k_values": [1], "top_passages": 7}
    assert evaluation(tiny_model, tmp_path, **options | shallow).evaluate()["hit_rate@1"] == result["hit_rate@1"]
    assert {len(line["passages"]) for line in read_jsonl(tmp_path / "out" / "eval.jsonl")} == {7}
    assert ignoring.report["counts"]["passages_ignored"] == 10
    own = [{"query": row["query"], "pos_passage": [row["query"]]} for row in rows]
    options["dev_path"] = write_jsonl(tmp_path / "own.jsonl", own)
    with pytest.raises(ValueError, match="has a positive besides passages equal to itself"):
        evaluation(tiny_model, tmp_path, ignore_identical=True, **options).evaluate()


def test_compare_with_a_model_or_its_file(tiny_model, tmp_path, dev):
    plain = evaluation(tiny_model, tmp_path, output_data_path=str(tmp_path / "a.jsonl"), **paths(dev)).evaluate()
    options = {"dimension": 3, "resamples": 200, **paths(dev)}
    by_file = evaluation(tiny_model, tmp_path, compare_with=str(tmp_path / "a.jsonl"), **options).evaluate()
    compared = by_file.report["comparison"]
    for key in KEYS:
        test = compared["metrics"][key]
        assert test["other"] == pytest.approx(plain[key])
        assert test["difference"] == pytest.approx(by_file[key] - plain[key])
        assert test["low"] <= test["difference"] <= test["high"] and 0 < test["p_value"] <= 1
    assert compared["n_won"] + compared["n_lost"] + compared["n_equal"] == 59
    worst = compared["lost_most"][0]
    assert worst["other"] - worst["this"] == max(c["other"] - c["this"] for c in compared["lost_most"]) > 0
    assert "p-value" in by_file.summary() and "lost most" in by_file.summary()
    same = evaluation(tiny_model, tmp_path, compare_with=tiny_model, **paths(dev)).evaluate()
    assert {test["difference"] for test in same.report["comparison"]["metrics"].values()} == {0.0}
    assert {test["p_value"] for test in same.report["comparison"]["metrics"].values()} == {1.0}


def test_metrics_that_both_runs_have_are_compared_and_the_others_named(tiny_model, tmp_path, dev):
    earlier = str(tmp_path / "a.jsonl")
    options = {"metrics": ["recall", "ndcg", "mrr"], "k_values": [3, 7]}
    evaluation(tiny_model, tmp_path, output_data_path=earlier, **paths(dev) | options).evaluate()
    options = {"metrics": ["mrr", "ndcg", "map"], "k_values": [5, 3], "dimension": 3}
    full = evaluation(tiny_model, tmp_path, compare_with=tiny_model, **paths(dev) | options).evaluate()
    found = evaluation(tiny_model, tmp_path, compare_with=earlier, **paths(dev) | options).evaluate()
    assert found == full
    compared, whole = found.report["comparison"], full.report["comparison"]
    assert whole["not_compared"] == {"this": [], "other": []} and "not compared" not in full.summary()
    assert compared["metrics"].keys() == {"mrr@3", "ndcg@3"} and compared["changes_by"] == "ndcg@3"
    rows, theirs = read_jsonl(tmp_path / "out" / "eval.jsonl"), {row["query"]: row for row in read_jsonl(earlier)}
    for name, test in compared["metrics"].items():
        assert test["other"] == pytest.approx(np.mean([row[name] for row in theirs.values()]))
        differences = [row[name] - theirs[row["query"]][name] for row in rows]
        assert test["difference"] == pytest.approx(np.mean(differences))
    line = "not compared: only this has mrr@5, ndcg@5, map@5, map@3; only other has recall@3, recall@7, ndcg@7, mrr@7"
    assert line in found.summary()


def test_a_comparison_names_the_settings_in_which_the_runs_encode_differently(tiny_model, tmp_path, dev):
    earlier = str(tmp_path / "short.jsonl")
    evaluation(
        tiny_model, tmp_path, output_data_path=earlier, max_src_len=8, template="the {text}", **paths(dev)
    ).evaluate()
    compared = evaluation(tiny_model, tmp_path, compare_with=earlier, max_src_len=8, **paths(dev)).evaluate()
    apart = compared.report["comparison"]["settings_apart"]
    assert apart == [f"{side}: template is '{{text}}', the other's 'the {{text}}'" for side in ("queries", "passages")]
    longer = evaluation(tiny_model, tmp_path, compare_with=earlier, template="the {text}", **paths(dev)).evaluate()
    assert "passages: max_src_len is 64, the other's 8" in longer.summary()
    same = evaluation(tiny_model, tmp_path, compare_with=tiny_model, **paths(dev)).evaluate()
    assert same.report["comparison"]["settings_apart"] == [] and "differently" not in same.summary()


def test_texts_beyond_the_limit_are_counted(tiny_model, tmp_path, dev, caplog):
    options = {"max_src_len": 8, "embedding_cache": str(tmp_path / "cache"), **paths(dev)}
    lengths = [len(text.split()) + 2 for text in dev["corpus"]]
    expected = {
        "texts": sum(n > 8 for n in lengths), "tokens": sum(max(0, n - 8) for n in lengths), "limit": 8,
        "is_estimated": False,
    }  # fmt: skip
    assert expected["texts"] > 100
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        found = evaluation(tiny_model, tmp_path, **options).evaluate().report["cut"]
        assert found["passages"] == expected and found["queries"]["texts"] == 0
        assert f"{expected['texts']} passages are longer than 8 tokens" in caplog.text
    whole = evaluation(tiny_model, tmp_path, **paths(dev)).evaluate().report["cut"]
    assert whole["passages"]["texts"] == 0


BAD_ROWS = [
    ('{"query": "a"}', 'dev.json:2: "pos_passage" is missing; expected'),
    ('{"query": "a", "pos_passage": []}', 'dev.json:2: "pos_passage" is an empty list'),
    ('{"query": "a", "pos_passage": 3}', 'dev.json:2: "pos_passage" is a number; expected a list'),
    ('{"query": " ", "pos_passage": ["p"]}', 'dev.json:2: "query" is empty'),
    ("{", "dev.json:2: not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_bad_rows(tmp_path, line, message):
    path = tmp_path / "dev.json"
    path.write_text('{"query": "q", "pos_passage": ["p"]}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        evaluation("no such model", tmp_path, dev_path=str(path)).evaluate()
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_set_aside(tiny_model, tmp_path, dev):
    with open(dev["dev_path"], "a") as stream:
        stream.writelines(line + "\n" for line, _ in BAD_ROWS)
    result = evaluation(tiny_model, tmp_path, on_bad_row="skip", **paths(dev)).evaluate()
    assert result.report["counts"]["query_rows"] == 65 and result.report["counts"]["rejected"] == 5
    assert len(read_jsonl(tmp_path / "out" / "eval.jsonl.rejected.jsonl")) == 5
    assert " passages, 5 bad rows left out -> " in result.summary()


def test_a_corpus_can_be_rows_of_negatives_some_without_any(tiny_model, tmp_path, dev, caplog):
    caplog.set_level("INFO")
    evaluation(tiny_model, tmp_path, dev_path=dev["dev_path"]).evaluate()
    assert "all are the rows' own passages" in caplog.text
    caplog.clear()
    corpus = write_jsonl(tmp_path / "mined.jsonl", [{"query": "q", "neg": ["a lost tax"]}, {"query": "r", "neg": []}])
    evaluation(tiny_model, tmp_path, dev_path=dev["dev_path"], neg_path=corpus).evaluate()
    assert "all are the rows' own passages" not in caplog.text
    write_jsonl(tmp_path / "mined.jsonl", [{"query": "r", "neg": []}])
    with pytest.raises(ValueError, match="no passage in its 1 rows; expected rows of neg_passage, or of text"):
        evaluation(tiny_model, tmp_path, dev_path=dev["dev_path"], neg_path=corpus).evaluate()


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (
            [("q0", "p99", 1)],
            "has a positive; expected a score of at least 1 in the qrels, for a passage of the corpus",
        ),
        ([("q77", "p1", 1)], "test.tsv:2: query 'q77' is not there; expected an id of queries.jsonl"),
        ([("q0", "p1", 0)], "none of the 1 queries that test judges has a positive"),
        ([], "the file has no judgments"),
    ],
)
def test_bad_judgments(tmp_path, qrels, message):
    folder = beir_folder(tmp_path, [("p1", "one"), ("p2", "two")], [("q0", "zero")], qrels)
    with pytest.raises(ValueError) as caught:
        evaluation("no such model", tmp_path, dev_path=str(folder)).evaluate()
    assert message in str(caught.value)


def test_rows_have_no_split(dev, tmp_path):
    with pytest.raises(ValueError, match=r"dev\.json: is no folder; split goes with a BEIR folder"):
        evaluation("no such model", tmp_path, dev_path=dev["dev_path"], split="test").evaluate()


def test_no_positive_in_the_corpus(tmp_path):
    dev_path = write_jsonl(tmp_path / "dev.jsonl", [{"query": "a", "pos_passage": ["b"]}])
    corpus_path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "c"}])
    with pytest.raises(ValueError, match="none of the 1 queries has a positive in the corpus"):
        evaluation("no such model", tmp_path, dev_path=dev_path, corpus_path=corpus_path).evaluate()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "other", "ndcg@3": 1}', "query 'other' is not among this run's"),
        ('{"query": "a", "ndcg@5": 1}', "1: has ndcg@5; expected one of this run's: ndcg@3"),
        ('{"query": "a"}', "1: has no metric; expected one of this run's: ndcg@3"),
        ('{"query": "b", "ndcg@3": 1}\n{"query": "a"}', '2: "ndcg@3" is missing; expected a number from 0 to 1'),
        ('{"query": "a", "ndcg@3": 2}', '"ndcg@3" is 2; expected a number'),
        ('{"query": "a", "ndcg@3": 1, "collection": "x"}', "made from another corpus"),
        ('{"query": "a", "ndcg@3": 1}', "lacks 1 of the 2 queries, such as 'b'"),
    ],
)
def test_an_earlier_file_that_does_not_go_with_this_run(tmp_path, line, message):
    rows = [{"query": "a", "pos_passage": ["x"]}, {"query": "b", "pos_passage": ["y"]}]
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text(line + "\n")
    options = {"dev_path": write_jsonl(tmp_path / "dev.jsonl", rows), "metrics": ["ndcg"], "k_values": [3]}
    with pytest.raises(ValueError) as caught:
        evaluation("no such model", tmp_path, compare_with=str(earlier), **options).evaluate()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neg_path": "x"}, "neg_path is given without dev_path"),
        ({"metrics": ["ndgc"]}, "did you mean ndcg?"),
        ({"k_values": []}, "k_values is an empty list"),
        ({"k_values": [0]}, "k_values is 0; expected at least 1"),
        ({"query_embeddings_path": "q", "dev_path": "d"}, "expected both or neither"),
        ({"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(scripts.ArgumentError) as caught:
        Embedding_Evaluation(**options)
    assert message in str(caught.value)


def test_toy_data_is_the_default_only_without_data_of_ones_own():
    assert Embedding_Evaluation().arguments.neg_path is not None
    assert Embedding_Evaluation(dev_path="own.jsonl").arguments.neg_path is None


def test_the_shipped_config_is_the_default(tmp_path):
    shipped = scripts.parse(EvaluateArguments, ["config/embedding_evaluate.json"], "")
    assert shipped == scripts.build(EvaluateArguments)


def test_a_mistake_is_one_line(tmp_path):
    done = run_script("embedding_evaluate.py", "--dev_path", tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"embedding_evaluate.py: error: {tmp_path}/none.jsonl: no such file; expected a JSONL file"
    ]


def test_queries_of_a_beir_folder_that_repeat_another_are_counted(tmp_path, caplog):
    passages = [(f"p{i}", text) for i, text in enumerate(("card lost", "loan rate"))]
    queries = [("q0", "card"), ("q1", " ｃard"), ("q2", "loan"), ("q3", "loan")]  # q3 is not judged
    folder = beir_folder(tmp_path, passages, queries, [("q0", "p0", 1), ("q1", "p1", 1), ("q2", "p1", 1)])
    evaluation("no such model", tmp_path, dev_path=str(folder), lexical=True).evaluate()
    assert "1 of 3 queries have the text of an earlier one" in caplog.text


def test_scores_that_float32_cannot_tell_apart_keep_their_order():
    falling = trec.falling_scores(np.array([0.5, 0.5, 0.5 - 1e-12, 0.25]))
    assert (np.diff(falling) < 0).all() and falling[0] == 0.5 and falling[3] == 0.25
    assert np.abs(falling - [0.5, 0.5, 0.5, 0.25]).max() < 1e-6


def test_judged_passages_that_the_corpus_lacks_stay_in_the_denominators(tmp_path, caplog):
    """As in trec_eval, with BM25 and with the user's own vectors alike."""
    passages = [(f"p{i}", text) for i, text in enumerate(("card lost", "loan rate", "visa form"))]
    queries = [("q0", "card"), ("q1", "loan"), ("q2", "soup")]
    qrels = [("q0", "p0", 1), ("q1", "p1", 1), ("q1", "gone", 1), ("q1", "p2", 0), ("q2", "missing", 2)]
    folder = str(beir_folder(tmp_path, passages, queries, qrels))
    np.save(tmp_path / "queries.npy", np.eye(4, dtype=np.float32)[[0, 1, 3]])
    np.save(tmp_path / "passages.npy", np.eye(4, dtype=np.float32)[:3])
    vectors = {f"{name}_embeddings_path": str(tmp_path / f"{name}.npy") for name in ("query", "passage")}
    (tmp_path / "queries.npy").rename(tmp_path / "query.npy")
    (tmp_path / "passages.npy").rename(tmp_path / "passage.npy")
    for options in ({"lexical": True}, vectors):
        found = evaluation("no such model", tmp_path, dev_path=folder, metrics=["recall", "ndcg"], **options).evaluate()
        ideal = 1 + 1 / math.log2(3)
        assert found["ndcg@3"] == pytest.approx((1 + 1 / ideal + 0) / 3)
        assert found["recall@3"] == pytest.approx((1 + 0.5 + 0) / 3)
        assert found.report["counts"]["positives_not_in_corpus"] == 2 and found.report["counts"]["passages"] == 3
    assert "2 of 4 positives are not in the corpus; they stay in the denominators" in caplog.text
    # A run that finds one has found it, as in trec_eval, which knows no corpus.
    (tmp_path / "run").write_text("q0 Q0 p0 1 3 t\nq1 Q0 gone 1 3 t\nq1 Q0 p1 2 2 t\nq2 Q0 p0 1 1 t\n")
    options = {"run_path": str(tmp_path / "run"), "metrics": ["recall", "ndcg"]}
    found = evaluation("no such model", tmp_path, dev_path=folder, **options).evaluate()
    assert (found["recall@3"], found["ndcg@3"]) == pytest.approx((2 / 3, 2 / 3))


def test_the_methods_print_what_the_scripts_print(tiny_model, tmp_path, dev, capsys):
    from clean_query import Clean_Query
    from mining_negative_samples import MiningNegativeSamples

    result = evaluation(tiny_model, tmp_path, **paths(dev)).evaluate()
    assert capsys.readouterr().out == result.summary() + "\n"
    cleaned = Clean_Query(tiny_model, None, dev["dev_path"], str(tmp_path / "clean.jsonl")).clean()
    assert capsys.readouterr().out == cleaned.summary() + "\n"
    mined = MiningNegativeSamples(tiny_model, None, dev["dev_path"], str(tmp_path / "mined.jsonl"), "{text}").mining()
    assert capsys.readouterr().out == mined.summary() + "\n"
