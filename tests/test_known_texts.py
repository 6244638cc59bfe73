"""A text is encoded once in a cache, in whatever list it comes: lists, kills, several runs and processes."""

import hashlib
import json
import logging
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, run_script, script_command, script_env, write_jsonl

from utils.encoding import embed as embedding
from utils.encoding import known_texts
from utils.encoding.embed import embed
from utils.encoding.encoder import Cut
from utils.files.store import EmbeddingStore
from utils.kernels import onednn
from utils.process import runtime
from utils.ranks.group import Ranks


def vector_of(text: str, setting: str = "a") -> np.ndarray:
    return np.frombuffer(hashlib.sha256(f"{setting} {text}".encode()).digest()[:12], np.uint8).astype(np.float32)


class HashingEncoder:
    """Vectors that depend on the text alone; notes what it encodes."""

    dim = 12

    def __init__(self, setting="a", fail_after=None):
        self.setting, self.fail_after = setting, fail_after
        self.encoded: list[str] = []

    def description(self):
        return {"setting": self.setting}

    def token_lengths(self, texts):
        return np.array([len(text) for text in texts], np.int32)

    def cut(self, texts, lengths):
        assert list(lengths) == [len(text) for text in texts]
        return Cut(int((lengths > 5).sum()), int(lengths.sum()), 5)

    def plan(self, lengths):
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + 3] for i in range(0, len(order), 3)]

    def encode_batches(self, texts, batches):
        for rows in batches:
            if self.fail_after is not None and len(self.encoded) >= self.fail_after:
                raise KeyboardInterrupt
            self.encoded += [texts[row] for row in rows]
            yield np.stack([vector_of(texts[row], self.setting) for row in rows])


def run(texts, folder, encoder=None) -> list[str]:
    """Embed the texts, hold the vectors and counts to what they must be; returns the texts that were encoded."""
    encoder = encoder or HashingEncoder()
    vectors, encoded, cut = embed(encoder, texts, Ranks(), folder, "texts")
    expected = [vector_of(text, encoder.setting) for text in texts]
    np.testing.assert_array_equal(vectors, np.reshape(expected, (-1, encoder.dim)))
    assert encoded == len(encoder.encoded)
    assert cut == Cut(sum(len(text) > 5 for text in texts), sum(map(len, texts)), 5)
    return encoder.encoded


def some_texts(rng: np.random.Generator, n: int, pool: int = 4000) -> list[str]:
    return [f"text {number:x}" * (1 + number % 3) for number in rng.permutation(pool)[:n].tolist()]


@pytest.mark.parametrize("seed", range(8))
def test_any_lists_encode_each_text_once(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(known_texts, "_BLOCK_ROWS", int(rng.integers(1, 200)))
    seen: dict[str, set] = {"a": set(), "b": set()}
    for _ in range(12):
        setting = str(rng.choice(["a", "b"], p=[0.8, 0.2]))
        texts = some_texts(rng, int(rng.choice([0, 1, 30, 300])), pool=700)
        encoded = run(texts, tmp_path, HashingEncoder(setting))
        assert sorted(encoded) == sorted({*texts} - seen[setting])
        seen[setting] |= {*texts}
    texts = sorted(seen["a"])
    assert run(texts, tmp_path) == [] == run(texts[::-1], tmp_path) == run(texts, tmp_path)


def test_a_text_that_is_there_twice_is_found_for_both(tmp_path):
    run(["a", "b", "a"], tmp_path)
    assert run(["c", "a", "a", "b"], tmp_path) == ["c"]


def test_digests_that_share_a_half_are_different_texts(tmp_path, monkeypatch):
    whole = known_texts.digests

    def alike(texts):
        halves = np.array(whole(texts))
        halves[:, 0] //= 1 << 62
        return halves

    monkeypatch.setattr(known_texts, "digests", alike)
    rng = np.random.default_rng(1)
    for _ in range(4):
        run(some_texts(rng, 200, pool=400), tmp_path)


def test_digests_are_of_the_texts():
    texts = ["", "a", "ä", "查询", "a\0"]
    for text, halves in zip(texts, known_texts.digests(texts), strict=True):
        assert halves.tobytes() == hashlib.blake2b(text.encode(), digest_size=16).digest()
    assert known_texts.digests([]).shape == (0, 2)


@pytest.mark.parametrize("kind", ["index", "vectors", "about"])
def test_a_damaged_store_is_named_and_not_used(kind, tmp_path, caplog):
    texts = some_texts(np.random.default_rng(0), 60)
    run(texts, tmp_path)
    (folder,) = tmp_path.iterdir()
    path = folder / {"index": "texts", "vectors": "vectors", "about": "about.json"}[kind]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 if kind != "about" else 0x80
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert sorted(run(texts[1:], tmp_path)) == sorted(texts[1:])
    assert f"warning: not used: {path}: is damaged" in caplog.text


def test_a_store_that_is_being_filled_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCHES_A_ROUND", 2)
    texts = some_texts(np.random.default_rng(0), 60)
    with pytest.raises(KeyboardInterrupt):
        run(texts, tmp_path, HashingEncoder(fail_after=30))
    assert len(run(texts[::-1], tmp_path)) == 60
    assert len(run(texts, tmp_path)) == 30, "the first run has noted its rounds"


def killed(texts, folder, monkeypatch, at: int) -> bool:
    """Run in a child that ends, without a word, at its ``at``-th write; True if it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def ends(name):
            whole = getattr(os, name)

            def one(*arguments):
                nonlocal count
                count += 1
                if count > at:
                    os._exit(9)
                return whole(*arguments)

            return one

        status = 1
        try:
            for name in ("fdatasync", "fsync", "replace", "unlink", "truncate"):
                monkeypatch.setattr(os, name, ends(name))
            run(texts, folder)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("at", range(12))
def test_a_kill_at_any_point_loses_at_most_a_round(at, tmp_path, monkeypatch):
    """Of a list of which another one holds a part: before, during and after the copy, and between the rounds."""
    monkeypatch.setattr(embedding, "_BATCHES_A_ROUND", 2)
    texts = some_texts(np.random.default_rng(2), 60)
    known, new = texts[::2], texts[1::2]
    run(known, tmp_path)
    (source,) = tmp_path.iterdir()
    assert killed(texts, tmp_path, monkeypatch, at)
    journals = [path.stat().st_size // 16 * 3 for path in tmp_path.glob("*/journal")]
    partial = {*tmp_path.iterdir()} - {source}
    left = run(texts, tmp_path)
    assert len(left) == len(new) - sum(journals) if journals else {*left} <= {*new}
    assert partial <= {*tmp_path.iterdir()}
    assert run(texts[::-1], tmp_path) == []


@pytest.mark.parametrize("lost", ["copied", "half of copied", "vectors.partial"])
def test_a_broken_copy_of_a_cache_begins_again(lost, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCHES_A_ROUND", 2)
    texts = some_texts(np.random.default_rng(3), 60)
    run(texts[:20], tmp_path)
    (source,) = tmp_path.iterdir()
    with pytest.raises(KeyboardInterrupt):
        run(texts, tmp_path, HashingEncoder(fail_after=20))
    (partial,) = {*tmp_path.iterdir()} - {source}
    path = partial / lost.rpartition(" ")[2]
    content = path.read_bytes()
    path.unlink()
    if lost.startswith("half"):
        path.write_bytes(content[: len(content) // 2])
    if lost == "copied":  # nothing else can take it away, and what is left would be batches of all texts
        (partial / "journal").unlink()
    assert len(run(texts, tmp_path)) == 40


def test_runs_at_once_in_one_folder(tmp_path):
    rng = np.random.default_rng(4)
    lists = [some_texts(rng, 300, pool=500) for _ in range(6)] * 2
    with ThreadPoolExecutor(6) as pool:
        encoded = list(pool.map(lambda texts: run(texts, tmp_path), lists))
    assert {text for texts in encoded for text in texts} == {text for texts in lists for text in texts}
    assert run(sorted({text for texts in lists for text in texts}), tmp_path) == []


def test_a_list_that_is_complete_looks_at_no_other(tmp_path, monkeypatch):
    run(["a", "b"], tmp_path)
    run(["a"], tmp_path)
    monkeypatch.setattr(known_texts, "digests", None)
    monkeypatch.setattr(known_texts, "_index", None)
    assert run(["a", "b"], tmp_path) == []


def test_stores_of_other_things_are_passed_over(tmp_path):
    logits = EmbeddingStore(tmp_path, "0" * 32, 1, 12)
    logits.open()
    logits.write([(0, np.arange(1), np.ones((1, 12), np.float32))])
    logits.finish()
    logits.close()
    assert run(["a"], tmp_path) == ["a"]


# What a whole job counts, with a model. Where a text has the same bits in any batch, so do all outputs.
IS_EXACT = onednn.is_usable() and runtime.cpu_has("avx512f")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model) -> dict:
    folder = tmp_path_factory.mktemp("known")
    rows = [row for row in make_rows(700, seed=8) if len(row["query"].split()) > 2]
    rows = list({row["query"]: row for row in rows}.values())
    rng = np.random.default_rng(0)
    few = [rows[i] for i in sorted(rng.permutation(len(rows))[:200])]
    return {
        "model": tiny_model, "rows": rows, "few": few, "most": rows[:400],
        "all_path": write_jsonl(folder / "all", rows), "most_path": write_jsonl(folder / "most", rows[:400]),
        "few_path": write_jsonl(folder / "few", few[::-1]),
    }  # fmt: skip


def job(script: str, source: str, files: dict, out: Path, *flags, nproc: int = 1) -> int:
    """Run one; returns how many texts it encoded."""
    out.parent.mkdir(exist_ok=True)
    given = flags_of(script, source, files, out)
    done = run_script(script, *given, *flags, nproc=nproc, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(f"{out}.report.json").read_bytes())["counts"]["encoded"]


def flags_of(script: str, source: str, files: dict, out: Path) -> list:
    name = "dev_path" if script == "embedding_evaluate.py" else "input_data_path"
    return ["--model_path", files["model"], f"--{name}", source, "--output_data_path", out, "--batch_tokens", 256]


def texts_of(rows: list[dict], passages: bool = True) -> set[str]:
    return {row["query"] for row in rows} | {text for row in rows for text in row["pos_passage"] if passages}


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".jsonl", ".json", ".trec")
            and not path.name.endswith(".report.json")}  # fmt: skip


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory) -> Path:
    """What the jobs write without a cache."""
    folder = tmp_path_factory.mktemp("plain")
    for script, source in JOBS.items():
        job(script, files[source], files, folder / f"{script}.json")
    return folder


JOBS = {
    "embedding_evaluate.py": "most_path", "mining_negative_samples.py": "all_path", "clean_query.py": "few_path",
}  # fmt: skip


@pytest.mark.parametrize("nproc", [1, 2])
def test_evaluation_then_mining_then_cleaning(nproc, files, plain, tmp_path):
    cached = ["--embedding_cache", tmp_path / "cache"]
    most, every = texts_of(files["most"]), texts_of(files["rows"])
    for (script, source), expected in zip(JOBS.items(), (len(most), len(every - most), 0), strict=True):
        out = tmp_path / "cached" / f"{script}.json"
        assert job(script, files[source], files, out, *cached, nproc=nproc) == expected
    if IS_EXACT:
        assert outputs(tmp_path / "cached") == outputs(plain)


def test_two_cleanings_at_once_then_a_mining(files, tmp_path):
    running = []
    for name in ("few", "most"):
        (tmp_path / name).mkdir()
        given = flags_of("clean_query.py", files[f"{name}_path"], files, tmp_path / name / "clean.json")
        command = script_command("clean_query.py", *given, "--embedding_cache", tmp_path / "cache")
        running.append(subprocess.Popen(command, env=script_env(), cwd=tmp_path, stderr=subprocess.PIPE))
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    for name in ("few", "most"):
        job("clean_query.py", files[f"{name}_path"], files, tmp_path / f"plain {name}" / "clean.json")
        if IS_EXACT:
            assert outputs(tmp_path / name) == outputs(tmp_path / f"plain {name}")
    seen = texts_of(files["most"] + files["few"], passages=False)
    out = tmp_path / "mined" / "out.json"
    given = ["--embedding_cache", tmp_path / "cache"]
    encoded = job("mining_negative_samples.py", files["all_path"], files, out, *given)
    assert encoded == len(texts_of(files["rows"]) - seen)
