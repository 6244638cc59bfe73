"""Rows that are set aside as a dev set, against a check of every pair of rows across the sides."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, run_script, write_jsonl
from thread_ranks import on_ranks

from clean_query import Clean_Query
from utils.cleaning import holdout
from utils.files.jsonl import fold
from utils.files.ragged import Ragged
from utils.ranks.group import Ranks
from utils.search.scores import pair_scores

THRESHOLD = 0.97


def groups_of(n: int, related) -> set[frozenset]:
    """The groups of rows that hang together by ``related(i, j)``, one row after another."""
    left, found = set(range(n)), set()
    while left:
        group = [left.pop()]
        for row in group:
            near = {other for other in left if related(row, other)}
            left -= near
            group += near
        found.add(frozenset(group))
    return found


def random_kept(seed: int, n: int = 240) -> holdout.Kept:
    """Chains of near rows, a crowd of 40, and answers that some rows share."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, 16))
    for row in range(1, 60):
        if row % 6:
            vectors[row] = vectors[row - 1] + 0.06 * rng.standard_normal(16) * np.linalg.norm(vectors[row - 1]) / 4
    vectors[60:100] = vectors[60] + 0.05 * rng.standard_normal((40, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    answers = [sorted({*rng.integers(0, 400, rng.integers(0, 3)).tolist()}) for _ in range(n)]
    return holdout.Kept(vectors.astype(np.float32), Ragged.of(answers))


def canonical(vectors: np.ndarray) -> np.ndarray:
    """The canonical scores of all pairs of rows."""
    n = len(vectors)
    return pair_scores(np.repeat(vectors, n, axis=0), np.tile(vectors, (n, 1))).reshape(n, n)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_near_or_shared_across_the_sides(seed, size, tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "_ROWS", 100)
    monkeypatch.setattr(holdout, "_PART_ROWS", 16)
    monkeypatch.setattr(holdout, "_PART_OTHERS", 64)
    kept = random_kept(seed)
    n, scores = len(kept.vectors), canonical(kept.vectors)
    sets = [{*kept.answers[row].tolist()} for row in range(n)]

    def related(i, j):
        return scores[i, j] >= THRESHOLD or bool(sets[i] & sets[j])

    def work(ranks: Ranks):
        drawing = holdout.Drawing(0.2, seed, THRESHOLD, is_apart=False)
        return holdout.split(ranks, kept if ranks.is_first else None, drawing, tmp_path / "held")

    found, *others = on_ranks(size, work)
    assert others == [None] * (size - 1)
    held = {*found.held.tolist()}
    assert not [pair for pair in itertools.product(held, {*range(n)} - held) if related(*pair)]
    groups = groups_of(n, related)
    assert (found.n_groups, found.largest) == (len(groups), max(map(len, groups)))
    assert (found.near, found.answers) == (0, 0)
    assert len(held) == round(0.2 * n)


def test_leaks_are_counted_where_rows_were_torn_apart(tmp_path, monkeypatch):
    """By a search that does not know how the rows were drawn."""
    kept = random_kept(0)
    scores, every_third = canonical(kept.vectors), np.arange(0, len(kept.vectors), 3)
    monkeypatch.setattr(holdout, "drawn", lambda *given: every_third)
    found = holdout.split(Ranks(), kept, holdout.Drawing(0.2, 0, THRESHOLD, is_apart=False), tmp_path / "held")
    rest = np.setdiff1d(np.arange(len(scores)), every_third)
    assert found.near == int((scores[np.ix_(rest, every_third)] >= THRESHOLD).any(axis=1).sum()) > 0
    sides = [{a for row in rows for a in kept.answers[row].tolist()} for rows in (every_third, rest)]
    assert found.answers == len(sides[0] & sides[1]) > 0


def test_every_seed_draws_others_and_each_row_about_as_often():
    labels, times = np.arange(50), np.zeros(50)
    for seed in range(400):
        times[holdout.drawn(labels, 10, np.random.default_rng(seed))] += 1
    assert times.sum() == 4000 and times.min() > 40 and times.max() < 120  # 80 each, 8 standard deviation


@pytest.fixture
def job(tmp_path):
    """Cleaning at the measured threshold, where every other query is near to the one before; some share answers."""
    rows, rng = make_rows(300), np.random.default_rng(0)
    for i, row in enumerate(rows):
        shared = i // 4 if i % 8 < 4 else i
        row["pos_passage"] = [f"ａnswer {shared}", f"own {i}"] if i % 5 else [f"answer  {shared}"]
    vectors = rng.standard_normal((300, 64))
    vectors[1::2] = vectors[::2] + 0.4 * rng.standard_normal((150, 64))
    np.save(tmp_path / "v.npy", vectors.astype(np.float32))
    source, output = write_jsonl(tmp_path / "in.json", rows), tmp_path / "out.json"

    def run(**options):
        given = {"input_data_path": source, "output_data_path": str(output), "embeddings_path": run.embeddings}
        return Clean_Query(**{**given, **options}).clean()

    run.source, run.output, run.held = source, output, tmp_path / "out.json.holdout.jsonl"
    run.embeddings = str(tmp_path / "v.npy")
    return run


def test_the_two_files_have_the_kept_rows_and_share_no_answer(job):
    """With the answers of equal queries joined, which joins their groups too; answers are compared folded."""
    job()
    everything = job.output.read_bytes().splitlines()
    result = job(holdout=0.1, seed=3)
    train, dev = job.output.read_bytes().splitlines(), job.held.read_bytes().splitlines()
    assert sorted(train + dev) == sorted(everything)
    assert [line for line in everything if line in {*train}] == train  # in their order
    assert len(dev) == round(0.1 * len(everything)) == result.report["counts"]["held_out"]
    numbers = [[json.loads(line)["id"] for line in lines] for lines in (train, dev)]
    assert numbers == [result.kept_rows.tolist(), result.held_rows.tolist()]
    sides = [{fold(a) for line in lines for a in json.loads(line)["pos_passage"]} for lines in (train, dev)]
    assert not sides[0] & sides[1]
    vectors = np.load(job.embeddings)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (vectors[result.held_rows] @ vectors[result.kept_rows].T).max() < result.threshold == 0.75
    kept = np.sort(np.concatenate([result.held_rows, result.kept_rows]))
    assert (np.triu(vectors[kept] @ vectors[kept].T, 1) > result.threshold).sum() > 100
    assert result.report["holdout"]["near_duplicates_across"] == result.report["holdout"]["answers_across"] == 0
    assert "leaks, near duplicates" in result.summary() and "leaks, answers" in result.summary()
    assert job(holdout=len(dev), seed=3).held_rows.tolist() == result.held_rows.tolist()
    assert job(holdout=0.1, seed=4).held_rows.tolist() != result.held_rows.tolist()
    job()
    assert not job.held.exists()


def test_processes_set_the_same_rows_aside(tmp_path, job):
    written = []
    for nproc in (1, 2):
        output = tmp_path / f"by{nproc}.json"
        done = run_script(
            "clean_query.py", "--input_data_path", job.source, "--output_data_path", output,
            "--embeddings_path", job.embeddings, "--holdout", "0.1", nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        written.append((output.read_bytes(), Path(f"{output}.holdout.jsonl").read_bytes()))
    assert written[0] == written[1] and len(written[0][1]) > 0


def test_groups_that_are_too_large_are_said(tmp_path, tiny_model, caplog):
    rows = [{"query": row["query"] + f" {i}", "pos_passage": ["the same"]} for i, row in enumerate(make_rows(30))]
    rows += [{"query": word, "pos_passage": [word]} for word in ("loan", "card", "river")]
    options = {"input_data_path": write_jsonl(tmp_path / "in.json", rows), "similarity_threshold": 1.0}
    result = Clean_Query(tiny_model, **options, output_data_path=str(tmp_path / "out.json"), holdout=10).clean()
    assert result.held_rows.tolist() == [30, 31, 32]
    (line,) = [record.getMessage() for record in caplog.records if "holdout" in record.getMessage()]
    assert line.startswith("warning: holdout: 3 rows are set aside instead of 10: ")
    assert "the largest such group has 30 of the 33 rows" in line


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "holdout is 0.0; expected more than 0"),
        ("1.5", "holdout is 1.5; expected a share below 1, or a whole number of rows"),
        ("3", "holdout is 3; expected fewer rows than the 3 that there are"),
    ],
)
def test_sizes_that_cannot_be_are_refused(value, message, tmp_path, tiny_model):
    source = write_jsonl(tmp_path / "in.json", make_rows(3))
    done = run_script(
        "clean_query.py", "--input_data_path", source, "--output_data_path", tmp_path / "out.json",
        "--model_path", tiny_model, "--holdout", value,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
