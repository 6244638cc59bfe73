"""What the dev set is read from."""

import pytest
from conftest import write_jsonl

from utils.training.dev import DevSet


def test_the_corpus_grows_by_rows_of_either_shape(tmp_path):
    dev = write_jsonl(tmp_path / "dev.json", [{"query": "a", "pos_passage": ["p"], "neg_passage": ["n"]}])
    more = [{"_id": "1", "title": "t", "text": "x"}, {"neg_passage": ["y", "p"]}]
    found = DevSet.read([dev], write_jsonl(tmp_path / "corpus.jsonl", more), "error")
    assert found.corpus == ["p", "n", "t x", "y"] and found.positives == [{0}]
    with pytest.raises(ValueError, match=r"other.jsonl:1: .*expected a row of a corpus"):
        DevSet.read([dev], write_jsonl(tmp_path / "other.jsonl", [{"body": "x"}]), "error")
