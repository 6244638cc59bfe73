"""What mining reads: rows, the passages to mine from, and which of them each query must never get."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from utils.arguments import MiningArguments
from utils.mining_formats import answer_of
from utils.negatives import Groups
from utils.records import Record, RecordError, Source, fold, parse_record


@dataclass
class Inputs:
    """The input on rank 0.

    Attributes:
        queries: different texts, in first-seen order; query_of_row gives each good row's.
        passages: different texts: those to mine from, then (``candidate_pool_only``) positives outside the pool.
        number_of: each passage's position in ``passages``.
        positives: for each query, the union of positives over all rows with the same query text.
        forbidden: those, passages whose text equals one of them or the query's own text.
    """

    source: Source
    queries: list[str] = field(default_factory=list)
    query_of_row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    passages: list[str] = field(default_factory=list)
    n_candidates: int = 0
    number_of: dict[str, int] = field(default_factory=dict)
    positives: Groups = field(default_factory=lambda: Groups.of([]))
    forbidden: Groups = field(default_factory=lambda: Groups.of([]))
    n_with_negatives: int = 0
    pool_rejected: list[RecordError] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Rows of the input file, bad ones included."""
        return self.source.n_rows

    @property
    def n_rejected_rows(self) -> int:
        return len(self.source.rejected)

    @property
    def rejected(self) -> list[RecordError]:
        """Bad rows of the input and of the pool."""
        return self.source.rejected + self.pool_rejected

    @classmethod
    def read(cls, given: MiningArguments) -> "Inputs":
        """Read and check everything.

        Raises:
            FileNotFoundError, ValueError: a file or a row that cannot be used.
        """
        self = cls(Source(given.input_data_path, ("query", "pos_passage"), given.on_bad_row))
        if given.candidate_pool_only:
            self._read_pool(given)
            self.n_candidates = len(self.passages)
        positives_of = self._read_rows(given)
        if not given.candidate_pool_only:
            if given.candidate_pool:
                self._read_pool(given)
            self.n_candidates = len(self.passages)
        self._forbid(positives_of)
        return self

    def rows_again(self) -> Iterator[Record]:
        """The good rows once more, from a second pass over the file."""
        bad = {error.line for error in self.source.rejected}
        for raw in self.source.raw_lines():
            if raw.number not in bad:
                yield parse_record(raw, self.source.path, self.source.require)

    def _number(self, passage: str) -> int:
        number = self.number_of.setdefault(passage, len(self.passages))
        if number == len(self.passages):
            self.passages.append(passage)
        return number

    def _read_rows(self, given: MiningArguments) -> list[list[int]]:
        """Fill queries and passages; returns the positives' numbers of each query."""
        query_number: dict[str, int] = {}
        query_of_row = []
        positives_of: list[list[int]] = []
        for record in self.source:
            if given.output_format == "context_qa" and answer_of(record.row, given.answer_key) is None:
                raise RecordError(
                    self.source.path, record.line,
                    f'no "{given.answer_key}"; output_format context_qa expects a non-empty string, or a list of them',
                )  # fmt: skip
            number = query_number.setdefault(record.query, len(positives_of))
            if number == len(positives_of):
                positives_of.append([])
            positives_of[number] += [self._number(text) for text in record.pos_passage]
            query_of_row.append(number)
            self.n_with_negatives += bool(record.neg_passage)
        self.queries = list(query_number)
        self.query_of_row = np.array(query_of_row, np.int64)
        return positives_of

    def _read_pool(self, given: MiningArguments) -> None:
        assert given.candidate_pool is not None
        pool = Source(given.candidate_pool, (), given.on_bad_row)
        for record in pool:
            try:
                passages = pool_passages(record, pool.path)
            except RecordError as error:
                if given.on_bad_row != "skip":
                    raise
                self.pool_rejected.append(error)
                continue
            for passage in passages:
                self._number(passage)
        self.pool_rejected = sorted(self.pool_rejected + pool.rejected, key=lambda error: error.line)
        if not self.passages:
            raise ValueError(f"{pool.path}: no passage in it; expected rows of neg_passage, or of text")

    def _forbid(self, positives_of: list[list[int]]) -> None:
        """Unite the positives of queries with equal text, and find every passage equal to one of them."""
        alike: dict[str, list[int]] = {}
        for number, query in enumerate(self.queries):
            alike.setdefault(fold(query), []).append(number)
        folded = [_folded(text) for text in self.passages]
        equal: dict[str, list[int]] = {}
        for number, text in enumerate(folded):
            equal.setdefault(text, []).append(number)
        positives: list[list[int]] = [[]] * len(self.queries)
        forbidden: list[list[int]] = [[]] * len(self.queries)
        for text, numbers in alike.items():
            united = sorted({passage for number in numbers for passage in positives_of[number]})
            texts = {folded[passage] for passage in united} | {text}
            banned = sorted(passage for each in texts for passage in equal.get(each, []))
            for number in numbers:
                positives[number], forbidden[number] = united, banned
        self.positives, self.forbidden = Groups.of(positives), Groups.of(forbidden)


def pool_passages(record: Record, path: str) -> list[str]:
    """A pool row's passages: its negatives, or its text under its title, as BEIR has it."""
    if record.neg_passage:
        return list(record.neg_passage)
    parts = [record.row.get(key, "") for key in ("title", "text")]
    for key, value in zip(("title", "text"), parts, strict=True):
        if not isinstance(value, str):
            raise RecordError(path, record.line, f'"{key}" is no string; expected a string')
    if "text" not in record.row:
        raise RecordError(path, record.line, 'neither "neg_passage" nor "text"; expected a passage to mine from')
    text = " ".join(part for part in parts if part.strip())
    if not text.strip():
        raise RecordError(path, record.line, '"text" is empty; expected a passage to mine from')
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = '"text" holds half of a surrogate pair (\\ud800 to \\udfff); expected valid Unicode'
        raise RecordError(path, record.line, reason) from None
    return [text]


def _folded(text: str) -> str:
    """``fold``, sharing the memory of a text that it leaves as it is."""
    folded = fold(text)
    return text if folded == text else folded
