"""What mining reads: rows, the passages to mine from, and which of them each query must never get."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..arguments.scripts import MiningArguments
from ..files import beir, run_ids, trec
from ..files.jsonl import Record, RecordError, Source, fold, parse_record, set_aside
from ..files.ragged import Ragged
from ..files.row_keys import KeyCounts, prompt_of
from ..files.store import read_user_vectors
from .formats import answer_of


@dataclass
class Inputs:
    """The input on rank 0.

    Attributes:
        n_rows: rows of the input, bad ones included; n_rejected_rows are bad.
        queries: different texts, as they are first written, in that order; query_of_row gives each good row's. Equal
            texts with different prompts are different queries, with the same positives.
        prompts: for each query, what its rows say is to stand before it; keys counts what rows say.
        passages: different texts: those to mine from, then (``candidate_pool_only``) positives outside the pool.
        number_of: each passage's position in ``passages``.
        positives: for each query, the union of positives over all rows with the same query text.
        forbidden: those, passages whose text equals one of them or the query's own text.
        query_ids, passage_ids: what run files call them; as ``run_ids`` says where the input has no ids of its own.
        n_unreachable, n_unreachable_queries: positives of a folder's qrels that its corpus lacks, and queries that have
            no other.
        kept, repeats: with keep_negatives, as in ``Problem``; they come last in ``passages``. n_kept_forbidden of the
            rows' own negatives are not kept, as they must not be negatives of their query.
        rejected: bad rows of every file.
        run_lists: what run_path lists for each query, if given.
        query_vectors, passage_vectors: the user's own, if given: one for each row of the input and for each passage.
        query_rows: int64 [queries], the first row of the input that asks each query; those of ``query_vectors``.
    """

    given: MiningArguments
    n_rows: int = 0
    n_rejected_rows: int = 0
    queries: list[str] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    keys: KeyCounts = field(default_factory=KeyCounts)
    query_of_row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    passages: list[str] = field(default_factory=list)
    n_candidates: int = 0
    number_of: dict[str, int] = field(default_factory=dict)
    positives: Ragged = field(default_factory=lambda: Ragged.of([]))
    forbidden: Ragged = field(default_factory=lambda: Ragged.of([]))
    query_ids: dict[str, int] = field(default_factory=dict)
    passage_ids: dict[str, int] = field(default_factory=dict)
    n_with_negatives: int = 0
    kept: Ragged | None = None
    repeats: Ragged | None = None
    n_kept_forbidden: int = 0
    n_unjudged: int = 0
    n_unreachable: int = 0
    n_unreachable_queries: int = 0
    rejected: list[RecordError] = field(default_factory=list)
    run_lists: list[list[int]] | None = None
    query_vectors: np.ndarray | None = None
    passage_vectors: np.ndarray | None = None
    query_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def read(cls, given: MiningArguments) -> "Inputs":
        """Read and check everything.

        Raises:
            FileNotFoundError, ValueError: a file or a row that cannot be used.
        """
        self = cls(given)
        self._source: Source | None = None
        self._beir_rows: list[Record] = []
        self._negatives: list[tuple[str, ...]] = []
        self._query_of_id: dict[str, tuple[str, str | None]] = {}
        self._read_order, self._first_lines, self._absent = run_ids.ReadingOrder(), [], {}
        if given.candidate_pool_only:
            self._read_pool()
            self.n_candidates = len(self.passages)
        is_beir = beir.is_folder(given.input_data_path)
        if given.split and not is_beir:
            raise ValueError(f"{given.input_data_path}: is no folder; split goes with a BEIR folder")
        positives_of = self._add_rows(self._beir() if is_beir else self._jsonl())
        if not given.candidate_pool_only:
            if given.candidate_pool:
                self._read_pool()
            self.n_candidates = len(self.passages)
        negatives = [[self._number(text) for text in texts] for texts in self._negatives]
        equal = self._forbid(positives_of)
        if given.keep_negatives:
            self._keep(negatives, equal)
        self._negatives.clear()
        self._name_all(positives_of)
        self._read_vectors()
        return self

    def rows_again(self) -> Iterator[Record]:
        """The good rows once more; of a JSONL file, from a second pass over it."""
        yield from self._beir_rows
        if self._source is not None:
            bad = {error.line for error in self._source.rejected}
            for raw in self._source.raw_lines():
                if raw.number not in bad:
                    yield parse_record(raw, self._source.path, self._source.require)

    def _number(self, passage: str) -> int:
        number = self.number_of.setdefault(passage, len(self.passages))
        if number == len(self.passages):
            self.passages.append(passage)
        return number

    def _jsonl(self) -> Iterator[Record]:
        given = self.given
        self._source = Source(given.input_data_path, ("query", "pos_passage"), given.on_bad_row, self._check)
        yield from self._source
        self.n_rows, self.n_rejected_rows = self._source.n_rows, len(self._source.rejected)
        self.rejected += self._source.rejected

    def _check(self, record: Record) -> None:
        """What this run needs of a row besides its query and its passages."""
        given = self.given
        if given.output_format == "context_qa" and answer_of(record.row, given.answer_key) is None:
            raise RecordError(
                given.input_data_path, record.line,
                f'no "{given.answer_key}"; output_format context_qa expects a non-empty string, or a list of them',
            )  # fmt: skip
        most = given.negatives_a_row
        if given.keep_negatives and given.output_format == "n-tuple" and len(record.neg_passage) > most:
            raise RecordError(
                given.input_data_path, record.line,
                f"{len(record.neg_passage)} negatives; keep_negatives with output_format n-tuple expects at most"
                f" {most}, as num_negatives says",
            )  # fmt: skip
        own_id = run_ids.own_id(record.row, run_ids.QUERY_IDS)
        if not given.run_path or own_id is None:
            return
        query = _folded(record.query), prompt_of(record.row)
        if self._query_of_id.setdefault(own_id, query) != query:
            raise RecordError(
                given.input_data_path, record.line,
                f"id {own_id!r} is also that of another query; run_path expects each query's own",
            )  # fmt: skip

    def _beir(self) -> Iterator[Record]:
        """The judged queries of a BEIR folder as rows; its corpus becomes passages."""
        folder = self.given.input_data_path
        rejected: list[RecordError] | None = [] if self.given.on_bad_row == "skip" else None
        split = self.given.split or _only_split(folder)
        judged: dict[str, dict[str, int]] = {}
        for judgment in beir.read_qrels(folder, split, rejected):
            if judgment.grade > 0:
                judged.setdefault(judgment.query_id, {})[judgment.passage_id] = judgment.line
        relevant = {passage for passages in judged.values() for passage in passages}
        texts = {}
        for key, text in beir.read_corpus(folder, rejected):
            if key in relevant:
                texts[key] = text
            if not self.given.candidate_pool_only:
                self.passage_ids[key] = self._number(text)
        path = beir.qrels_path(folder, split)
        for key, query in beir.read_queries(folder, rejected):
            passages = judged.pop(key, {})
            positives = [texts[passage] for passage in passages if passage in texts]
            self.n_unreachable += len(passages) - len(positives)
            if not positives:
                self.n_unreachable_queries += bool(passages)
                self.n_unjudged += not passages
                continue
            row = {"_id": key, "query": query, "pos_passage": positives}
            self._beir_rows.append(Record(query, tuple(positives), (), len(self._beir_rows) + 1, row))
        for key, passages in judged.items():
            reason = f"query {key!r} is not in queries.jsonl"
            set_aside(RecordError(path, min(passages.values()), reason), rejected)
        if not self._beir_rows:
            raise ValueError(
                f"{path}: no query has a relevant passage in the corpus; expected grades above 0, and ids of"
                " corpus.jsonl"
            )
        self._absent = dict.fromkeys(relevant - texts.keys())
        self.n_rows = len(self._beir_rows)
        self.rejected += rejected or []
        yield from self._beir_rows

    def _add_rows(self, records: Iterator[Record]) -> list[list[int]]:
        """Fill queries and passages; returns the positives' numbers of each query.

        Queries of equal text are one, by the words of the first: what is known of one of them holds for all.
        """
        query_number: dict[tuple[str, str | None], int] = {}
        query_of_row = []
        known: dict[str, list[int]] = {}
        positives_of: list[list[int]] = []
        for record in records:
            self.keys.add(record.row)
            text, prompt = _folded(record.query), prompt_of(record.row)
            number = query_number.setdefault((text, prompt), len(positives_of))
            if number == len(positives_of):
                positives_of.append(known.setdefault(text, []))
                self.queries.append(record.query)
                self.prompts.append(prompt)
                self._first_lines.append(record.line)
            positives_of[number] += [self._number(text) for text in record.pos_passage]
            if self._names:
                self._read_order.add([] if self.given.candidate_pool_only else record.pos_passage)
                self._read_order.add(record.neg_passage)
            own_id = run_ids.own_id(record.row, run_ids.QUERY_IDS)
            if own_id is not None:
                self.query_ids.setdefault(own_id, number)
            query_of_row.append(number)
            self.n_with_negatives += bool(record.neg_passage)
            if self.given.keep_negatives:
                self._negatives.append(record.neg_passage)
        self.query_of_row = np.array(query_of_row, np.int64)
        return positives_of

    def _read_pool(self) -> None:
        assert self.given.candidate_pool is not None
        pool = Source(self.given.candidate_pool, (), self.given.on_bad_row)
        rejected = []
        before = len(self.passages)
        for record in pool:
            try:
                numbers = [self._number(passage) for passage in beir.corpus_passages(record, pool.path)]
                if self._names:
                    self._read_order.add(beir.corpus_passages(record, pool.path))
                own_id = run_ids.own_id(record.row, run_ids.PASSAGE_IDS)
                if own_id is not None and len(numbers) == 1:
                    earlier = self.passage_ids.setdefault(own_id, numbers[0])
                    if earlier != numbers[0] and self.given.run_path:
                        reason = f"id {own_id!r} is also that of another passage; run_path expects each passage's own"
                        raise RecordError(pool.path, record.line, reason)
            except RecordError as error:
                set_aside(error, rejected if self.given.on_bad_row == "skip" else None)
        self.rejected += sorted(rejected + pool.rejected, key=lambda error: error.line)
        if len(self.passages) == before and self.given.candidate_pool_only:
            raise ValueError(f"{pool.path}: no passage in it; expected rows of neg_passage, or of text")

    def _forbid(self, positives_of: list[list[int]]) -> dict[str, list[int]]:
        """Find every passage of the same text as one of a query's positives, or as the query.

        Returns:
            The passages of each folded text, ascending.
        """
        folded = [_folded(text) for text in self.passages]
        equal: dict[str, list[int]] = {}
        for number, text in enumerate(folded):
            equal.setdefault(text, []).append(number)

        def forbidden(query: str, positives: list[int]) -> list[int]:
            texts = {folded[passage] for passage in positives} | {fold(query)}
            return sorted(passage for text in texts for passage in equal.get(text, []))

        self.positives = Ragged.of(sorted(set(passages)) for passages in positives_of)
        self.forbidden = Ragged.of(map(forbidden, self.queries, positives_of))
        return equal

    def _keep(self, negatives: list[list[int]], equal: dict[str, list[int]]) -> None:
        """Of each row's own negatives those that may be its query's, each text once."""
        kept, repeats = [], []
        for query, own in zip(self.query_of_row.tolist(), negatives, strict=True):
            texts = {fold(self.passages[number]): number for number in reversed(own)}
            banned = set(self.forbidden[query].tolist()) if texts else ()
            self.n_kept_forbidden += sum(number in banned for number in texts.values())
            stay = {text: number for text, number in texts.items() if number not in banned}
            kept.append([number for number in dict.fromkeys(own) if number in stay.values()])
            repeats.append(sorted(number for text in stay for number in equal[text]))
        self.kept, self.repeats = Ragged.of(kept), Ragged.of(repeats)

    @property
    def _names(self) -> bool:
        """Whether what has no id of its own needs a name."""
        return bool(self.given.run_path or self.given.write_corpus)

    def _name_all(self, positives_of: list[list[int]]) -> None:
        """Names for what has no id of its own; and what the run file lists, if there is one."""
        given, order = self.given, self._read_order
        if not self._names:
            return
        for numbers in positives_of:  # of those outside the pool, in evaluation's order
            order.add(self.passages[number] for number in numbers)
        order.add(self.passages)
        older = (
            run_ids.complete(self.query_ids, [run_ids.query_name(line) for line in self._first_lines]),
            run_ids.complete(self.passage_ids, [run_ids.passage_name(order.numbers[text]) for text in self.passages]),
        )
        if not given.run_path:
            return
        # Other passages that a run may name: rows' negatives, and judged ones that the corpus lacks.
        others = [run_ids.passage_name(n) for text, n in order.numbers.items() if text not in self.number_of]
        others = {name: len(self.passages) + n for n, name in enumerate([*self._absent, *others])}
        self.run_lists = trec.read_run(
            given.run_path, self.query_ids, others | self.passage_ids, self.n_candidates,
            self.rejected if given.on_bad_row == "skip" else None, older=older,
        )  # fmt: skip
        self.run_lists += [[]] * (len(self.queries) - len(self.run_lists))

    def _read_vectors(self) -> None:
        given = self.given
        if given.embeddings_path is None or given.passage_embeddings_path is None:
            return
        by_row = read_user_vectors(given.embeddings_path, self.n_rows, "row of input", given.normalizes_own_vectors)
        passages = read_user_vectors(
            given.passage_embeddings_path, len(self.passages), "different passage, in the order of write_corpus",
            given.normalizes_own_vectors,
        )  # fmt: skip
        if by_row.shape[1] != passages.shape[1]:
            raise ValueError(
                f"{given.passage_embeddings_path}: is {passages.shape[1]} wide; expected {by_row.shape[1]}, as wide as"
                f" {given.embeddings_path}"
            )
        if given.dimension is not None and given.dimension > by_row.shape[1]:
            raise ValueError(
                f"dimension is {given.dimension}; the vectors in {given.embeddings_path} have only {by_row.shape[1]}"
            )
        rows = np.arange(self.n_rows)
        if self._source is not None and self._source.rejected:
            bad = np.array(sorted(error.line for error in self._source.rejected))
            good = np.array([raw.number for raw in self._source.raw_lines()])
            rows = np.flatnonzero(~np.isin(good, bad))
        _, first = np.unique(self.query_of_row, return_index=True)
        self.query_vectors, self.passage_vectors, self.query_rows = by_row, passages, rows[first]


def _only_split(folder: str) -> str:
    """The split that can be meant when none is named."""
    try:
        names = sorted(os.listdir(os.path.join(folder, "qrels")))
    except OSError:
        names = []
    splits = [name.removesuffix(".tsv") for name in names if name.endswith(".tsv")]
    if "train" in splits or not splits:
        return "train"
    if len(splits) > 1:
        raise ValueError(f"{folder}: has the splits {', '.join(splits)}; name one with split")
    return splits[0]


def _folded(text: str) -> str:
    """``fold``, sharing the memory of a text that it leaves as it is."""
    folded = fold(text)
    return text if folded == text else folded
