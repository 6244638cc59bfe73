"""A test collection: queries, the corpus, and which passages are relevant to which query.

Read from our own JSONL rows, with or without a corpus file, or from a BEIR folder. In our own rows a
passage is its text: equal texts, letter for letter, are one passage, and rows with the same query (and prompt)
are one query with the positives of all of them. In a BEIR folder a passage is its id, as its judgments have it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..arguments.scripts import EvaluateArguments
from ..files import beir
from ..files.jsonl import RecordError, Source, fold, parse_record, read_lines, set_aside
from ..files.ragged import Ragged
from ..files.row_keys import KeyCounts, prompt_of
from ..files.run_ids import passage_name, query_name

logger = logging.getLogger(__name__)


@dataclass
class Judgments:
    """Passages with a grade of each query.

    rows: int64, each query's passages, ascending. grades: int64, one for each of ``rows.values``.
    """

    rows: Ragged
    grades: np.ndarray

    @classmethod
    def of(cls, judged: list[dict[int, int]]) -> "Judgments":
        """From each query's passages and their grades."""
        rows = Ragged.of(map(sorted, judged))
        every = (passages[row] for passages in judged for row in sorted(passages))
        return cls(rows, np.fromiter(every, np.int64, len(rows.values)))

    @cached_property
    def n_relevant(self) -> np.ndarray:
        """Each query's passages with a grade of at least 1, int64 [q]."""
        return self.rows.counts(self.grades >= 1)

    def of_query(self, query: int) -> Iterator[tuple[int, int]]:
        """(row, grade) of a query's judged passages."""
        return zip(self.rows[query].tolist(), self.grades[self.rows.part(query)].tolist(), strict=True)

    def lookup(self, start: int, rows: np.ndarray) -> np.ndarray:
        """The grades of ``rows``, int64 [b, k], for the queries from ``start`` on; 0 where there is none."""
        place = self.rows.find(np.arange(start, start + len(rows)), rows)
        grades, there = np.zeros(rows.shape, np.int64), place >= 0
        grades[there] = self.grades[place[there]]
        return grades

    def ideal(self, start: int, size: int, k: int) -> np.ndarray:
        """The ``k`` highest grades of each of ``size`` queries from ``start`` on, descending: float64 [size, k]."""
        best = np.zeros((size, k), np.float64)
        lims = self.rows.lims[start : start + size + 1]
        grades = self.grades[lims[0] : lims[-1]]
        query = np.repeat(np.arange(size), np.diff(lims))
        order = np.lexsort((-grades, query))
        place = np.arange(len(order)) - (lims[:-1] - lims[0])[query]
        used = place < k
        best[query[used], place[used]] = np.maximum(grades[order], 0)[used]
        return best


@dataclass
class Collection:
    """What is evaluated on. Row numbers of passages count from 0 in first-seen order.

    passages holds the corpus, ``n_corpus`` texts, and then judged passages that are not in the corpus.
    query_rows and passage_rows give each one's number in reading order, before equal ones became one;
    n_query_rows and n_passage_rows count them there. ``prompts``, of rows of our own, stand before their queries in
    place of a template. other_names are what mining once called queries and passages. ``ignored`` are the rows that a
    query must not find.
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
    other_names: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    prompts: list[str | None] = field(default_factory=list)
    ignored: dict[int, list[int]] = field(default_factory=dict)
    rejected: list[RecordError] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def named_judgments(self) -> Iterator[tuple[str, str, int]]:
        """Each query's id, and of each of its judgments the passage's id and the grade."""
        for query, query_id in enumerate(self.query_ids):
            for row, grade in self.judgments.of_query(query):
                yield query_id, self.passage_id(row), grade

    def passage_id(self, row: int) -> str:
        """A name without white space: BEIR's, or as ``run_ids`` says."""
        return passage_name(row) if self.passage_ids is None else self.passage_ids[row]

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
        for array in (self.judgments.rows.lims, self.judgments.rows.values, self.judgments.grades):
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


class _Numbered:
    """Texts, numbered in the order in which they are first read.

    Args:
        merge: whether equal texts share one number.
        key: what makes two texts equal; by default their letters.

    Attributes:
        texts: by number.
        rows: of each, how many were read before it.
        n_read: how many were read.
    """

    def __init__(self, merge: bool = True, key: Callable[[str], str] = str):
        self.texts: list[str] = []
        self.rows: list[int] = []
        self.n_read = 0
        self._merge, self._key, self._first = merge, key, dict[str | tuple[str, str], int]()

    def add(self, text: str, prompt: str | None = None) -> int:
        """The next text's number; with different prompts, equal texts have different ones."""
        key, new = self._key(text), len(self.texts)
        number = self._first.setdefault(key if prompt is None else (prompt, key), new)
        if not self._merge or number == new:
            number = new
            self.texts.append(text)
            self.rows.append(self.n_read)
        self.n_read += 1
        return number

    def number(self, text: str) -> int:
        """Of a text that has been read, without a prompt."""
        return self._first[self._key(text)]

    def n_different(self) -> int:
        """How many texts there are, each counted once."""
        return len(self._first)


def _read_rows(given: EvaluateArguments) -> Collection:
    """Our own rows: every passage named is in the corpus, unless a corpus file says what is."""
    assert given.dev_path is not None
    corpus, queries = _Numbered(), _Numbered(key=fold)  # as in cleaning and mining
    rejected: list[RecordError] = []
    bad = rejected if given.on_bad_row == "skip" else None
    mined: list[str] = []  # what mining would mine from: positives, then a pool; or the pool alone
    if given.corpus_path is not None:
        for text in read_corpus_file(given.corpus_path, bad):
            corpus.add(text)
            mined += [text] * bool(given.run_path)
    lines: list[int] = []
    prompts: list[str | None] = []
    keys = KeyCounts()
    positives: list[dict[str, None]] = []
    source = Source(given.dev_path, ("query", "pos_passage"), given.on_bad_row)
    for record in source:
        keys.add(record.row)
        prompt = prompt_of(record.row)
        query = queries.add(record.query, prompt)
        if query == len(positives):
            prompts.append(prompt)
            lines.append(record.line)
            positives.append({})
        positives[query] |= dict.fromkeys(record.pos_passage)
        mined += record.pos_passage if given.run_path and given.corpus_path is None else ()
        for text in (*(record.pos_passage if given.corpus_path is None else ()), *record.neg_passage):
            corpus.add(text)
    rejected += source.rejected
    if given.neg_path is not None:
        for text in read_corpus_file(given.neg_path, bad):
            corpus.add(text)
            mined += [text] * bool(given.run_path)
    encodes = given.query_embeddings_path is None and not given.judges_rankings
    keys.log_prompts(None if encodes else "no query is encoded")
    keys.log_unused_types()
    n_corpus, n_read, passage_rows = len(corpus.texts), corpus.n_read, np.array(corpus.rows, np.int64)
    # Positives that the corpus lacks come after it, and none of them counts as read.
    judged = [{corpus.add(text): 1 for text in texts} for texts in positives]
    return Collection(
        queries=queries.texts,
        passages=corpus.texts,
        n_corpus=n_corpus,
        judgments=Judgments.of(judged),
        query_rows=np.array(queries.rows, np.int64),
        passage_rows=passage_rows,
        n_query_rows=source.n_rows,
        n_passage_rows=n_read,
        query_ids=[query_name(line) for line in lines],
        passage_ids=None,
        other_names=_older_names(len(positives), corpus, mined) if given.run_path else ({}, {}),
        prompts=prompts,
        rejected=rejected,
        counts={
            "query_rows": source.n_rows,
            "queries": len(queries.texts),
            "query_rows_merged": queries.n_read - len(queries.texts),
            "query_rows_rejected": len(source.rejected),
            "passages_read": n_read,
            "passages": n_corpus,
            "passages_merged": n_read - n_corpus,
        },
    )


def _older_names(n_queries: int, corpus: _Numbered, mined: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Mining counted queries, and what it mines from, from 0."""
    passages = {str(place): corpus.number(text) for place, text in enumerate(dict.fromkeys(mined))}
    return {str(query): query for query in range(n_queries)}, passages


def read_corpus_file(
    path: str, rejected: list[RecordError] | None, saw: Callable[[bytes], None] = lambda chunk: None
) -> Iterator[str]:
    """The passages of a corpus's rows; ``saw`` gets every byte."""
    n_rows = n_passages = 0
    for raw in read_lines(path, saw):
        n_rows += 1
        try:
            texts = beir.corpus_passages(parse_record(raw, path, ()), path)
        except RecordError as error:
            set_aside(error, rejected)
            continue
        n_passages += len(texts)
        yield from texts
    if n_rows == 0:
        raise ValueError(f"{path}: the file has no rows; expected one JSON object a line")
    if n_passages == 0:
        raise ValueError(f"{path}: no passage in its {n_rows} rows; expected rows of neg_passage, or of text")


def _read_beir(given: EvaluateArguments) -> Collection:
    """A BEIR folder: the queries that the split judges, and the whole corpus."""
    folder = given.dev_path
    assert folder is not None
    beir.qrels_path(folder, given.judged_split)  # a split that is not there is refused before the corpus is read
    rejected: list[RecordError] = []
    bad = rejected if given.on_bad_row == "skip" else None
    passages = _Numbered(merge=given.merge_equal_texts)
    passage_ids = {passage_id: passages.add(text) for passage_id, text in beir.read_corpus(folder, bad)}
    texts = dict(beir.read_queries(folder, bad))
    numbers = {query_id: number for number, query_id in enumerate(texts)}
    n_corpus, n_read, passage_rows = len(passages.texts), passages.n_read, np.array(passages.rows, np.int64)
    n_equal = n_read - passages.n_different()
    absent: dict[str, int] = {}
    judged, n_qrels = _read_judgments(folder, given.judged_split, texts, passage_ids, absent, bad)
    query_ids = sorted(judged, key=numbers.__getitem__)
    if n_equal and not given.merge_equal_texts:
        logger.warning(
            "%s of %s passages have the text of an earlier one; each counts by its own id (merge_equal_texts: as one)",
            f"{n_equal:,}", f"{n_read:,}",
        )  # fmt: skip
    n_repeated = len(query_ids) - len({fold(texts[query_id]) for query_id in query_ids})
    if n_repeated:
        logger.warning(
            "%s of %s queries have the text of an earlier one but for width, composition and white space; each counts "
            "by its own id, with its own judgments", f"{n_repeated:,}", f"{len(query_ids):,}",
        )  # fmt: skip
    first_ids: dict[int, str] = {}
    for passage_id, row in (passage_ids | absent).items():
        first_ids.setdefault(row, passage_id)
    return Collection(
        queries=[texts[query_id] for query_id in query_ids],
        passages=passages.texts + [""] * len(absent),
        n_corpus=n_corpus,
        judgments=Judgments.of([judged[query_id] for query_id in query_ids]),
        query_rows=np.array([numbers[query_id] for query_id in query_ids], np.int64),
        passage_rows=passage_rows,
        n_query_rows=len(texts),
        n_passage_rows=n_read,
        query_ids=query_ids,
        passage_ids=[first_ids[row] for row in range(n_corpus + len(absent))],
        rejected=rejected,
        counts={
            "query_rows": len(texts),
            "queries": len(query_ids),
            "queries_not_judged": len(texts) - len(query_ids),
            "passages_read": n_read,
            "passages": n_corpus,
            "passages_merged": n_read - n_corpus,
            "judgments": n_qrels,
        },
    )


def _read_judgments(
    folder: str,
    split: str,
    queries: dict[str, str],
    passages: dict[str, int],
    absent: dict[str, int],
    bad: list[RecordError] | None,
) -> tuple[dict[str, dict[int, int]], int]:
    """For each judged query's id its passages' grades, the highest where there are several; and how many were read.

    Args:
        queries, passages: by id, what may be judged.
        absent: takes the passages that are judged and not in the corpus, by id, with rows beyond it. They cannot be
            found and count in the denominators, as in trec_eval.
        bad: takes judgments of other queries; None refuses them.
    """
    n_corpus = max(passages.values(), default=-1) + 1
    path = beir.qrels_path(folder, split)
    judged: dict[str, dict[int, int]] = {}
    n_qrels = 0
    for judgment in beir.read_qrels(folder, split, bad):
        if judgment.query_id not in queries:
            reason = f"query {judgment.query_id!r:.80} is not there; expected an id of queries.jsonl"
            error = RecordError(path, judgment.line, reason)
            if bad is None:
                raise error
            bad.append(error)
            continue
        n_qrels += 1
        row = passages.get(judgment.passage_id, -1)
        if row < 0:
            row = absent.setdefault(judgment.passage_id, n_corpus + len(absent))
        grades = judged.setdefault(judgment.query_id, {})
        grades[row] = max(judgment.grade, grades.get(row, judgment.grade))
    if not judged:
        raise ValueError(f"{path}: no judgment names a query and a passage that are there")
    return judged, n_qrels


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
    reachable = (judgments.grades >= 1) & (judgments.rows.values < collection.n_corpus)
    n_without = int((judgments.rows.counts(reachable) == 0).sum())
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
            "expected a score of at least 1 in the qrels, for a passage of the corpus"
        )
    if n_without:
        logger.warning("%s queries have no positive in the corpus; each counts 0", f"{n_without:,}")
    if collection.counts["positives_not_in_corpus"] and n_without < len(collection.queries):
        logger.warning(
            "%s of %s positives are not in the corpus; they stay in the denominators",
            f"{collection.counts['positives_not_in_corpus']:,}", f"{collection.counts['positives']:,}",
        )  # fmt: skip
