"""A test collection: queries, the corpus, and which passages are relevant to which query.

Read from our own JSONL rows, with or without a corpus file, or from a BEIR folder. In our own rows a
passage is its text: equal texts, letter for letter, are one passage, and rows with the same query are
one query with the positives of all of them. In a BEIR folder a passage is its id, as its judgments have it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from utils import beir
from utils.arguments import EvaluateArguments
from utils.records import RecordError, Source, parse_record, read_lines

logger = logging.getLogger(__name__)


@dataclass
class Judgments:
    """Passages with a grade of each query: those of query i are ``rows[lims[i]:lims[i + 1]]``, ascending.

    lims: int64 [q + 1]. rows: int64, row numbers of passages. grades: int64.
    """

    lims: np.ndarray
    rows: np.ndarray
    grades: np.ndarray

    @classmethod
    def of(cls, judged: list[dict[int, int]]) -> "Judgments":
        """From each query's passages and their grades."""
        lims = np.cumsum([0, *map(len, judged)])
        rows = np.fromiter((row for passages in judged for row in sorted(passages)), np.int64, lims[-1])
        grades = np.fromiter((passages[row] for passages in judged for row in sorted(passages)), np.int64, lims[-1])
        return cls(lims, rows, grades)

    def n_relevant(self, start: int, size: int) -> np.ndarray:
        """Passages with a grade of at least 1, for ``size`` queries from ``start`` on: int64 [size]."""
        lims = self.lims[start : start + size + 1]
        return np.diff(np.concatenate([[0], np.cumsum(self.grades[lims[0] : lims[-1]] >= 1)])[lims - lims[0]])

    def of_query(self, query: int) -> Iterator[tuple[int, int]]:
        """(row, grade) of a query's judged passages."""
        part = slice(self.lims[query], self.lims[query + 1])
        return zip(self.rows[part].tolist(), self.grades[part].tolist(), strict=True)

    def lookup(self, start: int, rows: np.ndarray, n_passages: int) -> np.ndarray:
        """The grades of ``rows``, int64 [b, k], for the queries from ``start`` on; 0 where there is none."""
        part = slice(self.lims[start], self.lims[start + len(rows)])
        if part.start == part.stop:
            return np.zeros(rows.shape, np.int64)
        counts = np.diff(self.lims[start : start + len(rows) + 1])
        keys = np.repeat(np.arange(len(rows)), counts) * n_passages + self.rows[part]
        wanted = np.arange(len(rows))[:, None] * n_passages + rows
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where((keys[place] == wanted) & (rows >= 0), self.grades[part][place], 0)

    def ideal(self, start: int, size: int, k: int) -> np.ndarray:
        """The ``k`` highest grades of each of ``size`` queries from ``start`` on, descending: float64 [size, k]."""
        best = np.zeros((size, k), np.float64)
        part = slice(self.lims[start], self.lims[start + size])
        query = np.repeat(np.arange(size), np.diff(self.lims[start : start + size + 1]))
        order = np.lexsort((-self.grades[part], query))
        place = np.arange(len(order)) - (self.lims[start : start + size] - self.lims[start])[query]
        used = place < k
        best[query[used], place[used]] = np.maximum(self.grades[part][order], 0)[used]
        return best


@dataclass
class Collection:
    """What is evaluated on. Row numbers of passages count from 0 in first-seen order.

    passages holds the corpus, ``n_corpus`` texts, and then judged passages that are not in the corpus.
    query_rows and passage_rows give each one's number in reading order, before equal ones became one;
    n_query_rows and n_passage_rows count them there. ``ignored`` are the rows that a query must not find.
    """

    queries: list[str]
    passages: list[str]
    n_corpus: int
    judgments: Judgments
    query_rows: np.ndarray
    passage_rows: np.ndarray
    n_query_rows: int
    n_passage_rows: int
    query_ids: list[str]
    passage_ids: list[str] | None
    ignored: dict[int, list[int]] = field(default_factory=dict)
    rejected: list[RecordError] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def passage_id(self, row: int) -> str:
        """A name without white space: BEIR's, or ``d`` and the number from 1."""
        return f"d{row + 1}" if self.passage_ids is None else self.passage_ids[row]

    @property
    def corpus(self) -> list[str]:
        """The texts that are searched."""
        return self.passages if self.n_corpus == len(self.passages) else self.passages[: self.n_corpus]

    def digest(self) -> str:
        """Equal for runs whose per-query values may be compared: the same queries, corpus and judgments."""
        hasher = hashlib.sha256(repr((len(self.queries), self.n_corpus, sorted(self.ignored.items()))).encode())
        for texts in (self.queries, self.passages, self.query_ids):
            for text in texts:
                hasher.update(b"%d:" % len(text) + text.encode())
        for array in (self.judgments.lims, self.judgments.rows, self.judgments.grades):
            hasher.update(array.astype("<i8").tobytes())
        return hasher.hexdigest()[:16]


def read(given: EvaluateArguments) -> Collection:
    """The collection that the arguments name, checked.

    Raises:
        OSError, ValueError: an input that cannot be used.
    """
    assert given.dev_path is not None
    if beir.is_folder(given.dev_path):
        for name in ("neg_path", "corpus_path"):
            if getattr(given, name) is not None:
                raise ValueError(f"{given.dev_path}: is a BEIR folder, which holds its corpus; leave out {name}")
        collection = _read_beir(given)
    elif given.split is not None:
        raise ValueError(f"{given.dev_path}: is no folder; split goes with a BEIR folder")
    else:
        collection = _read_rows(given)
    if given.ignore_identical:
        _ignore_identical(collection)
    _check_positives(collection, given)
    return collection


def _read_rows(given: EvaluateArguments) -> Collection:
    """Our own rows: every passage named is in the corpus, unless a corpus file says what is."""
    assert given.dev_path is not None
    corpus: dict[str, int] = {}
    passage_rows: list[int] = []
    rejected: list[RecordError] = []
    n_read = 0

    def add(text: str) -> None:
        nonlocal n_read
        if corpus.setdefault(text, len(corpus)) == len(passage_rows):
            passage_rows.append(n_read)
        n_read += 1

    if given.corpus_path is not None:
        for text in read_corpus_file(given.corpus_path, rejected if given.on_bad_row == "skip" else None):
            add(text)
    queries: dict[str, int] = {}
    query_rows: list[int] = []
    lines: list[int] = []
    positives: list[dict[str, None]] = []
    source = Source(given.dev_path, ("query", "pos_passage"), given.on_bad_row)
    for number, record in enumerate(source):
        query = queries.setdefault(record.query, len(queries))
        if query == len(positives):
            query_rows.append(number)
            lines.append(record.line)
            positives.append({})
        positives[query] |= dict.fromkeys(record.pos_passage)
        for text in (*(record.pos_passage if given.corpus_path is None else ()), *record.neg_passage):
            add(text)
    rejected += source.rejected
    if given.neg_path is not None:
        negatives = Source(given.neg_path, ("neg_passage",), given.on_bad_row)
        for record in negatives:
            for text in record.neg_passage:
                add(text)
        rejected += negatives.rejected
    n_corpus = len(corpus)
    judged = [{corpus.setdefault(text, len(corpus)): 1 for text in texts} for texts in positives]
    return Collection(
        queries=list(queries),
        passages=list(corpus),
        n_corpus=n_corpus,
        judgments=Judgments.of(judged),
        query_rows=np.array(query_rows, np.int64),
        passage_rows=np.array(passage_rows, np.int64),
        n_query_rows=source.n_rows,
        n_passage_rows=n_read,
        query_ids=[f"q{line}" for line in lines],
        passage_ids=None,
        rejected=rejected,
        counts={
            "query_rows": source.n_rows,
            "queries": len(queries),
            "query_rows_merged": source.n_rows - len(source.rejected) - len(queries),
            "query_rows_rejected": len(source.rejected),
            "passages_read": n_read,
            "passages": n_corpus,
            "passages_merged": n_read - n_corpus,
        },
    )


def read_corpus_file(
    path: str, rejected: list[RecordError] | None, saw: Callable[[bytes], None] = lambda chunk: None
) -> Iterator[str]:
    """The passages of a corpus's rows; ``saw`` gets every byte."""
    n_rows = n_good = 0
    for raw in read_lines(path, saw):
        n_rows += 1
        try:
            texts = beir.corpus_passages(parse_record(raw, path, ()), path)
        except RecordError as error:
            if rejected is None:
                raise
            rejected.append(error)
            continue
        n_good += 1
        yield from texts
    if n_rows == 0:
        raise ValueError(f"{path}: the file has no rows; expected one JSON object a line")
    if n_good == 0:
        raise ValueError(f"{path}: all {n_rows} rows are bad; expected rows of a corpus")


def _read_beir(given: EvaluateArguments) -> Collection:
    """A BEIR folder: the queries that the split judges, and the whole corpus."""
    folder = given.dev_path
    assert folder is not None
    path = beir.qrels_path(folder, given.judged_split)
    rejected: list[RecordError] = []
    bad = rejected if given.on_bad_row == "skip" else None
    passage_ids: dict[str, int] = {}
    passages: list[str] = []
    passage_rows: list[int] = []
    by_text: dict[str, int] = {}
    n_read = 0
    for passage_id, text in beir.read_corpus(folder, bad):
        row = by_text.setdefault(text, len(passages))
        if row == len(passages) or not given.merge_equal_texts:
            row = len(passages)
            passages.append(text)
            passage_rows.append(n_read)
        passage_ids[passage_id] = row
        n_read += 1
    texts = dict(beir.read_queries(folder, bad))
    numbers = {query_id: number for number, query_id in enumerate(texts)}
    judged: dict[str, dict[int, int]] = {}
    n_qrels = 0
    for judgment in beir.read_qrels(folder, given.judged_split, bad):
        row = passage_ids.get(judgment.passage_id, -1)
        if judgment.query_id not in texts or row < 0:
            what, name = ("query", "queries") if judgment.query_id not in texts else ("passage", "corpus")
            unknown = judgment.query_id if what == "query" else judgment.passage_id
            reason = f"{what} {unknown!r:.80} is not there; expected an id of {name}.jsonl"
            error = RecordError(path, judgment.line, reason)
            if bad is None:
                raise error
            bad.append(error)
            continue
        n_qrels += 1
        grades = judged.setdefault(judgment.query_id, {})
        grades[row] = max(judgment.grade, grades.get(row, judgment.grade))
    if not judged:
        raise ValueError(f"{path}: no judgment names a query and a passage that are there")
    query_ids = sorted(judged, key=numbers.__getitem__)
    n_equal = n_read - len(by_text)
    if n_equal and not given.merge_equal_texts:
        logger.warning(
            "%s of %s passages have the text of an earlier one; each counts by its own id (merge_equal_texts: as one)",
            f"{n_equal:,}", f"{n_read:,}",
        )  # fmt: skip
    first_ids: dict[int, str] = {}
    for passage_id, row in passage_ids.items():
        first_ids.setdefault(row, passage_id)
    return Collection(
        queries=[texts[query_id] for query_id in query_ids],
        passages=passages,
        n_corpus=len(passages),
        judgments=Judgments.of([judged[query_id] for query_id in query_ids]),
        query_rows=np.array([numbers[query_id] for query_id in query_ids], np.int64),
        passage_rows=np.array(passage_rows, np.int64),
        n_query_rows=len(texts),
        n_passage_rows=n_read,
        query_ids=query_ids,
        passage_ids=[first_ids[row] for row in range(len(passages))],
        rejected=rejected,
        counts={
            "query_rows": len(texts),
            "queries": len(query_ids),
            "queries_not_judged": len(texts) - len(query_ids),
            "passages_read": n_read,
            "passages": len(passages),
            "passages_merged": n_read - len(passages),
            "judgments": n_qrels,
        },
    )


def _ignore_identical(collection: Collection) -> None:
    """Note each query's own text among the passages, and take it out of what is judged.

    With BEIR's ids, a passage also counts as the query's own if it has the query's id and contains its
    text: ArguAna's queries are passages without their titles.
    """
    wanted: dict[str, list[int]] = {}
    for row, text in enumerate(collection.queries):
        wanted.setdefault(text, []).append(row)
    ids = {} if collection.passage_ids is None else {name: row for row, name in enumerate(collection.query_ids)}
    ignored: dict[int, set[int]] = {}
    for row in range(collection.n_corpus):
        text = collection.passages[row]
        for query in wanted.get(text, ()):
            ignored.setdefault(query, set()).add(row)
        same_id = ids.get(collection.passage_id(row)) if ids else None
        if same_id is not None and collection.queries[same_id] in text:
            ignored.setdefault(same_id, set()).add(row)
    collection.ignored = {query: sorted(rows) for query, rows in ignored.items()}
    collection.counts["passages_ignored"] = sum(map(len, ignored.values()))
    if not ignored:
        return
    old = collection.judgments
    collection.judgments = Judgments.of(
        [
            {row: grade for row, grade in old.of_query(query) if row not in ignored.get(query, ())}
            for query in range(len(collection.queries))
        ]
    )


def _check_positives(collection: Collection, given: EvaluateArguments) -> None:
    """There must be something to find; where there is not, for some queries, say so.

    Raises:
        ValueError: no query has a positive in the corpus.
    """
    judgments = collection.judgments
    reachable = (judgments.grades >= 1) & (judgments.rows < collection.n_corpus)
    found = np.diff(np.concatenate([[0], np.cumsum(reachable)])[judgments.lims])
    n_without = int((found == 0).sum())
    collection.counts["queries_without_positive_in_corpus"] = n_without
    collection.counts["positives"] = int((judgments.grades >= 1).sum())
    collection.counts["positives_not_in_corpus"] = collection.counts["positives"] - int(reachable.sum())
    if n_without == len(collection.queries):
        where = given.corpus_path or given.dev_path
        if collection.ignored:
            raise ValueError(
                f"{given.dev_path}: none of the {n_without} queries has a positive besides passages equal to itself, "
                "which ignore_identical leaves out"
            )
        raise ValueError(
            f"{given.dev_path}: none of the {n_without} queries has a positive in the corpus; "
            f"expected its text, letter for letter, in {where}"
            if collection.passage_ids is None
            else f"{given.dev_path}: none of the {n_without} queries that {given.judged_split} judges has a positive; "
            "expected a score of at least 1 in the qrels"
        )
    if n_without:
        logger.warning("%s queries have no positive in the corpus; each counts 0", f"{n_without:,}")
    if collection.counts["positives_not_in_corpus"] and n_without < len(collection.queries):
        logger.warning(
            "%s of %s positives are not in the corpus; they stay in the denominators",
            f"{collection.counts['positives_not_in_corpus']:,}", f"{collection.counts['positives']:,}",
        )  # fmt: skip
