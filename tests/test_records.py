import gzip
import json
import os
import pickle

import pytest
from conftest import write_jsonl

from utils.files import jsonl
from utils.files.jsonl import RecordError, Source, fold, to_line

GOOD = {"query": "问题", "pos_passage": ["a", "b"], "neg_passage": [], "id": 7}


def write_bytes(tmp_path, content: bytes) -> str:
    (tmp_path / "in.json").write_bytes(content)
    return str(tmp_path / "in.json")


def test_reads_rows_with_unknown_keys(tmp_path):
    (record,) = Source(write_jsonl(tmp_path / "in.json", [GOOD]))
    assert (record.query, record.pos_passage, record.neg_passage, record.line) == ("问题", ("a", "b"), (), 1)
    assert record.row == GOOD


def test_flagembedding_keys_are_the_same_rows(tmp_path):
    (record,) = Source(write_jsonl(tmp_path / "in.json", [{"query": "q", "pos": ["p"], "neg": ["n"]}]))
    assert (record.pos_passage, record.neg_passage) == (("p",), ("n",))


def test_both_names_may_stand_for_the_same_passages(tmp_path):
    (record,) = Source(write_jsonl(tmp_path / "in.json", [{"query": "q", "pos_passage": ["p"], "pos": ["p"]}]))
    assert record.pos_passage == ("p",)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("zipped", [False, True])
def test_encodings_of_the_same_file(tmp_path, ending, bom, zipped):
    content = bom + ending.join([json.dumps(GOOD).encode(), b"", json.dumps(GOOD).encode()])
    source = Source(write_bytes(tmp_path, gzip.compress(content) if zipped else content))
    assert [record.line for record in source] == [1, 3]
    assert [json.loads(raw.content) for raw in source.raw_lines()] == [GOOD, GOOD]


BAD_LINES = [
    (b"{", "not JSON"),
    (b"[1]", "is a list; expected a JSON object"),
    (b"null", "is null"),
    (b"{}", '"query" is missing'),
    (b'{"query": "  "}', '"query" is empty'),
    (b'{"query": null}', '"query" is null; expected a string'),
    (b'{"query": 3}', '"query" is a number'),
    (b'{"query": "q", "pos_passage": " "}', '"pos_passage" is a string; expected a list'),
    (b"{'query': 'q'}", "expected one JSON object a line, with double quotes around keys and texts"),
    ('{"query": "问题"}'.encode("gb18030"), "it may be GB18030: iconv -f GB18030 -t UTF-8 converts it"),
    (b'{"query": "q", "pos_passage": [1]}', '"pos_passage"[0] is a number'),
    (b'{"query": "q", "pos_passage": ["a", ""]}', '"pos_passage"[1] is empty'),
    (b'{"query": "q", "pos_passage": null}', '"pos_passage" is null'),
    (b'{"query": "q", "neg_passage": ["a", ""]}', '"neg_passage"[1] is empty'),
    (b'{"query": "\\ud800"}', "surrogate"),
    (b'{"query": "q", "x": NaN}', "NaN is no JSON value"),
    (b'{"query": "q", "x": 1e400}', "1e400 is too large a number"),
    (b'{"query": "q", "pos_passage": ["a"], "pos": ["b"]}', '"pos_passage" and "pos" are both there and differ'),
    (b'{"query": "q", "neg": ["a"], "neg_passage": []}', '"neg_passage" and "neg" are both there and differ'),
    (b'{"query": "q", "query": "r"}', 'not usable JSON ("query" is there twice)'),
    (b'{"query": "q", "x": [{"y": 1, "z": 0, "y": 1}]}', 'not usable JSON ("y" is there twice)'),
    (b'{"query": "\xff"}', "byte 12 of the line is not UTF-8"),
    (b'{"query": "q", "x": ' + b"9" * 5000 + b"}", "not usable JSON (a number of 5,000 digits is too large)"),
    (b'{"query": "q", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[m for _, m in BAD_LINES])
def test_bad_rows_are_named(tmp_path, line, message):
    path = write_bytes(tmp_path, json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(RecordError) as caught:
        list(Source(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)

    source = Source(path, on_bad_row="skip")
    assert len(list(source)) == 1
    assert [error.line for error in source.rejected] == [2]
    assert source.n_rows == 2


@pytest.mark.parametrize("row", [{"pos_passage": "p"}, {"pos": "p"}, {"pos_passage": ["p"], "neg_passage": None}])
@pytest.mark.parametrize("none", [{}, {"neg": [""]}, {"neg": None}])
def test_other_ways_of_saying_one_positive_and_no_negative(tmp_path, row, none):
    (record,) = Source(write_jsonl(tmp_path / "in.json", [{"query": "q"} | row | none]))
    assert (record.pos_passage, record.neg_passage) == (("p",), ())
    assert record.row[jsonl.passages_key(record.row, "pos_passage")] == ["p"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_an_array_is_named_and_no_row_of_it_skipped(tmp_path, indent, on_bad_row):
    path = write_bytes(tmp_path, json.dumps([GOOD, GOOD], indent=indent).encode())
    with pytest.raises(ValueError, match=r"in\.json: is a JSON array; expected one JSON object a line"):
        list(Source(path, on_bad_row=on_bad_row))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ＷｉＦｉ　密码", "WiFi 密码"), ("ｶﾞｽ", "ガス"), ("e\u0301te\u0301", "été"), (" a\u00a0b\n\tc ", "a b c"),
        ("（１２３）", "(123)"), ("￥５", "¥5"),
    ],
)  # fmt: skip
def test_what_keyboards_and_encodings_vary_is_folded(text, same):
    assert jsonl.fold(text) == jsonl.fold(same) == same


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("10⁵", "105"), ("x²", "x2"), ("log₂8", "log28"), ("½", "1⁄2"), ("①", "1"), ("ℝ", "R"), ("µm", "mm"),
        ("Ⅳ", "IV"), ("㎡", "m2"), ("™", "TM"), ("a", "A"), ("ﬁ", "fi"),
    ],
)  # fmt: skip
def test_what_changes_a_number_or_a_letter_is_not_folded(text, other):
    assert jsonl.fold(text) != jsonl.fold(other)


def test_required_passages(tmp_path):
    path = write_jsonl(tmp_path / "in.json", [{"query": "q", "pos_passage": []}])
    with pytest.raises(RecordError, match="an empty list; expected a list of at least one string"):
        list(Source(path, require=("query", "pos_passage")))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path, content):
    with pytest.raises(ValueError, match="no rows"):
        list(Source(write_bytes(tmp_path, content)))


def test_truncated_gzip(tmp_path):
    content = gzip.compress(b"".join(json.dumps({**GOOD, "id": i}).encode() + b"\n" for i in range(1000)))
    with pytest.raises(RecordError, match="broken gzip"):
        list(Source(write_bytes(tmp_path, content[: len(content) // 2])))


def test_all_rows_bad_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(ValueError, match="all 1 rows are bad"):
        list(Source(write_bytes(tmp_path, b"{}\n"), on_bad_row="skip"))


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path):
    source = Source(write_jsonl(tmp_path / "in.json", [GOOD]))
    list(source)
    write_jsonl(tmp_path / "in.json", [GOOD, GOOD])
    with pytest.raises(ValueError, match="changed"):
        list(source.raw_lines())


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(Source(str(tmp_path / "none.json")))
    with pytest.raises(IsADirectoryError, match="is a directory"):
        list(Source(str(tmp_path)))


def test_errors_and_lines_survive_the_way_between_ranks():
    error = pickle.loads(pickle.dumps(RecordError("a.json", 3, "bad")))  # noqa: S301 - our own bytes
    assert (str(error), error.line) == ("a.json:3: bad", 3)
    assert json.loads(to_line({"note": "\ud83d", "query": "问"})) == {"note": "\ud83d", "query": "问"}


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        list(Source(str(tmp_path / "pipe")))


def test_fold():
    assert fold(" Ｗｉ－Ｆｉ　 密码 ") == "Wi-Fi 密码"
