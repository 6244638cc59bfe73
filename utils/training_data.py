"""Training rows, the batches they are dealt into, and the warnings that come before any step.

Every rank reads the same rows and makes the same plan of whole batches, then tokenises its own part of
each. So all ranks know which passages are in a batch, and which of them are known positives of which
queries, without exchanging a text.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from utils.records import Record, RecordError, Source, fold
from utils.tokenizing import Tokenizer

logger = logging.getLogger(__name__)

_TRAIN_NAMES = ("train.json", "train.jsonl", "train.json.gz", "train.jsonl.gz")
_DEV_NAMES = ("dev.json", "dev.jsonl", "dev.json.gz", "dev.jsonl.gz")
# Entries put aside for a later batch that are looked at again for the next one, in batches.
_LOOK_BACK = 16
# Negatives of each member of a chain that the chain takes in first: more of one member's would leave less room for
# those of the others.
_CHAINED = 3
# Texts of each side whose lengths the preflight measures, and batches that it looks through.
_SAMPLE_TEXTS, _SAMPLE_BATCHES = 2000, 50
# Warn when more than this share of the passages is cut.
_MUCH_CUT = 0.1


@dataclass
class TrainingRows:
    """All rows of all files. Texts that are equal after folding share one number.

    query_ids: int64 [n], a row's query.
    positives, negatives: for each row, the numbers of its passages; no negative is a known positive.
    scores: for each row, a teacher's scores by passage number; empty where the row has none.
    sources: int64 [n], the file that a row comes from.
    known_positives: for each query, every passage that any row names as its positive.
    n_false: negatives left out because some row names them as a positive of the same query.
    """

    queries: list[str]
    query_ids: np.ndarray
    passages: list[str]
    positives: list[np.ndarray]
    negatives: list[np.ndarray]
    scores: list[dict[int, float]]
    sources: np.ndarray
    weights: list[float]
    known_positives: list[set[int]]
    n_false: int
    rejected: list[RecordError] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.query_ids)

    @cached_property
    def all_positives(self) -> np.ndarray:
        """The passages that are some query's positive, ascending; random negatives are drawn from them."""
        return np.unique(np.concatenate(self.positives))


@dataclass(frozen=True)
class Example:
    """A row as one epoch sees it: ``passages`` holds its positive, then its negatives."""

    row: int
    query_id: int
    passages: np.ndarray


@dataclass
class TrainingBatch:
    """One rank's part of a batch, tokenised, with what is known about the whole of it.

    The positive of query i is passage i * group_size. ``ignored`` [n, n * group_size] and ``scores``
    [n, group_size] cover the whole batch, or this rank's part only if negatives are not shared.

    Args:
        counts: queries on each rank.
        number: of the batch since training began, counting from 0.
    """

    query_tokens: list[Sequence[int]]
    passage_tokens: list[Sequence[int]]
    ignored: np.ndarray
    scores: np.ndarray | None
    counts: list[int]
    number: int


def find_files(paths: Sequence[str], dev_path: str | None) -> tuple[list[str], str | None]:
    """The training files, and the dev file if there is one, of files or folders.

    Raises:
        FileNotFoundError: a folder without a training file, or a path that is not there.
    """
    train = []
    for path in paths:
        if not os.path.isdir(path):
            train.append(path)
            continue
        found = _first_there(path, _TRAIN_NAMES)
        if found is None:
            raise FileNotFoundError(
                f"{path}: no train.json in that folder; expected train.json, and dev.json if you like"
            )
        train.append(found)
        dev_path = dev_path or _first_there(path, _DEV_NAMES)
    return train, dev_path


def read(paths: Sequence[str], weights: Sequence[float] | None, on_bad_row: str, needs_scores: bool) -> TrainingRows:
    """Read the training files.

    Raises:
        RecordError: a bad row, or one without the teacher's scores that the loss needs.
        OSError, ValueError: a file that cannot be read or holds no rows.
    """
    builder = _Builder(needs_scores)
    rejected, digests = [], []
    for number, path in enumerate(paths):
        source = Source(path, ("query", "pos_passage"), on_bad_row)
        for record in source:
            builder.add(record, number, path)
        rejected += source.rejected
        digests.append(source.digest)
    rows = builder.finish(list(weights or [1.0] * len(paths)))
    rows.rejected, rows.digests = rejected, digests
    return rows


class _Builder:
    """Numbers texts as rows come in."""

    def __init__(self, needs_scores: bool):
        self.needs_scores = needs_scores
        self.query_numbers: dict[str, int] = {}
        self.passage_numbers: dict[str, int] = {}
        self.queries: list[str] = []
        self.passages: list[str] = []
        self.rows: list[tuple[int, list[int], list[int], dict[int, float], int]] = []
        self.known: list[set[int]] = []

    def add(self, record: Record, source: int, path: str) -> None:
        query = self.query_numbers.setdefault(fold(record.query), len(self.queries))
        if query == len(self.queries):
            self.queries.append(record.query)
            self.known.append(set())
        positives = [self._passage(text) for text in record.pos_passage]
        negatives = [self._passage(text) for text in record.neg_passage]
        self.known[query].update(positives)
        scores = {**_scores(record, "neg", negatives, path), **_scores(record, "pos", positives, path)}
        if self.needs_scores and len(scores) < len({*positives, *negatives}):
            raise RecordError(path, record.line, "pos_scores or neg_scores missing; this loss learns from both")
        self.rows.append((query, _unique(positives), _unique(negatives), scores, source))

    def _passage(self, text: str) -> int:
        number = self.passage_numbers.setdefault(fold(text), len(self.passages))
        if number == len(self.passages):
            self.passages.append(text)
        return number

    def finish(self, weights: list[float]) -> TrainingRows:
        queries, positives, negatives, scores, sources = zip(*self.rows, strict=True)
        kept = [[p for p in row if p not in self.known[q]] for q, row in zip(queries, negatives, strict=True)]
        return TrainingRows(
            queries=self.queries,
            query_ids=np.array(queries, np.int64),
            passages=self.passages,
            positives=[np.array(row, np.int64) for row in positives],
            negatives=[np.array(row, np.int64) for row in kept],
            scores=list(scores),
            sources=np.array(sources, np.int64),
            weights=weights,
            known_positives=self.known,
            n_false=sum(map(len, negatives)) - sum(map(len, kept)),
        )


@dataclass(frozen=True)
class Plan:
    """Which examples meet in which batch: the same for any number of ranks.

    Each epoch shuffles anew, draws each row's positive and negatives anew, and keeps equal queries and equal
    positives out of one batch where it can; where it cannot, they stay, and the loss masks them.

    Args:
        batch_size: queries in a batch, over all ranks.
        n_ranks: a last batch that is too small to give every rank a query is left out.
        multiple: the number of batches is cut to a multiple of this (gradient accumulation).
        hard_batches: queries meet whose positives are each other's negatives. They are hard negatives that cost
            nothing, as topic-aware sampling's are (Hofstaetter et al., 2021).
    """

    rows: TrainingRows
    batch_size: int
    group_size: int
    seed: int
    n_ranks: int = 1
    group_by_source: bool = False
    drop_last: bool = False
    multiple: int = 1
    hard_batches: bool = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        total = sum(self._n_batches(size) for size in self._group_sizes())
        return total // self.multiple * self.multiple if total >= self.multiple else total

    def epoch(self, number: int) -> list[list[Example]]:
        """The batches of an epoch."""
        rng = np.random.default_rng([self.seed, number])
        batches = []
        for group in self._groups(number, rng):
            examples = [self._example(number, row, copy) for row, copy in group]
            if self.hard_batches:
                examples = self._chained(examples)
            dealt = self._deal(examples)
            batches += dealt[: self._n_batches(len(group))]
        if self.group_by_source or self.hard_batches:
            # Neither should the files take turns, nor the rows that no chain took all come last.
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches[: len(self)]

    def _n_batches(self, n: int) -> int:
        full, rest = divmod(n, self.batch_size)
        return full + (not self.drop_last and rest >= max(2, self.n_ranks))

    def _counts(self) -> np.ndarray:
        """Entries of each file in an epoch."""
        sizes = np.bincount(self.rows.sources, minlength=len(self.rows.weights))
        return np.maximum(np.rint(sizes * np.array(self.rows.weights)), 1).astype(np.int64)

    def _group_sizes(self) -> list[int]:
        counts = self._counts()
        return counts.tolist() if self.group_by_source else [int(counts.sum())]

    def _groups(self, number: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
        """Shuffled (row, copy) pairs: one list a file, or one in all."""
        groups = []
        for source, count in enumerate(self._counts()):
            rows = np.flatnonzero(self.rows.sources == source)
            copies, rest = divmod(int(count), len(rows))
            drawn = [np.stack([rows, np.full(len(rows), copy)], 1) for copy in range(copies)]
            some = rng.permutation(rows)[:rest]
            drawn.append(np.stack([some, np.full(rest, copies)], 1))
            groups.append(np.concatenate(drawn))
        if not self.group_by_source:
            groups = [np.concatenate(groups)]
        return [[(int(row), int(copy)) for row, copy in rng.permutation(group)] for group in groups]

    def _example(self, epoch: int, row: int, copy: int) -> Example:
        rows = self.rows
        rng = np.random.default_rng([self.seed, epoch, row, copy])
        positives, negatives = rows.positives[row], rows.negatives[row]
        positive = positives[rng.integers(len(positives))]
        wanted = self.group_size - 1
        drawn = rng.permutation(negatives)[:wanted]
        if len(drawn) < wanted:
            drawn = np.concatenate([drawn, self._random_negatives(rng, row, drawn, wanted - len(drawn))])
        return Example(row, int(rows.query_ids[row]), np.concatenate([[positive], drawn]).astype(np.int64))

    def _random_negatives(self, rng: np.random.Generator, row: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """Other queries' positives, for a row that has too few negatives of its own."""
        pool = self.rows.all_positives
        forbidden = self.rows.known_positives[int(self.rows.query_ids[row])] | set(drawn.tolist())
        found: list[int] = []
        for passage in rng.choice(pool, min(len(pool), count + len(forbidden)), replace=False).tolist():
            if passage not in forbidden and len(found) < count:
                found.append(passage)
        # A corpus of a few passages may not hold enough of them: then they repeat, or known positives, which
        # the loss masks, stand in.
        while len(found) < count:
            found.append(found[0] if found else int(pool[0]))
        return np.array(found, np.int64)

    def _chained(self, examples: list[Example]) -> list[Example]:
        """The examples in chains of a batch's length.

        A chain begins at the first example that is left, and takes in, for each of its members in turn, examples
        whose positives are the row's first negatives (mining writes the nearest first), and then its others.
        """
        waiting: dict[int, list[Example]] = {}
        for example in reversed(examples):
            waiting.setdefault(int(example.passages[0]), []).append(example)
        ordered: list[Example] = []
        for first in examples:
            own = waiting[int(first.passages[0])]
            if not own or own[-1] is not first:
                continue  # an earlier chain took it
            chain, met = [own.pop()], {int(first.passages[0])}
            for part in (slice(_CHAINED), slice(_CHAINED, None)):
                for member in chain:  # which grows meanwhile
                    for passage in self.rows.negatives[member.row][part].tolist():
                        if len(chain) < self.batch_size and passage not in met and waiting.get(passage):
                            chain.append(waiting[passage].pop())
                            met.add(passage)
            ordered += chain
        return ordered

    def _deal(self, examples: list[Example]) -> list[list[Example]]:
        """Batches in which no query and no positive comes twice, as far as possible."""
        batches: list[list[Example]] = []
        waiting: list[Example] = []
        fresh = iter(examples)
        left = len(examples)
        while left:
            size = min(self.batch_size, left)
            batch: list[Example] = []
            put_aside: list[Example] = []
            taken: set[tuple[str, int]] = set()
            look_back, beyond = waiting[: _LOOK_BACK * size], waiting[_LOOK_BACK * size :]
            for example in look_back:
                _place(example, batch, put_aside, taken, size)
            while len(batch) < size and len(put_aside) <= _LOOK_BACK * size:
                example = next(fresh, None)
                if example is None:
                    break
                _place(example, batch, put_aside, taken, size)
            missing = size - len(batch)
            batch += put_aside[:missing]
            waiting = put_aside[missing:] + beyond
            while len(batch) < size:
                batch.append(waiting.pop(0) if waiting else next(fresh))
            batches.append(batch)
            left -= size
        return batches


class Collator:
    """Makes one rank's ``TrainingBatch`` of a planned batch.

    Args:
        tokenizers, templates: of queries and of passages.
        shared: True if every rank's passages are negatives of every query.
    """

    def __init__(
        self,
        rows: TrainingRows,
        group_size: int,
        tokenizers: tuple[Tokenizer, Tokenizer],
        templates: tuple[str, str],
        rank: int = 0,
        n_ranks: int = 1,
        shared: bool = True,
        needs_scores: bool = False,
    ):
        self.rows, self.group_size, self.needs_scores = rows, group_size, needs_scores
        self.tokenizers, self.templates = tokenizers, templates
        self.rank, self.n_ranks, self.shared = rank, n_ranks, shared

    def __call__(self, examples: list[Example], number: int) -> TrainingBatch:
        parts = np.array_split(np.arange(len(examples)), self.n_ranks)
        own = [examples[i] for i in parts[self.rank]]
        whole = examples if self.shared else own
        return TrainingBatch(
            query_tokens=self._tokens(0, [self.rows.queries[example.query_id] for example in own]),
            passage_tokens=self._tokens(1, [self.rows.passages[p] for example in own for p in example.passages]),
            ignored=ignored(self.rows, whole),
            scores=self._scores(whole) if self.needs_scores else None,
            counts=[len(part) for part in parts],
            number=number,
        )

    def _tokens(self, side: int, texts: list[str]) -> list[Sequence[int]]:
        return self.tokenizers[side]([self.templates[side].replace("{text}", text) for text in texts])

    def _scores(self, examples: list[Example]) -> np.ndarray:
        by_row = [[self.rows.scores[e.row].get(int(p), np.nan) for p in e.passages] for e in examples]
        return np.array(by_row, np.float32)


def ignored(rows: TrainingRows, examples: list[Example]) -> np.ndarray:
    """Which passages of a batch are no negatives of its queries, bool [n, n * g]: the known positives.

    A query's own positive, at column i * g, is False: it is no negative, but the loss needs it.
    """
    columns: dict[int, list[int]] = {}
    for column, passage in enumerate(np.concatenate([example.passages for example in examples]).tolist()):
        columns.setdefault(passage, []).append(column)
    group_size = len(examples[0].passages)
    mask = np.zeros((len(examples), len(examples) * group_size), bool)
    for i, example in enumerate(examples):
        for passage in rows.known_positives[example.query_id] & columns.keys():
            mask[i, columns[passage]] = True
        mask[i, i * group_size] = False
    return mask


@dataclass
class Preflight:
    """What the data will be to the training, found out before the first step."""

    facts: dict[str, float]
    warnings: list[str]


def preflight(
    plan: Plan, tokenizers: tuple[Tokenizer, Tokenizer], templates: tuple[str, str], limits: tuple[int, int],
    loss_takes_batch: bool = True, n_parts: int = 1,
) -> Preflight:  # fmt: skip
    """Look the data over.

    Args:
        tokenizers: that do not cut texts.
        limits: the longest query and passage in tokens.
        loss_takes_batch: False for losses that see a query's own group only.
        n_parts: into how many parts a batch falls whose passages are no negatives of each other.
    """
    rows = plan.rows
    facts: dict[str, float] = {"rows": len(rows), "passages": len(rows.passages)}
    warnings = []
    for side, (name, texts) in enumerate((("queries", rows.queries), ("passages", rows.passages))):
        lengths = _lengths(tokenizers[side], templates[side], texts)
        cut = float((lengths > limits[side]).mean())
        facts |= {f"{name}_median_tokens": float(np.median(lengths)), f"{name}_cut_share": round(cut, 4)}
        if cut > _MUCH_CUT:
            warnings.append(
                f"{cut:.0%} of the {name} are longer than max_{('query', 'passage')[side]}_len = {limits[side]} "
                f"tokens (half are longer than {np.median(lengths):.0f}); what is cut off cannot be learnt"
            )
    counts = np.array([len(row) for row in rows.negatives])
    wanted = plan.group_size - 1
    facts |= {"rows_without_negatives": int((counts == 0).sum()), "negatives_that_are_positives": rows.n_false}
    if wanted == 0 and counts.any() and not plan.hard_batches:
        warnings.append(
            f"group_size is 1, so the hard negatives of {int((counts > 0).sum()):,} rows go unused; hard_batches uses "
            "those that are other rows' positives"
        )
    short = int((counts < wanted).sum())
    if short:
        warnings.append(
            f"{short:,} of {len(rows):,} rows have fewer than {wanted} negatives ({int((counts == 0).sum()):,} have "
            "none); other queries' positives fill the gaps"
        )
    if rows.n_false:
        warnings.append(f"{rows.n_false:,} negatives are named elsewhere as positives of the same query and left out")
    if not len(plan):
        raise ValueError(
            f"{len(rows)} rows make no batch of {plan.batch_size} over {plan.n_ranks} ranks; expected more"
        )
    duplicates, seen, own = 0, [], []
    for batch in plan.epoch(0)[:_SAMPLE_BATCHES]:
        for part in np.array_split(np.arange(len(batch)), n_parts):
            mask = ignored(rows, [batch[i] for i in part])
            duplicates += int(mask.sum())
            seen.append((~mask).sum(1) - 1 if loss_takes_batch else np.full(len(part), wanted))
            passages = [set(batch[i].passages.tolist()) for i in part]
            present = set().union(*passages)
            for i, group in zip(part, passages, strict=True):
                seen_by_it = present if loss_takes_batch else group
                own.append(sum(passage in seen_by_it for passage in rows.negatives[batch[i].row].tolist()))
    facts |= {
        "batches_an_epoch": len(plan),
        "masked_pairs_a_batch": round(duplicates / min(len(plan), _SAMPLE_BATCHES), 2),
        "negatives_a_query_sees": round(float(np.concatenate(seen).mean()), 1),
        "own_negatives_a_query_sees": round(float(np.mean(own)), 1),
    }
    return Preflight(facts, warnings)


class Loader:
    """The batches of an epoch, for the Trainer's loop; ``set_epoch`` says of which."""

    def __init__(self, plan: Plan, collate: Collator):
        self.plan, self.collate, self.number = plan, collate, 0
        self.dataset = plan.rows

    def set_epoch(self, number: int) -> None:
        """The epoch that the next iteration goes through."""
        self.number = number

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[TrainingBatch]:
        for i, examples in enumerate(self.plan.epoch(self.number)):
            yield self.collate(examples, self.number * len(self.plan) + i)


def _place(example: Example, batch: list, put_aside: list, taken: set, size: int) -> None:
    """Into the batch if there is room and neither its query nor its positive is there yet, else aside."""
    keys = {("query", example.query_id), ("positive", int(example.passages[0]))}
    if len(batch) < size and not taken & keys:
        batch.append(example)
        taken |= keys
    else:
        put_aside.append(example)


def _first_there(folder: str, names: Sequence[str]) -> str | None:
    return next((path for name in names if os.path.isfile(path := os.path.join(folder, name))), None)


def _scores(record: Record, side: str, passages: list[int], path: str) -> dict[int, float]:
    """A teacher's scores of a row's positives or negatives, by passage."""
    key = f"{side}_scores"
    scores = record.row.get(key)
    if scores is None:
        return {}
    if not isinstance(scores, list) or len(scores) != len(passages):
        raise RecordError(path, record.line, f'"{key}" does not fit; expected a list of {len(passages)} numbers')
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
            raise RecordError(path, record.line, f'"{key}" holds {score!r}; expected finite numbers')
    return dict(zip(passages, map(float, scores), strict=True))


def _unique(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


def _lengths(tokenizer: Tokenizer, template: str, texts: list[str]) -> np.ndarray:
    step = -(-len(texts) // _SAMPLE_TEXTS)
    return np.array([len(ids) for ids in tokenizer([template.replace("{text}", text) for text in texts[::step]])])
