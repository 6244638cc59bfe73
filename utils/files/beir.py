"""A BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``, read row by row.

Every reader raises at the first bad row, or collects bad rows in the list given as ``rejected``.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from .jsonl import RawLine, Record, RecordError, parse_object, passages_key, read_lines, set_aside

# A grade; programs that write tables make 1.0 of 1.
_WHOLE = re.compile(r"-?[0-9]{1,9}(\.0+)?", re.ASCII)
# TREC's second column, which means nothing.
_ITERATION = re.compile(r"[Qq]?[0-9]+(\.0+)?", re.ASCII)
# What a header calls the columns, but for case and whatever is no letter.
_QUERY = {"queryid", "query", "qid", "topicid", "topic", "questionid"}
_PASSAGE = {
    "corpusid",
    "corpus",
    "docid",
    "doc",
    "docno",
    "did",
    "documentid",
    "document",
    "passageid",
    "passage",
    "pid",
}
_SCORE = {"score", "relevance", "rel", "grade", "label", "judgment", "judgement", "rating", "qrel", "gain"}


class Judgment(NamedTuple):
    """A line of a qrels file."""

    query_id: str
    passage_id: str
    grade: int
    line: int


def is_folder(path: str) -> bool:
    """True if ``path`` is a folder, which can only be meant as BEIR's."""
    return os.path.isdir(path)


def read_corpus(folder: str, rejected: list[RecordError] | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of each passage, the title in front of the text.

    Raises:
        FileNotFoundError, ValueError: no such file, an empty one, or a row that cannot be used.
    """
    return _read_texts(_file(folder, "corpus.jsonl"), rejected)


def read_queries(folder: str, rejected: list[RecordError] | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of each query, judged or not. Raises as ``read_corpus``."""
    return _read_texts(_file(folder, "queries.jsonl"), rejected)


def read_qrels(folder: str, split: str, rejected: list[RecordError] | None = None) -> Iterator[Judgment]:
    """The judgments of a split, in file order. The header line may be missing.

    Raises:
        FileNotFoundError: no such split; names those that are there.
        ValueError: an empty file, or a line that is not query id, passage id and grade, or TREC's four columns.
    """
    path = qrels_path(folder, split)
    seen: dict[tuple[str, str], int] = {}
    n_rows = 0
    for raw in read_lines(path):
        try:
            row = _judgment(raw, path)
            if row is None:
                continue
            n_rows += 1
            earlier = seen.setdefault(row[:2], row.grade)
            if earlier != row.grade:
                raise RecordError(
                    path, raw.number, f"grade {row.grade} for a pair that has grade {earlier} above; expected one grade"
                )
        except RecordError as error:
            set_aside(error, rejected)
            continue
        yield row
    if n_rows == 0:
        raise ValueError(f"{path}: the file has no judgments; expected query-id, corpus-id and score")


def qrels_path(folder: str, split: str) -> str:
    """Where a split's judgments are.

    Raises:
        FileNotFoundError: no such split.
    """
    path = os.path.join(folder, "qrels", f"{split}.tsv")
    if not os.path.isfile(path):
        try:
            names = sorted(os.listdir(os.path.join(folder, "qrels")))
        except OSError:
            names = []
        splits = [name.removesuffix(".tsv") for name in names if name.endswith(".tsv")]
        found = f"the splits there are {', '.join(splits)}" if splits else "expected a BEIR folder with qrels/*.tsv"
        raise FileNotFoundError(f"{path}: no such file; {found}")
    return path


def corpus_passages(record: Record, path: str) -> tuple[str, ...]:
    """The passages of a corpus's row: its ``neg_passage``, which may be an empty list, or else ``text`` with perhaps a
    ``title``.

    Raises:
        RecordError: there is neither.
    """
    row = record.row
    if not record.neg_passage and ("text" in row or "title" in row):
        return (passage_text(row, path, record.line),)
    if passages_key(row, "neg_passage") in row:
        return record.neg_passage
    raise RecordError(path, record.line, 'neither "neg_passage" nor "text" is there; expected a row of a corpus')


def passage_text(row: dict, path: str, line: int) -> str:
    """``title`` and ``text`` of a row as one text, a space between, as they are written; a blank one is left out.

    Raises:
        RecordError: neither holds any text, or one is no string.
    """
    parts = []
    for key in ("title", "text"):
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise RecordError(path, line, f'"{key}" is {value!r:.40}; expected a string')
        parts.append(value or "")
    text = " ".join(part for part in parts if part.strip())
    if not text:
        found = "empty" if "text" in row else "missing"
        raise RecordError(path, line, f'"text" is {found}; expected a non-empty string')
    if not _is_unicode(text):
        reason = "a text holds half of a surrogate pair (\\ud800 to \\udfff); expected valid Unicode"
        raise RecordError(path, line, reason)
    return text


def _file(folder: str, name: str) -> str:
    """A file of the folder, or its gzipped form where only that is there."""
    path = os.path.join(folder, name)
    return path + ".gz" if not os.path.exists(path) and os.path.exists(path + ".gz") else path


def _read_texts(path: str, rejected: list[RecordError] | None) -> Iterator[tuple[str, str]]:
    lines: dict[str, int] = {}
    n_rows = 0
    for raw in read_lines(path):
        n_rows += 1
        try:
            row = parse_object(raw, path)
            key = _id(row, path, raw.number)
            text = passage_text(row, path, raw.number).strip()  # as BEIR does
            if lines.setdefault(key, raw.number) != raw.number:
                raise RecordError(
                    path, raw.number, f'"_id" {key!r} is also that of line {lines[key]}; expected its own'
                )
        except RecordError as error:
            set_aside(error, rejected)
            continue
        yield key, text
    if n_rows == 0:
        raise ValueError(f"{path}: the file has no rows; expected one JSON object a line")
    if not lines:
        raise ValueError(f"{path}: all {n_rows} rows are bad, the last: {rejected[-1] if rejected else ''}")


def _id(row: dict, path: str, line: int) -> str:
    value = row.get("_id")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if "_id" not in row else f"{value!r:.40}"
        raise RecordError(path, line, f'"_id" is {found}; expected a non-empty string')
    if not _is_unicode(value):
        raise RecordError(path, line, '"_id" holds half of a surrogate pair; expected valid Unicode')
    return value.strip()  # as in the judgments, which would find another's


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _judgment(raw: RawLine, path: str) -> Judgment | None:
    """A qrels line, or None for the header."""
    try:
        line = raw.content.decode().strip("\r\n")
    except UnicodeDecodeError:
        raise RecordError(path, raw.number, "the line is not UTF-8; expected UTF-8 text") from None
    columns = [column.strip() for column in line.split("\t")] if "\t" in line else line.split()
    if len(columns) not in (3, 4):
        reason = (
            f"{len(columns)} columns; expected 3 (query-id, corpus-id, score) or 4 (query-id, 0, corpus-id, score),"
            " with tabs or spaces between"
        )
        raise RecordError(path, raw.number, reason)
    query_id, passage_id, grade = columns[0], *columns[-2:]
    if raw.number == 1 and _is_header(query_id, passage_id, grade):
        return None
    if len(columns) == 4 and not _ITERATION.fullmatch(columns[1]):
        reason = f"the second of 4 columns is {columns[1]!r:.40}; expected TREC's 0: query-id, 0, corpus-id, score"
        raise RecordError(path, raw.number, reason)
    if not _WHOLE.fullmatch(grade):
        header = "" if raw.number > 1 else ", or query-id, corpus-id and score as the header"
        raise RecordError(path, raw.number, f"the score is {grade!r:.40}; expected a whole number{header}")
    if not query_id or not passage_id:
        raise RecordError(path, raw.number, "an id is empty; expected query-id, corpus-id and score")
    return Judgment(query_id, passage_id, int(float(grade)), raw.number)


def _is_header(*columns: str) -> bool:
    """Whatever else is no judgment is a bad one, and not to be passed over."""
    query, passage, score = (re.sub(r"[\W\d_]", "", column.lower()) for column in columns)
    return score in _SCORE or (query in _QUERY and passage in _PASSAGE and not _WHOLE.fullmatch(columns[2]))
