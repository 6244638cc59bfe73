"""The cleaning job from end to end, with the tiny model, against one-by-one cleaning of its own vectors."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, make_tiny_bert, read_jsonl, run_script, write_jsonl
from test_dedup import one_by_one

from clean_query import Clean_Query
from utils.arguments import scripts
from utils.cleaning import job as cleaning
from utils.encoding.embed import build_encoders
from utils.files import report
from utils.files.jsonl import fold
from utils.process import interruption
from utils.search.scores import pair_scores

THRESHOLD = 0.97


@pytest.fixture
def job(tmp_path, rows, tiny_model):
    """A function that cleans ``rows`` with options, and the paths it uses."""
    source, output = write_jsonl(tmp_path / "in.json", rows), tmp_path / "out" / "clean.json"

    def run(**options):
        defaults = {"input_data_path": source, "output_data_path": str(output), "similarity_threshold": THRESHOLD}
        return Clean_Query(tiny_model, tiny_model, **{**defaults, **options}).clean()

    run.source, run.output = source, output
    return run


def test_the_longest_width_is_the_models(tmp_path, rows):
    """Positions that are no multiple of the padding step."""
    model = make_tiny_bert(tmp_path / "model", positions=50)
    source = write_jsonl(tmp_path / "in.json", [{"query": "card " * 100}, *rows[:5]])
    options = {"input_data_path": source, "output_data_path": str(tmp_path / "out.json")}
    assert len(Clean_Query(model, **options, similarity_threshold=1.0).clean().kept_rows) > 1


def test_without_a_threshold_it_lies_above_what_unrelated_queries_score(tmp_path, rows):
    """Random vectors about a common mean, as models give them, and about none."""
    source, rng = write_jsonl(tmp_path / "in.json", rows), np.random.default_rng(0)
    for common, expected in ((0.0, 0.75), (3.0, None)):
        vectors = rng.standard_normal((len(rows), 64)) + common
        np.save(tmp_path / "v.npy", vectors.astype(np.float32))
        result = Clean_Query(
            input_data_path=source, output_data_path=str(tmp_path / "o.json"), embeddings_path=str(tmp_path / "v.npy")
        ).clean()
        mean = result.report["unrelated_queries"]["mean"]
        assert result.threshold == (expected or round(mean + 0.85 * (1 - mean), 2))
        assert not [removed for removed in result.removed if removed.reason == "similar"]


@pytest.mark.parametrize("own", [True, False])
def test_an_interrupted_comparison_says_that_it_begins_again(job, rows, tmp_path, monkeypatch, own):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cleaning.greedy, "remove_near_duplicates", interrupted)
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((len(rows), 8), np.float32))
    kept = "" if own else "encodes nothing again, but "
    with pytest.raises(interruption.Interrupted, match=f"^the same command {kept}compares from the first row on"):
        job(**{"embeddings_path": str(tmp_path / "v.npy")} if own else {})


def test_few_queries_that_are_all_alike_are_not_taken_for_unrelated_ones(tmp_path, caplog):
    source = write_jsonl(tmp_path / "in.json", [{"query": f"the same in {n} words"} for n in range(4)])
    vectors = np.ones((4, 64)) + np.random.default_rng(0).standard_normal((4, 64)) * 0.05
    np.save(tmp_path / "v.npy", vectors.astype(np.float32))
    with caplog.at_level("INFO", "utils"):
        result = Clean_Query(
            input_data_path=source, output_data_path=str(tmp_path / "o.json"), embeddings_path=str(tmp_path / "v.npy")
        ).clean()
    assert result.threshold == 0.97 and len(result.kept_rows) == 1
    assert "4 queries are few to measure it by" in caplog.text


def test_equal_vectors_are_duplicates_at_a_threshold_of_1(tmp_path, rows):
    """Rounded to float32, a unit vector's product with itself is often a little less."""
    vectors = np.repeat(np.random.default_rng(0).standard_normal((20, 64)), 2, axis=0)
    np.save(tmp_path / "v.npy", vectors.astype(np.float32))
    source = write_jsonl(tmp_path / "in.json", [{"query": f"query {n}"} for n in range(40)])
    result = Clean_Query(
        input_data_path=source, output_data_path=str(tmp_path / "o.json"), embeddings_path=str(tmp_path / "v.npy"),
        similarity_threshold=1.0,
    ).clean()  # fmt: skip
    assert result.kept_rows.tolist() == list(range(0, 40, 2))


def test_the_closest_removals_are_shown_each_pair_once(job, rows, tmp_path):
    plain = job()
    closest = min((r for r in plain.removed if r.reason == "similar"), key=lambda r: r.score)
    rows = [*rows, rows[closest.row]]  # a copy, which goes for the same reason
    write_jsonl(tmp_path / "more.json", rows)
    result = job(input_data_path=str(tmp_path / "more.json"))
    texts = [row["query"] for row in rows]
    pairs = {(r.score, texts[r.row], texts[r.kept_row]) for r in result.removed if r.reason == "similar"}
    shown = [(pair["cosine"], pair["query"], pair["kept_query"]) for pair in result.report["closest_removals"]]
    assert [pair[0] for pair in shown[:5]] == sorted(pair[0] for pair in pairs)[:5]
    assert len({*shown}) == len(shown) <= 7 and {*shown} <= pairs
    assert f"  {shown[0][0]:.4f}  " in result.summary() and "leakage" not in result.summary()


def vectors_of(texts, model):
    encoder, _ = build_encoders(scripts.build(scripts.CleanArguments, model_path=model))
    return encoder.encode(texts)


def test_kept_rows_are_those_of_one_by_one_cleaning(job, rows, tiny_model):
    result = job()
    queries = [row["query"] for row in rows]
    unique = list(dict.fromkeys(queries))
    kept, _ = one_by_one(vectors_of(unique, tiny_model), THRESHOLD)
    assert result.kept_rows.tolist() == [queries.index(unique[i]) for i in kept]

    source = Path(job.source).read_bytes().splitlines()
    assert job.output.read_bytes().splitlines() == [source[row] for row in result.kept_rows]


def test_every_removed_row_names_a_kept_row_that_reaches_the_threshold(job, rows, tiny_model):
    result = job()
    kept_lines = {row + 1 for row in result.kept_rows}
    removed = read_jsonl(f"{job.output}.removed.jsonl")
    assert len(removed) + len(kept_lines) == len(rows)
    assert {entry["reason"] for entry in removed} == {"exact", "similar"}
    vectors = vectors_of([row["query"] for row in rows], tiny_model)
    for entry in removed:
        assert entry["row"] == rows[entry["line"] - 1]
        assert entry["kept_line"] in kept_lines
        assert entry["kept_query"] == rows[entry["kept_line"] - 1]["query"]
        assert entry["cosine"] >= THRESHOLD
        if entry["reason"] == "exact":
            assert fold(entry["row"]["query"]) == fold(entry["kept_query"])
        else:
            cosine = vectors[entry["line"] - 1] @ vectors[entry["kept_line"] - 1]
            assert entry["cosine"] == pytest.approx(cosine, abs=1e-4)


def test_report_balances_and_says_what_was_done(job, rows):
    result = job()
    report = json.loads((job.output.parent / "clean.json.report.json").read_text())
    assert report == result.report
    assert set(report["seconds"]) == {"read", "encode", "dedup", "write", "total"}
    counts = report["counts"]
    assert counts["input"] == len(rows)
    parts = ("kept", "removed_exact", "removed_similar", "removed_leakage", "rejected")
    assert sum(counts[part] for part in parts) == len(rows)
    assert report["arguments"]["similarity_threshold"] == THRESHOLD
    assert {"seconds", "texts_per_second", "peak_memory_bytes", "world_size", "versions"} <= set(report)
    written = sorted(path.name for path in job.output.parent.iterdir())
    assert written == report["outputs"] == ["clean.json", "clean.json.removed.jsonl", "clean.json.report.json"]


def test_a_second_threshold_encodes_nothing(job, tmp_path):
    cache = str(tmp_path / "cache")
    assert job(embedding_cache=cache).report["counts"]["encoded"] > 0
    again = job(embedding_cache=cache, similarity_threshold=0.9)
    assert again.report["counts"]["encoded"] == 0
    plain = job(similarity_threshold=0.9)
    assert again.kept_rows.tolist() == plain.kept_rows.tolist()


def answered_rows(rows) -> list[dict]:
    """A third of the queries has one answer, a third another, and the others their own."""
    answers = [["yes"], ["no", "never"], None]
    return [row | {"pos_passage": answers[i % 3] or row["pos_passage"]} for i, row in enumerate(rows)]


def test_queries_whose_answers_differ_stay_at_the_measured_threshold(job, rows, tiny_model, tmp_path, monkeypatch):
    """Against a comparison one by one, where a pair's threshold depends on its answers."""
    rows = answered_rows(rows)
    source = write_jsonl(tmp_path / "answered.json", rows)
    monkeypatch.setattr(cleaning, "_MOST_LOST", 1.0)
    monkeypatch.setattr(cleaning.thresholds, "measured", lambda unrelated: 0.9)
    result = job(input_data_path=source, similarity_threshold=None)
    usual = result.report["threshold_of_other_answers"]
    assert (result.threshold, usual) == (0.9, 0.99)
    texts = list(dict.fromkeys(fold(row["query"]) for row in rows))
    answers = {text: {a for row in rows if fold(row["query"]) == text for a in row["pos_passage"]} for text in texts}
    vectors, kept = vectors_of(texts, tiny_model), []
    for i, text in enumerate(texts):
        scores = pair_scores(np.repeat(vectors[i : i + 1], len(kept), 0), vectors[kept]) if kept else []
        limits = [0.9 if answers[text] == answers[texts[k]] else usual for k in kept]
        if not any(score >= limit for score, limit in zip(scores, limits, strict=True)):
            kept.append(i)
    assert [fold(rows[row]["query"]) for row in result.kept_rows] == [texts[i] for i in kept]
    assert len(kept) > len(job(input_data_path=source, similarity_threshold=0.9).kept_rows)


def test_answers_that_are_lost_are_counted_and_at_most_a_share_of_them(job, rows, tmp_path):
    """At the measured threshold every query's own answer stays, those of equal queries in one row."""
    source = write_jsonl(tmp_path / "in.json", rows)
    everything = {passage for row in rows for passage in row["pos_passage"]}
    for threshold, most in ((None, 0.02), (0.9, 1.0)):
        result = job(input_data_path=source, similarity_threshold=threshold)
        lost = len(everything - {passage for row in read_jsonl(job.output) for passage in row["pos_passage"]})
        found = result.report["answers"]
        assert (found["different"], found["in_no_kept_row"]) == (len(everything), lost)
        assert lost <= most * len(everything) and f"{lost:,} of {len(everything):,}" in result.summary()
    plain = result
    assert plain.report["answers"]["in_no_kept_row"] > 20
    assert plain.report["answers"]["rows_removed_for_one_without_their_answer"] == len(plain.removed)
    assert sum(entry["answer_lost"] for entry in read_jsonl(f"{job.output}.removed.jsonl")) == len(plain.removed)


def test_kept_queries_that_are_near_to_others_are_shown(job, rows, tiny_model):
    result = job(similarity_threshold=0.9)
    kept = [rows[row]["query"] for row in result.kept_rows]
    vectors = vectors_of(kept, tiny_model)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -1)
    shown = result.report["nearest_kept"]
    assert shown[0]["cosine"] == pytest.approx(scores.max(), abs=1e-6) and shown[0]["cosine"] < 0.9
    assert [pair["cosine"] for pair in shown] == sorted((pair["cosine"] for pair in shown), reverse=True)
    assert f"  {shown[0]['cosine']:.4f}  {shown[0]['query']}" in result.summary()


def test_pairs_are_cut_where_they_differ():
    same = "what are the benefits of a current account for my business " * 3
    one, other = report.differing(same + "loan", same + "card", 50)
    assert one.endswith("loan") and other.endswith("card") and len(one) <= 50 and one.startswith("…")
    assert report.differing("short", "shorter", 50) == ("short", "shorter")


def test_the_cosine_of_a_copy_in_other_letters_is_not_claimed(job, tmp_path):
    rows = [{"query": query} for query in ("a new card", "a new card", "a  new\u3000card", "ａ new card", "a ⁿew card")]
    job(input_data_path=write_jsonl(tmp_path / "in.json", rows), similarity_threshold=1.0)
    cosines = [entry["cosine"] for entry in read_jsonl(f"{job.output}.removed.jsonl")]
    assert cosines == [1.0, None, None]


def test_merge_positives(job, rows):
    result = job(merge_positives=True)
    given = {row + 1: set(rows[row]["pos_passage"]) for row in result.kept_rows}
    for entry in read_jsonl(f"{job.output}.removed.jsonl"):
        given[entry["kept_line"]] |= set(entry["row"]["pos_passage"])
    merged = read_jsonl(job.output)
    assert [set(row["pos_passage"]) for row in merged] == list(given.values())
    assert sum(len(row["pos_passage"]) for row in merged) == len(rows)
    assert [row["id"] for row in merged] == result.kept_rows.tolist()


def test_a_teachers_scores_stay_with_their_passages_when_positives_are_merged(tiny_model, tmp_path):
    def merged(*others, **of_the_removed):
        rows = [
            {
                "query": "a card",
                "pos_passage": ["p"],
                "pos_scores": [0.9],
                "neg_passage": ["n", "q"],
                "neg_scores": [1, 2],
            },
            *({"query": "a card", "pos_passage": other} for other in others),
            {"query": "a card", "pos_passage": ["p", "q"], **of_the_removed},
        ]
        source, output = write_jsonl(tmp_path / "in.json", rows), str(tmp_path / "out.json")
        Clean_Query(tiny_model, input_data_path=source, output_data_path=output, merge_positives=True).clean()
        return read_jsonl(output)[0]

    united = {"query": "a card", "pos_passage": ["p", "q"], "neg_passage": ["n"], "neg_scores": [1]}
    assert merged(pos_scores=[0.5, 0.7]) == united | {"pos_scores": [0.9, 0.7]}
    assert merged() == merged(pos_scores=[0.5]) == united
    # A score counts whichever of the rows with that passage has it.
    assert merged(["q"], pos_scores=[0.5, 0.7]) == united | {"pos_scores": [0.9, 0.7]}


def test_leaks_are_removed_whatever_else_they_are(job, rows, tmp_path, tiny_model):
    reference = [{"query": f" {rows[3]['query']}  "}, {"query": "a new shirt where is"}]
    result = job(reference_data_path=write_jsonl(tmp_path / "dev.json", reference))
    removed = read_jsonl(f"{job.output}.removed.jsonl")
    leaks = {entry["line"] - 1 for entry in removed if entry["reason"] == "leakage"}
    vectors = vectors_of([row["query"] for row in rows], tiny_model)
    close = vectors @ vectors_of([reference[1]["query"]], tiny_model)[0] >= THRESHOLD
    close |= vectors @ vectors_of([rows[3]["query"]], tiny_model)[0] >= THRESHOLD
    assert leaks == set(np.flatnonzero(close))
    assert re.search(rf"removed, leakage +{len(leaks)}\n", result.summary())
    for entry in removed:
        names = {"reference_line", "reference_query"} if entry["reason"] == "leakage" else {"kept_line", "kept_query"}
        assert entry.keys() == {"line", "row", "cosine", "reason", "answer_lost"} | names
        if entry["reason"] == "leakage":
            assert entry["reference_query"] == reference[entry["reference_line"] - 1]["query"]
    assert 3 in leaks
    rest = [i for i in range(len(rows)) if i not in leaks]
    texts = list(dict.fromkeys(rows[i]["query"] for i in rest))
    kept, _ = one_by_one(vectors_of(texts, tiny_model), THRESHOLD)
    assert [rows[i]["query"] for i in result.kept_rows] == [texts[i] for i in kept]


def test_target_size(job):
    result = job(target_size=100)
    assert len(result.kept_rows) <= 100
    more = job(similarity_threshold=round(result.threshold + 1e-4, 4))
    assert len(more.kept_rows) > 100


def test_a_target_that_asks_for_nothing_is_told_of(job, rows, caplog):
    caplog.set_level("INFO")
    result = job(target_size=9999)
    n_unique = len({row["query"] for row in rows})
    assert len(result.kept_rows) == n_unique
    assert f"target_size 9999 asks for nothing: there are {n_unique} queries" in caplog.text


@pytest.mark.parametrize("n_bare", [0, 2, 9])
def test_rows_that_later_steps_refuse_are_told_of(tiny_model, tmp_path, caplog, n_bare):
    rows = [{"query": f"how {i}", "pos": [] if i < n_bare else ["p"]} for i in range(9)]
    source = write_jsonl(tmp_path / "in.json", rows)
    Clean_Query(tiny_model, input_data_path=source, output_data_path=str(tmp_path / "out.json")).clean()
    told = f"{source}: {n_bare} of 9 rows have no positive, and mining and training will refuse those"
    assert (told in caplog.text) == ("no positive" in caplog.text) == (n_bare == 2)


def test_a_target_that_takes_unrelated_queries_is_warned_of(job, caplog):
    job(target_size=3)
    assert "what unrelated queries score with this model" in caplog.text


def test_user_vectors_replace_the_model(job, rows, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((len(rows), 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    result = job(embeddings_path=str(tmp_path / "v.npy"), similarity_threshold=0.6)
    queries = [row["query"] for row in rows]
    first = [queries.index(query) for query in dict.fromkeys(queries)]
    unit = (vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    kept, _ = one_by_one(unit[first], 0.6)
    assert result.kept_rows.tolist() == [first[i] for i in kept]


def test_bad_rows_can_be_set_aside(tmp_path, rows, tiny_model):
    lines = [json.dumps(row).encode() for row in rows[:20]]
    lines[4], lines[9] = b"{broken", b'{"query": "", "pos_passage": []}'
    (tmp_path / "in.json").write_bytes(b"\n".join(lines))
    output = tmp_path / "clean.json"
    options = {"input_data_path": str(tmp_path / "in.json"), "output_data_path": str(output)}
    with pytest.raises(ValueError, match=r"in\.json:5: not JSON .* \(on_bad_row skip leaves bad rows out\)$"):
        Clean_Query(tiny_model, **options).clean()
    assert not output.exists()
    result = Clean_Query(tiny_model, **options, on_bad_row="skip", similarity_threshold=THRESHOLD).clean()
    assert [entry["line"] for entry in read_jsonl(f"{output}.rejected.jsonl")] == [5, 10]
    assert result.report["counts"]["rejected"] == 2
    kept_ids = [row["id"] for row in read_jsonl(output)]
    removed_ids = [entry["row"]["id"] for entry in read_jsonl(f"{output}.removed.jsonl")]
    assert sorted(kept_ids + removed_ids) == [i for i in range(20) if i not in (4, 9)]


def test_texts_equal_after_folding_are_exact_copies(tmp_path, tiny_model):
    rows = [{"query": "where is my card"}, {"query": "ｗｈｅｒｅ  is my　card "}, {"query": "old soup"}]
    source, output = write_jsonl(tmp_path / "in.json", rows), str(tmp_path / "clean.json")
    Clean_Query(tiny_model, input_data_path=source, output_data_path=output, similarity_threshold=1.0).clean()
    (entry,) = read_jsonl(f"{output}.removed.jsonl")
    assert (entry["line"], entry["kept_line"], entry["reason"]) == (2, 1, "exact")


def test_a_low_threshold_is_warned_of(job, caplog):
    with caplog.at_level("WARNING"):
        job(similarity_threshold=-0.5)
    assert "what unrelated queries score with this model" in caplog.text


BAD_RUNS = {
    "missing input": (["--input_data_path", "none.json"], "none.json: no such file"),
    "a directory as input": (["--input_data_path", "."], "is a directory; expected a JSONL file"),
    "a bad row": (["--input_data_path", "bad.json"], 'bad.json:2: "pos_passage" is a number; expected a list'),
    "an empty file": (["--input_data_path", "empty.json"], "empty.json: the file has no rows"),
    "unknown argument": (["--similarity_treshold", "0.5"], "did you mean --similarity_threshold?"),
    "threshold 2": (["--similarity_threshold", "2"], "similarity_threshold is 2.0; expected at least -1.0"),
    "unwritable output": (["--output_data_path", "/proc/none/clean.json"], "cannot write there"),
    "a directory as output": (["--output_data_path", "."], "is a directory; expected a path for the output"),
    "the input as output": (["--output_data_path", "good.json"], "the output would overwrite an input"),
    "NaN vectors": (["--embeddings_path", "nan.npy"], "nan.npy: row 2 holds NaN, infinity"),
    "no such model": (["--model_path", "./none"], "./none: no such model folder"),
    "dimension too large": (["--dimension", "4096"], "dimension is 4096"),
}


@pytest.fixture
def bad_inputs(tmp_path):
    write_jsonl(tmp_path / "good.json", make_rows(3))
    write_jsonl(tmp_path / "bad.json", [{"query": "q"}, {"query": "q", "pos_passage": 3}])
    (tmp_path / "empty.json").write_bytes(b"")
    np.save(tmp_path / "nan.npy", np.array([[1, 2], [np.nan, 1], [1, 1]], np.float32))
    return tmp_path


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_mistake_gets_one_line_and_status_2(what, bad_inputs, tiny_model):
    flags, message = BAD_RUNS[what]
    base = ["--input_data_path", "good.json", "--output_data_path", "out.json", "--model_path", tiny_model]
    before = sorted(bad_inputs.iterdir())
    done = run_script("clean_query.py", *base, *flags, cwd=bad_inputs)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("clean_query.py: error: ") and message in line
    assert sorted(bad_inputs.iterdir()) == before


def test_gzip_in_and_out(tmp_path, job):
    plain = job().kept_rows
    source = tmp_path / "in.json.gz"
    source.write_bytes(gzip.compress(Path(job.source).read_bytes()))
    job(input_data_path=str(source), output_data_path=str(tmp_path / "clean.json.gz"))
    assert gzip.decompress((tmp_path / "clean.json.gz").read_bytes()) == job.output.read_bytes()
    assert len(plain) == len(job.output.read_bytes().splitlines())


def test_cosines_are_compared_whether_or_not_vectors_are_normalised(job):
    assert job(normalize=False).kept_rows.tolist() == job().kept_rows.tolist()


@pytest.mark.parametrize("with_own_vectors", [True, False])
def test_a_failure_leaves_embeddings_for_the_next_run_and_nothing_else(
    with_own_vectors, job, rows, tmp_path, monkeypatch
):
    options = {"normalize": False}
    if with_own_vectors:
        np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((len(rows), 8)))
        options = {"embeddings_path": str(tmp_path / "v.npy")}

    def fail(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("utils.cleaning.greedy.remove_near_duplicates", fail)
        with pytest.raises(KeyboardInterrupt):
            job(**options)
    left = [path.name for path in job.output.parent.rglob("*") if path.is_file()]
    assert sorted(left) == ([] if with_own_vectors else ["about.json", "lock", "lock", "texts", "vectors"])
    assert job(**options).report["counts"]["encoded"] == 0


def test_merging_changes_only_rows_that_gain_something(tmp_path, tiny_model):
    lines = [
        b'{"query": "old soup",   "n": 1.50}',
        b'{"query": "where is my card", "pos_passage": ["a"], "neg_passage": ["b", "c"]}',
        b'{"query": "where is my card", "pos_passage": ["b", "a"]}',
        b'{"query": "old  soup"}',
    ]
    (tmp_path / "in.json").write_bytes(b"\n".join(lines))
    options = {"input_data_path": str(tmp_path / "in.json"), "output_data_path": str(tmp_path / "out.json")}
    Clean_Query(tiny_model, **options, similarity_threshold=0.9999, merge_positives=True).clean()
    first, second = (tmp_path / "out.json").read_bytes().splitlines()
    assert first == lines[0]
    assert json.loads(second) == {"query": "where is my card", "pos_passage": ["a", "b"], "neg_passage": ["c"]}


def test_a_tokenizer_of_another_model_is_refused(job, tmp_path, tiny_model):
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"card": config["vocab_size"] + 5}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="expected the model's own tokenizer"):
        Clean_Query(tiny_model, str(folder), input_data_path=job.source, output_data_path=str(job.output)).clean()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "version https://git-lfs", "is no safetensors file"),
        ("config.json", '{"model_type": "bert", "hidden_size": 32}', "cannot be understood"),
        ("config.json", "[1]", "expected a JSON object"),
        ("modules.json", '["a"]', "cannot be understood"),
        ("tokenizer.json", "{}", "tokenizer.json: cannot be read"),
    ],
)
def test_damaged_models_are_named(name, content, message, job, tmp_path, tiny_model):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        Clean_Query(str(folder), input_data_path=job.source, output_data_path=str(job.output)).clean()
    assert message in str(caught.value)
    assert not job.output.parent.exists() or not list(job.output.parent.iterdir())
