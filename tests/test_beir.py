"""Reading a BEIR folder, and what is said of a broken one."""

import json

import pytest
from conftest import write_jsonl

from utils.files import beir
from utils.files.jsonl import Record, RecordError

CORPUS = [
    {"_id": "a", "title": "Loans", "text": "how loans work"},
    {"_id": "b", "title": "", "text": "rivers"},
    {"_id": 3, "text": "trains", "metadata": {}},
]


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "loan?"}, {"_id": "q2", "text": "river?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t2\nq2\tb\t-1\r\n")
    return tmp_path


def test_texts(folder):
    assert dict(beir.read_corpus(str(folder))) == {"a": "Loans how loans work", "b": "rivers", "3": "trains"}
    assert list(beir.read_queries(str(folder))) == [("q1", "loan?"), ("q2", "river?")]


def test_judgments_with_and_without_a_header(folder):
    expected = [("q1", "a", 2), ("q2", "b", -1)]
    assert [row[:3] for row in beir.read_qrels(str(folder), "test")] == expected
    (folder / "qrels" / "dev.tsv").write_text("q1\ta\t2\nq2\tb\t-1\n")
    assert [row[:3] for row in beir.read_qrels(str(folder), "dev")] == expected


def test_an_unknown_split_names_those_that_are_there(folder):
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: no such file; the splits there are test"):
        list(beir.read_qrels(str(folder), "train"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\ta", ":2: 2 columns; expected 3"),
        ("q1", ":2: 1 columns; expected 3 .* or 4"),
        ("q1 my own id 1", ":2: 5 columns; expected 3 .query-id, corpus-id, score. or 4"),
        ("q1 0 a more", ":2: the score is 'more'"),
        ("q1 a b 1", ":2: the second of 4 columns is 'a'; expected TREC's 0"),
        ("q1\ta\tmuch", ":2: the score is 'much'; expected a whole number"),
        ("q1\ta\t1.5", ":2: the score is '1.5'; expected a whole number"),
        ("q1\t\t1", ":2: an id is empty"),
        ("q1\ta\t2\nq1\ta\t1", ":3: grade 1 for a pair that has grade 2 above"),
        ("", "the file has no judgments"),
    ],
)
def test_bad_judgments(folder, line, message):
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(ValueError, match=message):
        list(beir.read_qrels(str(folder), "test"))


@pytest.mark.parametrize("between", ["\t", " ", "  \t ", "    "])
@pytest.mark.parametrize("iteration", [None, "0", "Q0"])
@pytest.mark.parametrize("header", [None, "query-id it corpus-id score", "qid 0 docno rel"])
def test_judgments_in_three_or_four_columns(folder, between, iteration, header):
    rows = [row for row in (header and header.split(), ["q1", "", "a", "2"], ["q2", "", "b", "-1"]) if row]
    lines = [between.join([row[0], iteration or "", *row[2:]] if iteration else [row[0], *row[2:]]) for row in rows]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    assert [row[:3] for row in beir.read_qrels(str(folder), "test")] == [("q1", "a", 2), ("q2", "b", -1)]


def test_an_id_may_hold_spaces_between_tabs(folder):
    (folder / "qrels" / "test.tsv").write_text("q1\t0\tmy own id\t2\nq2\tmy own id\t1\n")
    assert [row[:3] for row in beir.read_qrels(str(folder), "test")] == [("q1", "my own id", 2), ("q2", "my own id", 1)]


@pytest.mark.parametrize("header", ["query-id\tcorpus-id\tscore", "QID\tDocID\tgrad", "Frage\tText\tRelevance"])
def test_headers(folder, header):
    (folder / "qrels" / "test.tsv").write_text(f"{header}\nq1\ta\t2\n")
    assert [row[:3] for row in beir.read_qrels(str(folder), "test")] == [("q1", "a", 2)]


def test_a_bad_first_judgment_is_no_header(folder):
    (folder / "qrels" / "test.tsv").write_text("q1\ta\tl\nq2\ta\t1\n")
    with pytest.raises(RecordError, match=":1: the score is 'l'; expected a whole number, or query-id, corpus-id and"):
        list(beir.read_qrels(str(folder), "test"))
    rejected = []
    assert len(list(beir.read_qrels(str(folder), "test", rejected))) == len(rejected) == 1


def test_white_space_around_ids_counts_neither_in_texts_nor_in_judgments(folder):
    write_jsonl(folder / "corpus.jsonl", [{"_id": "a ", "text": "loans"}])
    (folder / "qrels" / "test.tsv").write_text("q1\t a\t1\n")
    assert list(beir.read_corpus(str(folder))) == [("a", "loans")]
    assert [row.passage_id for row in beir.read_qrels(str(folder), "test")] == ["a"]
    write_jsonl(folder / "corpus.jsonl", [{"_id": "a ", "text": "loans"}, {"_id": "a", "text": "rivers"}])
    with pytest.raises(RecordError, match=":2: \"_id\" 'a' is also that of line 1"):
        list(beir.read_corpus(str(folder)))


def test_a_first_line_with_a_score_is_no_header(folder):
    (folder / "qrels" / "test.tsv").write_text("q1\ta\t2.0\nq2\ta\t1\n")
    assert [(j.query_id, j.grade) for j in beir.read_qrels(str(folder), "test")] == [("q1", 2), ("q2", 1)]
    (folder / "qrels" / "test.tsv").write_text("q1\ta\t0.5\nq2\ta\t1\n")
    with pytest.raises(RecordError, match=r":1: the score is '0\.5'"):
        list(beir.read_qrels(str(folder), "test"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, '"_id" is missing'),
        ({"_id": None, "text": "x"}, '"_id" is None'),
        ({"_id": "\ud800", "text": "x"}, '"_id" holds half of a surrogate pair'),
        ({"_id": "c"}, '"text" is missing'),
        ({"_id": "c", "text": " ", "title": ""}, '"text" is empty'),
        ({"_id": "c", "text": 5}, '"text" is 5; expected a string'),
        ({"_id": "a", "text": "again"}, "\"_id\" 'a' is also that of line 1"),
        ([], "the row is a list"),
    ],
)
def test_bad_rows(folder, row, message):
    with open(folder / "corpus.jsonl", "a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(RecordError) as caught:
        list(beir.read_corpus(str(folder)))
    assert message in str(caught.value) and f"{folder}/corpus.jsonl:4: " in str(caught.value)
    rejected = []
    assert len(list(beir.read_corpus(str(folder), rejected))) == 3
    assert [error.line for error in rejected] == [4]


def test_passages_of_a_pool_stay_as_they_are_written():
    def passage(**row) -> str:
        return beir.corpus_passages(Record("", (), (), 1, row), "pool.jsonl")[0]

    assert passage(text=" a\n") == " a\n"
    assert passage(text=" a ", title=" ") == " a "
    assert passage(text="a ", title="T") == "T a "
    with pytest.raises(RecordError, match='"text" is empty'):
        passage(text=" \n")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl: no such file"):
        list(beir.read_corpus(str(tmp_path)))
    (tmp_path / "corpus.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        list(beir.read_corpus(str(tmp_path)))
