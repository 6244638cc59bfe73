"""Training rows, the batch plan, masks and the preflight."""

import gzip
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from conftest import make_rows, write_jsonl

from utils.files.jsonl import RecordError
from utils.files.ragged import Ragged
from utils.training import batches as training_data
from utils.training import hard_batches
from utils.training.batches import Collator, ignored, preflight
from utils.training.dev import DevSet
from utils.training.plan import Example, Plan
from utils.training.rows import find_files, read


class Words:
    """A tokenizer of words."""

    pad_id = 0

    def __call__(self, texts):
        return [list(range(1, len(text.split()) + 1)) for text in texts]


def row(query, positives, negatives=(), **extra) -> dict:
    return {"query": query, "pos_passage": list(positives), "neg_passage": list(negatives), **extra}


def drawn(plan: Plan, rows) -> list[Example]:
    """The rows as a plan's first epoch sees them."""
    passages = plan._draw(0, np.array([(row, 0) for row in rows]))
    return [Example(row, int(plan.rows.query_ids[row]), own) for row, own in zip(rows, passages, strict=True)]


@pytest.fixture
def rows(tmp_path):
    """40 rows over 20 queries and 10 positives, three negatives each."""
    made = [row(f"q{i % 20}", [f"p{i % 10}"], [f"n{i}", f"n{i + 1}", f"n{i + 2}"]) for i in range(40)]
    return read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)


def test_equal_texts_share_a_number_and_positives_are_united(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [row("one  query", ["a"], ["b", "c", "c"]), row("one query", ["b", "Ａ"], ["d"]), row("two", ["c"], ["A"])],
    )
    found = read([path], None, "error", False)
    assert found.queries == ["one  query", "two"]
    assert [found.passages[i] for i in found.known_positives[0]] == ["a", "b", "Ａ"]
    # "b" is a negative of the first row, but a positive of the same query in the second.
    assert [[found.passages[i] for i in n] for n in found.negatives] == [["c"], ["d"], ["Ａ"]]
    assert found.n_false == 1


def test_flagembeddings_keys_and_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "x"}).encode()))
    found = read([str(path)], None, "error", False)
    assert (found.passages, len(found)) == (["p", "n"], 1)


def test_teacher_scores_go_with_their_passages(tmp_path):
    good = row("q", ["p"], ["n", "m"], pos_scores=[3], neg_scores=[1.5, -2])
    path = write_jsonl(tmp_path / "a.jsonl", [good])
    found = read([path], None, "error", True)
    batch = Collator(found, 3, (Words(), Words()), ("{text}", "{text}"), needs_scores=True)(
        drawn(Plan(found, 1, 3, seed=0), [0]), 0
    )
    assert sorted(batch.scores[0].tolist()) == [-2, 1.5, 3] and batch.scores[0, 0] == 3
    for bad, message in (
        ({"neg_scores": [1]}, "expected a list of 2 numbers"),
        ({"neg_scores": [1, "2"]}, "expected numbers of ordinary size"),
        ({"neg_scores": [1, 10**400]}, "expected numbers of ordinary size"),
        ({"neg_scores": None}, "pos_scores or neg_scores missing"),
    ):
        path = write_jsonl(tmp_path / "b.jsonl", [good | bad])
        with pytest.raises(RecordError, match=r"b\.jsonl:1") as caught:
            read([path], None, "error", True)
        assert message in str(caught.value)
        assert read([path], None, "error", False).scores == [{}]  # of no concern to a loss without a teacher


def test_rows_whose_scores_do_not_fit_can_be_left_out(tmp_path):
    good = row("q", ["p"], ["n"], pos_scores=[3], neg_scores=[1])
    made = [row("r", ["s"], ["t"]), good, row("u", []), row("v", ["w"], ["x"], pos_scores=[1], neg_scores=[1, 2])]
    found = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "skip", True)
    # Nothing of a row that is left out stays: no text, no known positive.
    assert (found.queries, found.passages, found.known_positives) == (["q"], ["p", "n"], [{0}])
    assert found.scores == [{0: 3.0, 1: 1.0}] and [error.line for error in found.rejected] == [1, 3, 4]
    path = write_jsonl(tmp_path / "b.jsonl", [made[0], made[3]])
    with pytest.raises(ValueError, match=r"all 2 rows are bad, the first: .*b\.jsonl:1: pos_scores or"):
        read([path], None, "skip", True)


def test_folders_hold_train_and_dev(tmp_path):
    (tmp_path / "train.json").write_text("")
    (tmp_path / "dev.json").write_text("")
    folder = str(tmp_path)
    found = find_files([folder, "x.jsonl"], None, None)
    assert found == ([f"{folder}/train.json", "x.jsonl"], [1.0, 1.0], [f"{folder}/dev.json"])
    assert find_files([folder], None, "y.jsonl").dev == ["y.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train\.json and no train/\*\.json .* if you like$"):
        find_files([f"{folder}/empty"], None, None)
    for name in "abcd":
        (tmp_path / "empty" / f"{name}.jsonl").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"it has a\.jsonl, b\.jsonl, c\.jsonl, \.\.\., which can be given by name"
    ):
        find_files([f"{folder}/empty"], None, None)


def test_folders_of_train_and_dev_files(tmp_path, caplog):
    """PaddleNLP's layout; a folder's weight holds for each of its files."""
    caplog.set_level("INFO")
    for name in ("train/b.json", "train/a.jsonl", "train/c.json.gz", "train/notes.txt", "dev/y.json", "dev/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        made = [row(f"q {name} {i}", [f"p {name} {i}"], ["n"]) for i in range(4)]
        write_jsonl(tmp_path / name, made if name[-1] != "t" else [])
    (tmp_path / "train" / "more.json").mkdir()
    folder = str(tmp_path)
    found = find_files(["z.json", folder], [2.0, 0.5], None)
    train = [f"{folder}/train/{name}" for name in ("a.jsonl", "b.json", "c.json.gz")]
    assert found == (["z.json", *train], [2.0, 0.5, 0.5, 0.5], [f"{folder}/dev/x.json", f"{folder}/dev/y.json"])
    rows = read(found.train[1:], found.weights[1:], "error", False)
    plan = Plan(rows, 3, 2, seed=0)
    sources = [rows.sources[example.row] for batch in plan.epoch(0) for example in batch]
    assert np.bincount(sources).tolist() == [2, 2, 2]
    assert DevSet.read(found.dev, None, "error").queries == [f"q dev/{n}.json {i}" for n in "xy" for i in range(4)]
    (tmp_path / "train.json").write_text("")
    assert find_files([folder], None, None).train == [f"{folder}/train.json"]
    assert f"{folder}/train.json is read, and not the files in {folder}/train" in caplog.text


def test_the_plan_does_not_depend_on_the_ranks_and_shuffles_every_epoch(rows):
    plans = [Plan(rows, 8, 3, seed=1, n_ranks=n) for n in (1, 2, 4)]
    epochs = [[[e.passages.tolist() for e in batch] for batch in plan.epoch(0)] for plan in plans]
    assert epochs[0] == epochs[1] == epochs[2]
    plan = plans[0]
    orders = [[e.row for batch in plan.epoch(number) for e in batch] for number in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40)) and orders[0] != orders[1]
    passages = [{e.row: e.passages.tolist() for batch in plan.epoch(number) for e in batch} for number in range(2)]
    assert any(passages[0][row] != passages[1][row] for row in range(40))  # negatives are drawn anew
    assert Plan(rows, 8, 3, seed=2).epoch(0)[0] != plan.epoch(0)[0]


def test_a_row_is_drawn_from_a_seed_of_its_own(tmp_path):
    """Against NumPy's generator of each row's seed, one by one."""
    made = [row(f"q{i}", [f"p{i}", f"r{i}"], [f"n{i + k}" for k in range(i % 6)]) for i in range(30)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    plan, number = Plan(rows, 8, 3, seed=5), 3
    entries = np.array([(i, copy) for i in range(30) for copy in range(2)])
    for (i, copy), found in zip(entries.tolist(), plan._draw(number, entries).tolist(), strict=True):
        rng = np.random.default_rng([5, number, i, copy])
        positive = rows.positives[i][rng.integers(2)]
        negatives = rng.permutation(rows.negatives[i])[:2].tolist()
        assert found[0] == positive and found[1 : 1 + len(negatives)] == negatives


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "1dfd22cb2a259d3f"),
        ({"hard_batches": True}, "9fda11991382d226"),
        ({"group_by_source": True, "drop_last": True}, "538ebcc33e6b7986"),
    ],
)
def test_a_seed_gives_the_batches_that_it_always_gave(tmp_path, options, expected):
    """So that a training can be gone on with, and compared with, after an update of this toolkit."""
    made = [
        row(f"q{i % 70}", [f"p{i % 50}", f"p{i % 30}"], [f"p{(i * k) % 60}" for k in range(i % 5)]) for i in range(120)
    ]
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", made[i::2]) for i in range(2)]
    rows = read(paths, [1.0, 1.5], "error", False)
    plan = Plan(rows, 8, 3, seed=7, n_ranks=2, **options)
    found = [[(e.row, e.query_id, *e.passages.tolist()) for e in batch] for batch in plan.epoch(1)]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == expected


def test_an_epoch_is_made_once(rows, monkeypatch):
    """The preflight looks at the one that training begins with."""
    made, make = [], Plan._make
    monkeypatch.setattr(Plan, "_make", lambda self, number: made.append(number) or make(self, number))
    plan = Plan(rows, 8, 2, seed=0)
    preflight(plan, (Words(), Words()), ("{text}", "{text}"), (8, 8))
    loader = training_data.Loader(plan, Collator(rows, 2, (Words(), Words()), ("{text}", "{text}")))
    for number in (0, 1):
        loader.set_epoch(number)
        assert len(list(loader)) == 5
    assert made == [0, 1] and list(plan._made) == [1]


def test_duplicates_do_not_meet_in_a_batch(tmp_path):
    made = [row(f"q{i % 25}", [f"p{i % 25 // 2}"]) for i in range(100)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    for epoch in range(3):
        batches = Plan(rows, 8, 1, seed=0).epoch(epoch)
        assert len(batches) == 13 and [len(batch) for batch in batches] == [8] * 12 + [4]
        clashes = [len(batch) - len({int(e.passages[0]) for e in batch}) for batch in batches]
        assert sum(clashes) <= 8 and max(clashes[:9]) == 0  # only the last ones cannot avoid them


def test_when_all_rows_clash_every_row_still_comes(tmp_path):
    rows = read([write_jsonl(tmp_path / "a.jsonl", [row("q", ["p"])] * 1000)], None, "error", False)
    batches = Plan(rows, 4, 1, seed=0).epoch(0)
    assert sorted(e.row for batch in batches for e in batch) == list(range(1000))


@pytest.mark.parametrize(
    ("n", "size", "ranks", "group_size", "expected"),
    [
        (10, 4, 1, 1, [4, 4, 2]),
        (9, 4, 1, 2, [4, 4, 1]),  # the row alone has negatives of its own group
        (9, 4, 1, 1, [4, 3, 2]),  # alone it would have none
        (24, 23, 1, 1, [22, 2]),
        (10, 4, 4, 2, [4, 4]),  # no batch can spare any
        (11, 4, 3, 2, [4, 4, 3]),
        (13, 6, 3, 2, [6, 4, 3]),
        (3, 2, 1, 1, [2]),
        (5, 1, 1, 1, [1] * 5),
    ],
)
def test_a_last_batch_that_is_too_small_takes_rows_from_the_one_before(tmp_path, n, size, ranks, group_size, expected):
    rows = read([write_jsonl(tmp_path / "a.jsonl", make_rows(n))], None, "error", False)
    plan = Plan(rows, size, group_size, seed=0, n_ranks=ranks)
    for number in (0, 1):
        epoch = plan.epoch(number)
        assert [len(batch) for batch in epoch] == expected and len(plan) == len(expected)
        assert len({example.row for batch in epoch for example in batch}) == sum(expected)
    assert (plan.n_rows, plan.n_left_out) == (n, n - sum(expected))
    assert len(Plan(rows, size, group_size, seed=0, drop_last=True)) == n // size


@pytest.mark.parametrize("accumulated", [1, 2, 3, 7, 99])
def test_steps_leave_no_batch_out(tmp_path, accumulated):
    """Rows are counted as they are trained, from whatever step on; a step that is passed over is not tokenised."""
    rows = read([write_jsonl(tmp_path / "a.jsonl", make_rows(23))], None, "error", False)
    plan = Plan(rows, 4, 2, seed=0)
    collate = Collator(rows, 2, (Words(), Words()), ("{text}", "{text}"))
    loader = training_data.Loader(plan, collate, accumulated)
    steps, n_rows = 0, 0
    assert loader.rows_in(0) == 0
    for number in (0, 1):
        loader.set_epoch(number)
        met = [batch for step in loader for batch in step]
        assert [batch.number for batch in met] == list(range(6 * number, 6 * (number + 1)))
        for step in loader:
            steps, n_rows = steps + 1, n_rows + sum(sum(batch.counts) for batch in step)
            assert loader.rows_in(steps) == n_rows
        assert n_rows == 23 * (number + 1) and steps == len(loader) * (number + 1)
        loader.set_epoch(number, 1)
        assert [step is None for step in loader] == [True] + [False] * (len(loader) - 1)


def test_weights_and_grouping_by_source(tmp_path):
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [row(f"{name}{i}", [f"{name}p{i}"]) for i in range(20)])
        for name in "ab"
    ]
    rows = read(paths, [0.5, 2.0], "error", False)
    plan = Plan(rows, 5, 2, seed=0, group_by_source=True)
    halves = []
    for epoch in range(2):
        batches = plan.epoch(epoch)
        met = [e.row for batch in batches for e in batch]
        assert len(plan) == len(batches) == 10 and len(met) == 50
        assert np.bincount(met, minlength=40)[20:].tolist() == [2] * 20
        assert all(len({int(rows.sources[e.row]) for e in batch}) == 1 for batch in batches)
        halves.append({row for row in met if row < 20})
    assert len(halves[0]) == 10 and halves[0] != halves[1]
    mixed = Plan(rows, 5, 2, seed=0).epoch(0)
    assert any(len({int(rows.sources[e.row]) for e in batch}) == 2 for batch in mixed)


def test_hard_batches_bring_each_others_negatives_together(tmp_path):
    """Eight topics of eight passages, each a negative of the topic's other queries; the file is shuffled."""
    made = [
        row(f"q{topic}-{i}", [f"p{topic}-{i}"], [f"p{topic}-{j}" for j in range(8) if j != i])
        for i, topic in itertools.product(range(8), range(8))
    ]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    met = {}
    for hard in (False, True):
        plan = Plan(rows, 8, 1, seed=0, hard_batches=hard)
        batches = plan.epoch(0)
        assert sorted(e.row for batch in batches for e in batch) == list(range(64)) and len(batches) == len(plan)
        orders = [[e.row for batch in plan.epoch(epoch) for e in batch] for epoch in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        found = preflight(plan, (Words(), Words()), ("{text}", "{text}"), (64, 64), True, 1)
        met[hard] = found.facts["own_negatives_a_query_sees"]
        assert any("hard_batches" in warning for warning in found.warnings) is not hard
    assert met[False] < 2 and met[True] > 6


@pytest.mark.parametrize("seed", range(20))
def test_a_hard_batch_takes_the_example_with_the_most_links_next(seed):
    """Against gains that are counted anew for every example and every step."""
    rng = np.random.default_rng(seed)
    n, size = 40, 8
    positives, queries = rng.integers(0, 25, n), rng.integers(0, 35, n)
    negatives = [rng.permutation(30)[: rng.integers(0, 6)] for _ in range(n)]
    ordered = hard_batches.order(positives, queries, Ragged.of(negatives), size)
    assert sorted(ordered) == list(range(n))

    def link(a: int, b: int) -> float:
        """How much a's naming of b's positive counts."""
        weights = [1 / 3, 1 / 4, *(1e-5 / (rank + 3) for rank in range(2, 6))]
        return sum(weights[rank] for rank, passage in enumerate(negatives[a]) if passage == positives[b])

    left = set(range(n))
    for start in range(0, n, size):
        members: list[int] = []
        for example in ordered[start : start + size]:
            allowed = [
                e for e in left if all(positives[e] != positives[m] and queries[e] != queries[m] for m in members)
            ]
            gains = {e: sum(link(e, m) + link(m, e) for m in members) for e in allowed or left}
            if allowed:
                assert example in allowed
                assert gains[example] == pytest.approx(max(gains.values()), rel=1e-9)
            members.append(example)
            left.remove(example)


def test_hard_batches_of_rows_that_all_name_the_same_passages():
    """Few passages, many rows: what a member is linked to must not be looked through again for every row."""
    n = 20_000
    positives = np.arange(n) % 10
    negatives = [np.delete(np.arange(10), i % 10) for i in range(n)]
    ordered = np.array(hard_batches.order(positives, np.arange(n), Ragged.of(negatives), 10))
    assert np.array_equal(np.sort(ordered), np.arange(n))
    assert all(len(set(batch)) == 10 for batch in positives[ordered].reshape(-1, 10))


def test_known_positives_are_ignored_and_own_ones_are_not(tmp_path):
    made = [row("q", ["a"]), row("q", ["b"]), row("r", ["c"], ["a"]), row("s", ["A "], ["c"])]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    plan = Plan(rows, 4, 2, seed=0)
    examples = drawn(plan, range(4))
    mask = ignored(rows, examples)
    known = [{"a", "b"}, {"a", "b"}, {"c"}, {"A "}]
    for i in range(4):
        for j, passage in enumerate(p for example in examples for p in example.passages):
            text = rows.passages[passage]
            assert mask[i, j] == (text in known[i] and j != 2 * i), (i, j)


def test_missing_negatives_are_filled_with_other_queries_positives(rows, tmp_path):
    made = [row(f"q{i}", [f"p{i}"], ["n"] if i == 0 else []) for i in range(10)]
    rows = read([write_jsonl(tmp_path / "b.jsonl", made)], None, "error", False)
    for i, example in enumerate(drawn(Plan(rows, 4, 4, seed=0), range(10))):
        names = [rows.passages[p] for p in example.passages]
        assert names[0] == f"p{i}" and len(set(names)) == 4
        assert all(name == "n" if i == 0 and k == 1 else name[0] == "p" for k, name in enumerate(names))


@pytest.mark.parametrize("n_others", [300, 40, 2, 0])
def test_a_query_of_many_positives_gets_other_queries_positives(tmp_path, n_others):
    """However much of the pool is its own; its rows' own negatives come first, and once."""
    made = [row("q", [f"p{i}"], ["other0"] * (i % 2)) for i in range(200)]
    made += [row(f"q{i}", [f"other{i}"]) for i in range(n_others)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    others = {i for i, text in enumerate(rows.passages) if text.startswith("other")}
    plan = Plan(rows, 4, 4, seed=0)
    found = [example.passages[1:].tolist() for example in drawn(plan, range(200))]
    if n_others > 3:
        assert all(len(set(negatives)) == 3 and set(negatives) <= others for negatives in found)
        assert len({passage for negatives in found for passage in negatives}) > 0.6 * n_others
    elif n_others:
        assert all(set(negatives) == others for negatives in found)
    assert all(rows.passages[negatives[0]] == "other0" for negatives in found[1::2])
    backwards = drawn(Plan(rows, 4, 4, seed=0), range(199, -1, -1))  # what is drawn first changes nothing
    assert [example.passages[1:].tolist() for example in backwards] == found[::-1]


@pytest.mark.parametrize("n_others", [300, 20])
def test_random_negatives_of_a_query_cost_no_more_for_its_many_positives(tmp_path, n_others):
    class Counted(set):
        n = 0

        def __contains__(self, passage):
            Counted.n += 1
            return super().__contains__(passage)

        def __or__(self, other):
            raise AssertionError("copied for one row")

    made = [row("q", [f"p{i}"]) for i in range(200)] + [row(f"q{i}", [f"other{i}"]) for i in range(n_others)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    rows.known_positives[0] = Counted(rows.known_positives[0])
    drawn(Plan(rows, 4, 2, seed=0), range(200))
    assert Counted.n < 200 + n_others + 10 * 200


def test_each_rank_tokenises_its_part_and_masks_the_whole(rows):
    examples = Plan(rows, 7, 2, seed=0).epoch(0)[0]
    parts = [Collator(rows, 2, (Words(), Words()), ("a {text}", "{text}"), r, 3)(examples, 0) for r in range(3)]
    assert [len(part.query_tokens) for part in parts] == parts[0].counts == [3, 2, 2]
    assert [len(part.passage_tokens) for part in parts] == [6, 4, 4]
    assert all(part.ignored.shape == (7, 14) for part in parts)
    assert parts[0].query_tokens[0] == [1, 2]  # the template's word and its own
    alone = Collator(rows, 2, (Words(), Words()), ("{text}", "{text}"), 1, 3, shared=False)(examples, 0)
    assert alone.ignored.shape == (2, 4)


def test_preflight_says_what_is_wrong(tmp_path):
    made = [row(f"q{i}", ["word " * 30], ["n"] if i < 5 else []) for i in range(16)] + [row("q0", ["n"], ["m"])]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)

    def warnings(group_size, **changes):
        plan = Plan(rows, 4, group_size, seed=0)
        return preflight(plan, (Words(), Words()), ("{text}", "{text}"), (8, 16), **changes)

    found = warnings(2)
    assert "1 of the 3 passages (33.3%) are longer than max_passage_len = 16 tokens" in found.warnings[0]
    assert "their other 14 tokens are cut off" in found.warnings[0]
    assert (found.facts["passages_cut_texts"], found.facts["passages_cut_tokens"]) == (1, 14)
    assert "12 of 17 rows have fewer than 1 negatives (12 have none)" in " ".join(found.warnings)
    assert "1 negatives are named elsewhere as positives of the same query" in " ".join(found.warnings)
    assert found.facts["masked_pairs_a_batch"] > 0
    found = warnings(1)
    assert "group_size is 1, so the hard negatives of 5 rows go unused" in " ".join(found.warnings)
    facts = warnings(2, loss_takes_batch=False).facts
    assert facts["negatives_a_query_sees"] == round(5 / 17, 1)
    assert facts["own_negatives_a_query_sees"] == round(5 / 17, 1)  # the others' are drawn at random


def test_preflight_counts_the_negatives_that_a_query_sees(tmp_path):
    made = [row(f"q{i}", [f"p{i}"], [f"n{i}", f"m{i}"]) for i in range(16)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    plan = Plan(rows, 8, 3, seed=0, n_ranks=2)
    arguments = (plan, (Words(), Words()), ("{text}", "{text}"), (8, 16))
    assert preflight(*arguments).facts["negatives_a_query_sees"] == 23
    assert preflight(*arguments, n_parts=2).facts["negatives_a_query_sees"] == 11
    assert preflight(*arguments).warnings == []


@pytest.mark.parametrize(
    ("n", "weights", "options", "message"),
    [
        (3, None, {"n_ranks": 4}, "an epoch has 3 rows; expected at least 4 for a batch over 4 ranks"),
        (1, None, {"group_size": 1}, "an epoch has 1 row; expected at least 2 for a batch"),
        (40, [1e-9], {"group_size": 1}, "1 row (dataset_weights leave so few of 40); expected at least 2 for a batch"),
        (
            1,
            [1, 1],
            {"group_by_source": True, "group_size": 1},
            "1 row of one file at most, and group_by_source mixes none; expected",
        ),
        (7, None, {"drop_last": True}, "7 rows; expected at least 8 for a batch, as dataloader_drop_last leaves"),
    ],
)
def test_too_few_rows_for_a_batch(tmp_path, n, weights, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(n))
    rows = read([path] * len(weights or [1]), weights, "error", False)
    with pytest.raises(ValueError, match=re.escape(message)):
        preflight(
            Plan(rows, 8, **{"group_size": 2} | options, seed=0), (Words(), Words()), ("{text}", "{text}"), (8, 8)
        )


@pytest.mark.parametrize(
    ("made", "batch_size", "group_size", "none_seen"),
    [
        ([row("q", [f"p{i}"]) for i in range(8)], 4, 2, True),
        ([row(f"q{i}", ["p"]) for i in range(8)], 4, 2, True),
        ([row(f"q{i}", [f"p{i}"]) for i in range(8)], 1, 1, True),
        ([row("q", [f"p{i}"], ["n"]) for i in range(8)], 4, 2, False),
        ([row(f"q{i}", [f"p{i}"]) for i in range(8)], 1, 2, False),
    ],
)
def test_training_without_negatives_is_told_of(tmp_path, made, batch_size, group_size, none_seen):
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    plan = Plan(rows, batch_size, group_size, seed=0)
    found = preflight(plan, (Words(), Words()), ("{text}", "{text}"), (8, 8))
    assert any("no query sees a negative, so nothing can be learnt" in w for w in found.warnings) == none_seen


def test_losses_of_own_passages_need_negatives_in_the_rows(tmp_path):
    made = [row(f"q{i}", [f"p{i}"], [f"p{i}", f"n{i}"][: 2 * (i < 3)]) for i in range(8)]

    def looked_over(made):
        rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
        plan = Plan(rows, 4, 2, seed=0)
        return preflight(plan, (Words(), Words()), ("{text}", "{text}"), (8, 8), loss_takes_batch=False)

    assert "5 of 8 rows have fewer than 1 negatives (5 have none); this loss compares" in looked_over(made).warnings[0]
    with pytest.raises(
        ValueError, match="no row has a negative, and this loss compares a row's own passages; expected"
    ):
        looked_over(made[3:])
    with pytest.raises(ValueError, match="no row has a negative that is no positive of its query, and this loss"):
        looked_over([row(f"q{i}", [f"p{i}"], [f"p{i}"]) for i in range(8)])


def test_the_loader_numbers_batches_over_epochs(rows):
    plan = Plan(rows, 8, 2, seed=0)
    loader = training_data.Loader(plan, Collator(rows, 2, (Words(), Words()), ("{text}", "{text}")))
    assert [batch.number for (batch,) in loader] == [0, 1, 2, 3, 4]
    loader.set_epoch(2)
    assert [batch.number for (batch,) in loader] == [10, 11, 12, 13, 14]
    loader.set_epoch(1, 3)
    passed_over, rest = [], []
    for batch in loader:
        (passed_over if batch is None else rest).append(batch)
    assert len(passed_over) == 3 and [batch.number for (batch,) in rest] == [8, 9]
    loader.set_epoch(2)
    assert None not in loader


class Texts:
    """Instead of a tokenizer: the texts as they would be tokenised."""

    def __call__(self, texts):
        return list(texts)


def test_a_single_long_text_is_counted_and_many_are_estimated(tmp_path, monkeypatch):
    made = [row(f"q{i}", [f"p{i} " + "word " * (40 if i % 8 == 1 else 2)]) for i in range(64)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    plan = Plan(rows, 8, 1, seed=0)
    (found,) = preflight(plan, (Words(), Words()), ("{text}", "{text}"), (8, 16)).warnings
    assert found.startswith("8 of the 64 passages (12.5%) are longer") and "other 200 tokens" in found
    monkeypatch.setattr(training_data, "_SAMPLE_TEXTS", 22)
    (found,) = preflight(plan, (Words(), Words()), ("{text}", "{text}"), (8, 16)).warnings
    assert found.startswith("about ")


def test_a_rows_prompt_stands_in_for_the_template(tmp_path):
    made = [
        row("q0", ["p0"], ["n0"]), row("q1", ["p1"], ["n1"], prompt="find: "), row("q2", ["p2"], ["n2"], prompt=""),
        row("q3", ["p3"], ["n3"], prompt="like: ", type="symmetric_sts"),
        row("q4", ["p4"], type="symmetric_clustering"),
        row("q5", ["p5"], prompt=["no", "text"]), row("q0", ["p0"], prompt="{text} of "),
    ]  # fmt: skip
    found = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    collate = Collator(found, 2, (Texts(), Texts()), ("Q {text} Q", "P {text}"))
    batch = collate(drawn(Plan(found, 7, 2, seed=0), range(7)), 0)
    assert batch.query_tokens == ["Q q0 Q", "find: q1", "q2", "like: q3", "Q q4 Q", "Q q5 Q", "{text} of q0"]
    positives = ["P p0", "P p1", "P p2", "like: p3", "Q p4 Q", "P p5", "P p0"]
    assert batch.passage_tokens[::2] == positives and batch.passage_tokens[7] == "like: n3"
    assert (found.keys.prompts, found.keys.bad_prompts) == (4, 1)


def test_the_preflight_measures_queries_with_their_prompts(tmp_path):
    made = [row(f"q{i}", [f"p{i}"], [f"n{i}"], prompt="one two three") for i in range(9)] + [row("q", ["p"])]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    found = preflight(Plan(rows, 5, 2, seed=0), (Words(), Words()), ("x {text}", "{text}"), (2, 9))
    assert found.facts["queries_median_tokens"] == 3 and found.facts["queries_cut_share"] == 0.9


@pytest.mark.parametrize("seed", range(5))
def test_who_is_whose_negative_by_the_types(tmp_path, seed):
    """Against the rule spelt out: classes and clusters are alone with the negatives that they name themselves."""
    rng = np.random.default_rng(seed)
    types = ["normal", "only_1neg", "symmetric_sts", "symmetric_class", "symmetric_clustering", None, "other"]
    made = []
    for i in range(24):
        names = [f"n{k}" for k in rng.choice(30, rng.integers(0, 5), replace=False)]
        made.append(row(f"q{i % 20}", [f"p{i % 12}"], names, type=types[rng.integers(len(types))]))
    path = write_jsonl(tmp_path / "a.jsonl", made)
    rows = read([path], None, "error", False)
    examples, g = drawn(Plan(rows, 24, 4, seed=seed), range(24)), 4
    found = ignored(rows, examples)
    answers = {
        query: {r["pos_passage"][0] for r in made if r["query"] == query} for query in {r["query"] for r in made}
    }
    alone = [r["type"] in ("symmetric_class", "symmetric_clustering") for r in made]
    for i, asking in enumerate(made):
        for j, other in enumerate(examples):
            for place, passage in enumerate(other.passages.tolist()):
                text = rows.passages[passage]
                counts = text not in answers[asking["query"]]
                if alone[i] or alone[j]:
                    counts &= i == j and text in asking["neg_passage"]
                assert found[i, j * g + place] == (not counts and (i, 0) != (j, place))
        if asking["type"] == "only_1neg" and asking["neg_passage"]:
            assert rows.passages[examples[i].passages[1]] in asking["neg_passage"]
    n_unknown = sum(kind == "other" for kind in (r["type"] for r in made))
    assert rows.keys.unknown == n_unknown


@pytest.mark.parametrize(("group_size", "n"), [(1, 6), (2, 2)])
def test_rows_that_stand_alone_without_negatives_are_told_of(tmp_path, group_size, n):
    made = [row(f"q{i}", [f"p{i}"], ["n"] * (i > 1), type="symmetric_class") for i in range(6)] + [row("q", ["p"])]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    found = preflight(Plan(rows, 7, group_size, seed=0), (Words(), Words()), ("{text}", "{text}"), (9, 9))
    assert f"{n} rows of a type that has no in-batch negatives see no negative" in " ".join(found.warnings)


def test_one_negative_is_one_negative(tmp_path):
    """The other places of the group are filled as those of any row with too few."""
    made = [row("q", ["p"], [f"n{i}" for i in range(6)], type="only_1neg")]
    made += [row(f"q{i}", [f"p{i}"]) for i in range(30)]
    rows = read([write_jsonl(tmp_path / "a.jsonl", made)], None, "error", False)
    for seed in range(5):
        (example,) = drawn(Plan(rows, 1, 4, seed=seed), [0])
        assert [rows.passages[p][0] for p in example.passages] == ["p", "n", "p", "p"]


@pytest.mark.parametrize("name", ["a_no_in_batch_neg.jsonl", "b_no_in_batch_neg/train.jsonl"])
def test_flagembeddings_names_of_files_without_in_batch_negatives(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    path = write_jsonl(tmp_path / name, [row("q", ["p"], ["n"])])
    other = write_jsonl(tmp_path / "c.jsonl", [row("r", ["s"], ["t"])])
    assert read([path, other], None, "error", False).alone.tolist() == [True, False]
