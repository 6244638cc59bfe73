"""Stores, resume, and encoding over them, with an encoder that has no model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from utils.encoding import embed as embedding
from utils.encoding.embed import embed
from utils.encoding.encoder import Cut
from utils.files.store import EmbeddingStore, derive, fingerprint, read_user_vectors
from utils.ranks.group import Ranks


class CountingEncoder:
    """Vectors from a text's length and first letter; counts what it encodes."""

    dim = 3

    def __init__(self, setting="a", fail_after=None):
        self.setting, self.encoded, self.fail_after = setting, 0, fail_after

    def description(self):
        return {"setting": self.setting}

    def token_lengths(self, texts):
        return np.array([len(text) for text in texts], np.int32)

    def cut(self, texts, lengths):
        return Cut(0, 0, 512)

    def plan(self, lengths):
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + 4] for i in range(0, len(order), 4)]

    def encode_batches(self, texts, batches):
        for rows in batches:
            if self.fail_after is not None and self.encoded >= self.fail_after:
                raise KeyboardInterrupt
            self.encoded += len(rows)
            yield np.array([[len(texts[r]), ord(texts[r][0]), r] for r in rows], np.float32)


TEXTS = ["x" * (i % 17 + 1) for i in range(203)]
EXPECTED = np.array([[len(t), ord(t[0]), i] for i, t in enumerate(TEXTS)], np.float32)


def run(encoder, folder, texts=TEXTS):
    vectors, encoded, _ = embed(encoder, texts, Ranks(), folder, "texts")
    return np.array(vectors), encoded


def test_vectors_come_back_in_input_order(tmp_path):
    vectors, encoded = run(CountingEncoder(), tmp_path)
    np.testing.assert_array_equal(vectors, EXPECTED)
    assert encoded == len(TEXTS)


def test_a_second_run_encodes_nothing(tmp_path):
    run(CountingEncoder(), tmp_path)
    again = CountingEncoder(fail_after=0)
    vectors, encoded = run(again, tmp_path)
    np.testing.assert_array_equal(vectors, EXPECTED)
    assert encoded == 0


@pytest.mark.parametrize(("change", "expected"), [("setting", len(TEXTS)), ("text", 1), ("order", 0)])
def test_any_change_is_another_store(tmp_path, change, expected):
    run(CountingEncoder(), tmp_path)
    texts = {"setting": TEXTS, "text": [*TEXTS[:-1], "y"], "order": TEXTS[::-1]}[change]
    encoder = CountingEncoder("b" if change == "setting" else "a")
    assert run(encoder, tmp_path, texts)[1] == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_on_a_full_disk_lets_go_of_its_lock(tmp_path):
    store = EmbeddingStore(tmp_path, "f" * 32, 3, 2)
    store.open()
    store.write([(0, np.arange(2), np.ones((2, 2), np.float32))])
    store._data.close()
    store._data = open("/dev/full", "wb")  # noqa: SIM115 - the store closes it
    store._data.write(b"what cannot be flushed")
    with pytest.raises(OSError, match=f"{store.folder}: cannot write embeddings"):
        store.close()
    again = EmbeddingStore(tmp_path, "f" * 32, 3, 2)
    assert again.open() == {0}
    again.close()


def test_a_broken_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCHES_A_ROUND", 2)
    with pytest.raises(KeyboardInterrupt):
        run(CountingEncoder(fail_after=100), tmp_path)
    (store,) = tmp_path.iterdir()
    with open(store / "journal", "ab") as journal:
        journal.write(b"torn")  # a kill in the middle of an entry
    second = CountingEncoder()
    vectors, _ = run(second, tmp_path)
    np.testing.assert_array_equal(vectors, EXPECTED)
    assert 0 < second.encoded <= len(TEXTS) - 96


def test_fingerprint_separates_texts():
    assert fingerprint({}, ["ab", "c"]) != fingerprint({}, ["a", "bc"])


def test_vectors_that_are_not_numbers_are_refused(tmp_path):
    class Broken(CountingEncoder):
        def encode_batches(self, texts, batches):
            for block in super().encode_batches(texts, batches):
                yield block * np.float32("nan")

    with pytest.raises(ValueError, match="NaN or infinity"):
        run(Broken(), tmp_path)


def test_too_little_space_is_said_beforehand(tmp_path, monkeypatch):
    with pytest.raises(
        OSError, match=r"cannot keep embeddings there: [\d,]+ GiB needed for 1,000,000,000,000,000 rows of"
    ):
        EmbeddingStore(tmp_path, "k" * 64, 10**15, 1024).open()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=512))
    with pytest.raises(
        OSError, match="cannot keep neighbours there: 478 KiB needed for 600 rows of 102 numbers, 512 bytes"
    ):
        EmbeddingStore(tmp_path, "k", 600, 102, np.dtype("<f8"), "neighbours").open()


def save(path, array) -> str:
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 4), np.float32), "shape [3, 4]; expected float32 [5, dim], a vector for each row of input"),
        (np.ones(5, np.float32), "expected float32 [5, dim]"),
        (np.ones((5, 4), np.int64), "holds int64"),
        (
            np.array([[1, 2], [3, 4], [np.nan, 1], [1, 1], [1, 1]], np.float32),
            "row 3 holds NaN, infinity",
        ),
        (np.array([[1, 2], [0, 0], [1, 1], [1, 1], [1, 1]], np.float32), "row 2 holds only zeros"),
        (np.array([{}] * 5, object), "v.npy: is no .npy file of numbers, or a damaged one; expected float32 [5, dim]"),
    ],
)
def test_bad_user_vectors(tmp_path, array, message):
    with pytest.raises(ValueError) as caught:
        read_user_vectors(save(tmp_path / "v.npy", array), 5, "row of input", normalize=True)
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", [b"(5, 83, }", b"(5, -8), }", b"(5, 2" + b"0" * 30 + b"), }", b"(5, '), }"])
def test_a_damaged_header_of_user_vectors(tmp_path, shape):
    path = save(tmp_path / "v.npy", np.ones((5, 8), np.float32))
    content = Path(path).read_bytes()
    header = content.replace(b"(5, 8), }", shape)[: content.index(b"\n")].ljust(content.index(b"\n"))
    Path(path).write_bytes(header + content[content.index(b"\n") :])
    with pytest.raises(ValueError, match=r"v\.npy"):
        read_user_vectors(path, 5, "row of input", normalize=True)


def test_text_as_user_vectors(tmp_path):
    (tmp_path / "v.npy").write_text(json.dumps([1]))
    with pytest.raises(
        ValueError, match=r"v\.npy: is no \.npy file of numbers, or a damaged one; expected float32 \[5, dim\]"
    ):
        read_user_vectors(str(tmp_path / "v.npy"), 5, "row of input", normalize=True)


def test_a_row_without_direction_is_named_by_its_place_in_the_file(tmp_path):
    vectors = np.ones((5, 4), np.float32)
    vectors[3, :2] = 0
    for rows in (None, np.array([1, 3])):
        with pytest.raises(ValueError, match="vector 4 is all zeros in its first 2 dimensions"):
            derive(vectors, tmp_path / "derived", rows, dim=2)


@pytest.mark.parametrize("left", [None, 10])
def test_a_journal_without_its_rows_means_nothing(tmp_path, left):
    """As after a copy that was broken off: what is missing would be zeros."""
    store = EmbeddingStore(tmp_path, "key", 4, 3)
    assert store.open() == set()
    store.write([(0, np.arange(2), np.ones((2, 3), np.float32))])
    store.close()
    assert store.open() == {0}
    store.close()
    partial = store.folder / "vectors.partial"
    if left is None:
        partial.unlink()
    else:
        partial.write_bytes(partial.read_bytes()[:left])
    assert store.open() == set()
    store.close()


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_a_store_that_holds_other_vectors_than_were_written_is_refused(tmp_path, byte, dtype):
    """As after a copy that was broken off, whose file has its size from the start."""
    store = EmbeddingStore(tmp_path, "key", 4, 3, np.dtype(dtype))
    store.open()
    store.write([(0, np.arange(4), np.ones((4, 3)))])
    store.finish()
    assert store.read().sum() == 12
    path = store.folder / "vectors"
    whole = path.read_bytes()
    for left in (0, len(whole) // 2):
        path.write_bytes(whole[:left] + byte * (len(whole) - left))
        with pytest.raises(ValueError, match="is damaged, its embeddings are not those written; remove"):
            store.read()
    path.write_bytes(whole)
    (store.folder / "about.json").write_text("[")
    with pytest.raises(ValueError, match=r"about\.json: is damaged; remove"):
        store.read()
    (store.folder / "about.json").unlink()
    assert not store.is_complete
    store.close()


@pytest.mark.parametrize("n", [0, 5])
def test_numbers_that_are_all_zero_are_no_damage(tmp_path, n):
    """A cross-encoder's logits may be, or an infinite score where a search found too few."""
    store = EmbeddingStore(tmp_path, "key", n, 1)
    for value in (0.0, -np.inf):
        store.open()
        store.write([(0, np.arange(n), np.full((n, 1), value, np.float32))])
        store.finish({"index": {"recall": 0.5}})
        assert store.about["index"] == {"recall": 0.5}
        np.testing.assert_array_equal(store.read(), np.full((n, 1), value))
        store.close()
        (store.folder / "vectors").unlink()
