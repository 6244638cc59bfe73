"""What results show of themselves in a notebook: a summary, and the texts that the run wrote."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, read_jsonl, write_jsonl

from clean_query import Clean_Query
from embedding_evaluate import Embedding_Evaluation
from mining_negative_samples import MiningNegativeSamples
from utils.arguments import scripts
from utils.cleaning.result import RemovedPair
from utils.training.job import TrainingResult


@pytest.fixture
def source(tmp_path, rows):
    return write_jsonl(tmp_path / "in.json", rows)


@pytest.fixture
def clean(tmp_path, tiny_model, source):
    return lambda name="clean.json", **options: Clean_Query(
        tiny_model, input_data_path=source, output_data_path=str(tmp_path / name), similarity_threshold=0.97, **options
    ).clean()


@pytest.mark.parametrize("name", ["clean.json", "clean.json.gz"])
def test_removed_pairs_are_those_that_were_removed(name, clean, rows, tmp_path):
    reference = make_rows(20, seed=9)
    result = clean(name, reference_data_path=write_jsonl(tmp_path / "dev.json", reference))
    assert {r.reason for r in result.removed} == {"exact", "similar", "leakage"}
    files = {"leakage": reference}
    expected = [
        RemovedPair(rows[r.row]["query"], files.get(r.reason, rows)[r.kept_row]["query"], r.score, r.reason)
        for r in result.removed
    ]
    assert list(result.removed_pairs()) == expected
    assert next(result.removed_pairs()) == expected[0]
    assert repr(result) == result.summary() == repr(copy.deepcopy(result))


def mined(tiny_model, source, output, **options):
    """Some rows have too few negatives, and one has none."""
    given = {"relative_margin": 0.6, "num_negatives": 30, "range_for_sampling": "0-50", **options}
    return MiningNegativeSamples(tiny_model, input_data_path=source, output_data_path=str(output), **given).mining()


@pytest.mark.parametrize("short_rows", ["keep", "drop"])
@pytest.mark.parametrize("form", scripts.FORMATS)
@pytest.mark.parametrize("name", ["mined.json", "mined.json.gz"])
def test_negatives_of_a_row_are_found_in_every_format(name, form, short_rows, tiny_model, tmp_path):
    """Against the passages in reading order, which the numbers of negatives count."""
    rows = make_rows(60)
    for i, row in enumerate(rows):
        row["pos_passage"] += [f"{row['query']} answer {i + 60}"] * (i % 3 == 0)
        row["answer"] = "yes"
    passages = list(dict.fromkeys(text for row in rows for text in row["pos_passage"]))
    result = mined(
        tiny_model, write_jsonl(tmp_path / "in.json", rows), tmp_path / name, output_format=form, short_rows=short_rows
    )
    sizes = result.negatives.rows.sizes()
    assert 0 < (sizes < 30).sum() < 60
    for row in range(60):
        assert result.negatives_of(row) == [passages[negative.row] for negative in result.negatives[row]]
    assert result.negatives_of(-1) == result.negatives_of(59)
    with pytest.raises(IndexError):
        result.negatives_of(60)
    assert repr(result) == result.summary()


@pytest.fixture
def judged(tmp_path, tiny_model):
    def run(**options):
        rows = [{"query": row["query"], "pos_passage": row["pos_passage"]} for row in make_rows(200)]
        dev = write_jsonl(tmp_path / "dev.json", rows)
        return Embedding_Evaluation(tiny_model, dev_path=dev, output_data_path=str(tmp_path / "e.jsonl"), **options)

    return run


@pytest.mark.parametrize("metric", [None, "hit_rate@3", "ndcg@10"])
def test_misses_have_their_right_passages_and_those_found(metric, judged, tmp_path):
    """Whether the right ones were shown, found below those, or not at all."""
    result = judged(top_passages=2, metrics=["hit_rate", "ndcg"]).evaluate()
    right: dict[str, set] = {}
    for row in make_rows(200):
        right.setdefault(row["query"], set()).update(row["pos_passage"])
    rows = read_jsonl(tmp_path / "e.jsonl")
    expected = [row for row in rows if row[metric or "hit_rate@10"] == 0]
    misses = list(result.misses(metric))
    assert [miss.query for miss in misses] == [row["query"] for row in expected] and 0 < len(misses) < len(rows)
    for miss, row in zip(misses, expected, strict=True):
        assert set(miss.right) == right[miss.query] and len(miss.right) == len(set(miss.right))
        assert miss.found == [passage["text"] for passage in row["passages"]] and len(miss.found) == 2
    if metric == "hit_rate@3":
        assert any(row["right_below"] for row in expected)
    assert repr(result) == result.summary() and result == dict(result)
    with pytest.raises(ValueError, match=r"metric is 'map@9'; expected one of hit_rate@10, "):
        result.misses("map@9")


def test_texts_that_are_gone_or_replaced_are_said_at_once(clean, judged, tiny_model, source, tmp_path):
    cleaned, found = clean(), judged().evaluate()
    mining = mined(tiny_model, source, tmp_path / "mined.json", num_negatives=3)
    calls = {
        "clean.json.removed.jsonl": (cleaned.removed_pairs, clean),
        "e.jsonl": (found.misses, judged(seed=1).evaluate),
        "mined.json": (
            lambda: mining.negatives_of(int(np.argmax(mining.negatives.rows.sizes()))),
            lambda: mined(tiny_model, source, tmp_path / "mined.json", num_negatives=3, seed=1),
        ),
    }
    for name, (call, again) in calls.items():
        call()
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file; this result's texts were in it"):
            call()
        Path(tmp_path / "away").rename(tmp_path / name)
        call()
        again()
        with pytest.raises(ValueError, match="is of another run, which has replaced the files"):
            call()


def test_texts_are_read_as_they_are_asked_for(clean, monkeypatch):
    """A result holds none, and an iteration only the line that it is at."""
    result, lines = clean(), []
    from utils.files import written

    whole = written.parse_object
    monkeypatch.setattr(written, "parse_object", lambda raw, path: lines.append(raw) or whole(raw, path))
    assert len(list(itertools.islice(result.removed_pairs(), 3))) == len(lines) == 3


def test_a_training_shows_its_summary():
    about = {"seconds": {"total": 2.0}, "arguments": {"export_format": None}}
    result = TrainingResult("out", 3, 0.5, 0.25, {}, {"ndcg@10": 0.5}, about)
    assert repr(result) == result.summary() and "ndcg@10" in repr(result)
