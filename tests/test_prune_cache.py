"""A cache is made smaller by what was used the longest ago, under the feet of runs that use it."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script_env
from test_known_texts import HashingEncoder, run, some_texts

from utils import prune_cache
from utils.encoding.embed import embed
from utils.files.store import EmbeddingStore
from utils.prune_cache import prune, size_of
from utils.ranks.group import Ranks


def a_store(folder: Path, key: str, n: int = 500, hours_ago: float = 0.0, is_finished: bool = True) -> Path:
    store = EmbeddingStore(folder, key, n, 1000)
    store.open()
    store.write([(0, np.arange(n), np.ones((n, 1000), np.float32))])
    if is_finished:
        store.finish()
    store.close()
    for name in ("lock", "journal"):
        if (store.folder / name).exists():
            os.utime(store.folder / name, (time.time() - 3600 * hours_ago,) * 2)
    return store.folder


def keys(stores) -> list[str]:
    return [store.folder.name[0] for store in stores]


@pytest.fixture
def cache(tmp_path) -> Path:
    """Four stores of 2 MB, the first one used last; the last but one was not finished."""
    for hours, letter in enumerate("abcd"):
        a_store(tmp_path, letter * 32, hours_ago=hours + 1, is_finished=letter != "c")
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "removed"),
    [({"keep": 1e9}, ""), ({"keep": 7e6}, "d"), ({"keep": 5e6}, "dc"), ({"keep": 0}, "dcba"),
     ({"unused_days": 0.1}, "dc"), ({"unused_days": 1}, ""), ({"keep": 5e6, "unused_days": 1.5 / 24}, "dcb")],
)  # fmt: skip
def test_what_was_used_the_longest_ago_goes_first(cache, limits, removed):
    found = prune(cache, **limits)
    assert keys(found.removed) == list(removed)
    assert sorted(keys(found.left)) == sorted({*"abcd"} - {*removed}) and not found.in_use
    assert sorted(path.name[0] for path in cache.iterdir()) == sorted({*"abcd"} - {*removed})
    assert 2e6 <= found.removed[0].size < 2.2e6 if removed else True


def test_a_run_that_reads_a_store_or_copies_from_it_uses_it(tmp_path):
    texts = some_texts(np.random.default_rng(0), 900)
    folders = []
    for part in (texts[:300], texts[300:600], texts[600:]):
        before = {*tmp_path.iterdir()}
        run(part, tmp_path)
        folders += {*tmp_path.iterdir()} - before
    for folder in folders:
        os.utime(folder / "lock", (1e9, 1e9))
    run(texts[:300], tmp_path)
    run(texts[300:400], tmp_path)
    assert [store.folder for store in prune(tmp_path, unused_days=1).removed] == [folders[2]]


def test_a_store_in_use_stays(cache):
    filling = EmbeddingStore(cache, "c" * 32, 500, 1000)
    filling.open()
    reading = EmbeddingStore(cache, "b" * 32, 500, 1000)
    reading.open()
    vectors = reading.read()
    reading.close()
    part = vectors[7:9]
    del vectors
    found = prune(cache, keep=0)
    assert sorted(keys(found.in_use)) == ["b", "c"] == sorted(keys(found.left))
    assert part.sum() == 2000
    del part
    filling.close()
    assert sorted(keys(prune(cache, keep=0).removed)) == ["b", "c"] and not list(cache.iterdir())


def test_what_is_no_store_stays(cache, tmp_path_factory):
    (cache / "notes.txt").write_text("a user's")
    for name in ("e" * 31, "f" * 32, "neighbors-mine"):
        (cache / name / "1").mkdir(parents=True)
        (cache / name / "lock").touch()
    outside = tmp_path_factory.mktemp("outside")
    a_store(outside, "1" * 32)
    (cache / ("9" * 32)).symlink_to(outside / ("1" * 32))
    (cache / f"neighbors-{'9' * 32}").symlink_to(outside)
    before = {path.name for path in cache.iterdir()}
    assert keys(prune(cache, keep=0).removed) == ["d", "c", "b", "a"]
    assert before - {path.name for path in cache.iterdir()} == {letter * 32 for letter in "abcd"}
    assert (outside / ("1" * 32) / "vectors").exists()


def test_neighbours_go_too_and_what_a_killed_run_left(tmp_path):
    home = tmp_path / f"neighbors-{'0' * 32}"
    a_store(home, "50", hours_ago=2)
    a_store(home, "100", hours_ago=1)
    (home / ".removed-1-70").mkdir()
    (tmp_path / ".removed-1-aa").mkdir()
    assert [store.folder.name for store in prune(tmp_path, keep=3e6).removed] == ["50"]
    assert [path.name for path in home.iterdir()] == ["100"]
    assert [store.folder.name for store in prune(tmp_path, keep=0).removed] == ["100"]
    assert not list(tmp_path.iterdir())


def test_runs_under_which_the_cache_is_pruned(tmp_path):
    """Each gets its vectors, and what it holds is never removed."""
    is_done = threading.Event()
    removed = []

    def prune_on():
        while not is_done.is_set():
            removed.extend(prune(tmp_path, keep=0).removed)

    def runs(seed):
        rng = np.random.default_rng(seed)
        for _ in range(25):
            texts = some_texts(np.random.default_rng(int(rng.integers(6))), 120, pool=300)
            encoder = HashingEncoder()
            vectors, encoded, _ = embed(encoder, texts, Ranks(), tmp_path, "texts")
            assert os.path.exists(vectors.filename), "in use, and yet removed"
            assert np.array_equal(vectors, np.stack([encoder_vector(text) for text in texts]))
            assert encoded == len(encoder.encoded)

    with ThreadPoolExecutor(5) as pool:
        pruning = pool.submit(prune_on)
        try:
            list(pool.map(runs, range(4)))
        finally:
            is_done.set()
        pruning.result()
    assert removed


def encoder_vector(text: str) -> np.ndarray:
    return next(iter(HashingEncoder().encode_batches([text], [np.array([0])])))[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20e9), ("1.5 TiB", 1.5 * 2**40), ("500mb", 5e8), ("7", 7), ("7b", 7), ("2KiB", 2048), ("3G", 3e9)],
)  # fmt: skip
def test_sizes(text, size):
    assert size_of(text) == size


def command(*arguments) -> subprocess.CompletedProcess:
    given = [sys.executable, "-m", "utils.prune_cache", *map(str, arguments)]
    return subprocess.run(given, cwd=ROOT, env=script_env(), capture_output=True, text=True, check=False)


def test_the_command(cache):
    done = command(cache, "--keep", "5MB")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["removed", "2"],
        ["left", "2"],
        ["of", "these,"],
    ]
    assert sorted(path.name[0] for path in cache.iterdir()) == ["a", "b"]
    reading = EmbeddingStore(cache, "b" * 32, 500, 1000)
    vectors = reading.read()
    done = command(cache, "--unused_days", "0.01", "--keep", "1")
    assert done.returncode == 0 and "in use and stay" in done.stderr, done.stderr
    assert sorted(path.name[0] for path in cache.iterdir()) == ["b"] and len(vectors) == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--keep", "1GB"], "nowhere: no such folder; expected an embedding_cache"),
        ([".", "--keep", "much"], "--keep is 'much'; expected a size such as 20GB"),
        ([".", "--keep", "1iB"], "--keep is '1iB'; expected a size"),
        ([".", "--unused_days", "-1"], "--unused_days is '-1'; expected a number of days"),
        ([".", "--unused_days", "soon"], "--unused_days is 'soon'; expected a number of days"),
        (["."], "expected --keep SIZE, --unused_days DAYS, or both"),
        ([], "required: folder"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_cache.py", *arguments])
    with pytest.raises((ValueError, OSError), match="") as caught:
        prune_cache.main()
    assert message in str(caught.value)


def test_a_mistake_is_status_2():
    done = command("nowhere", "--keep", "1GB")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["prune_cache.py: error: nowhere: no such folder; expected an embedding_cache"]
