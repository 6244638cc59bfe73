"""Training rows: the files are read, texts get numbers, and known positives are told from negatives."""

import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..files.jsonl import Record, RecordError, Source, fold
from ..files.ragged import Ragged
from ..files.row_keys import ALONE, KeyCounts, prompt_of, type_of

logger = logging.getLogger(__name__)

# A teacher's score above this is a mistake; its square must still be a float32.
_LARGEST_SCORE = 1e15
_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# FlagEmbedding's name for files and folders whose rows are all trained without in-batch negatives.
_ALONE_SUFFIX = "no_in_batch_neg"


@dataclass
class TrainingRows:
    """All rows of all files. Texts that are equal after folding share one number.

    query_ids: int64 [n], a row's query.
    positives, negatives: for each row, the numbers of its passages; no negative is a known positive.
    scores: for each row, a teacher's scores by passage number; empty where the loss learns from none.
    sources: int64 [n], the file that a row comes from.
    known_positives: for each query, every passage that any row names as its positive.
    n_false: negatives left out because some row names them as a positive of the same query.
    prompts: by row, what stands before its query in place of a template.
    types: by row, a type of ``row_keys`` that asks for anything.
    alone: bool [n], rows whose queries and passages are no in-batch negatives of others, and have none.
    """

    queries: list[str]
    query_ids: np.ndarray
    passages: list[str]
    positives: Ragged
    negatives: Ragged
    scores: list[dict[int, float]]
    sources: np.ndarray
    weights: list[float]
    known_positives: list[set[int]]
    n_false: int
    prompts: dict[int, str]
    types: dict[int, str]
    alone: np.ndarray
    keys: KeyCounts
    rejected: list[RecordError] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.query_ids)

    @cached_property
    def all_positives(self) -> np.ndarray:
        """The passages that are some query's positive, ascending; random negatives are drawn from them."""
        return np.unique(self.positives.values)


class DataFiles(NamedTuple):
    """The training files, how often an epoch goes through each, and the dev files, if there are any."""

    train: list[str]
    weights: list[float]
    dev: list[str]


def find_files(paths: Sequence[str], weights: Sequence[float] | None, dev_path: str | None) -> DataFiles:
    """The files of files or folders; a folder's weight holds for each of its files.

    Raises:
        FileNotFoundError: a folder without a training file, or a path that is not there.
    """
    found = DataFiles([], [], [] if dev_path is None else [dev_path])
    for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True):
        files = _of_folder(path, "train") if os.path.isdir(path) else [path]
        if not files:
            raise FileNotFoundError(_nothing_to_train_on(path))
        found.train.extend(files)
        found.weights.extend([weight] * len(files))
        if os.path.isdir(path) and not found.dev:
            found.dev.extend(_of_folder(path, "dev"))
    return found


def _of_folder(folder: str, name: str) -> list[str]:
    """``name``.json of a folder, or else all such files in its folder ``name``; PaddleNLP looks there, too."""
    inner = os.path.join(folder, name)
    files = _rows_in(inner)
    for ending in _ENDINGS:
        if os.path.isfile(inner + ending):
            if files:
                logger.info("%s is read, and not the files in %s", inner + ending, inner)
            return [inner + ending]
    if files:
        logger.info("%s: %d file%s", inner, len(files), "s" * (len(files) > 1))
    return files


def _rows_in(folder: str) -> list[str]:
    """A folder's files that may hold rows, by name."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [path for name in names if name.endswith(_ENDINGS) and os.path.isfile(path := os.path.join(folder, name))]


def _nothing_to_train_on(folder: str) -> str:
    """What was looked for in a folder, and what is there instead."""
    others = [os.path.basename(path) for path in _rows_in(folder)]
    there = (
        f"; it has {', '.join(others[:3])}{', ...' * (len(others) > 3)}, which can be given by name" if others else ""
    )
    return (
        f"{folder}: no train.json and no train/*.json (or {', '.join(_ENDINGS[1:])}) in that folder; expected one of"
        f" them, and dev.json or dev/*.json if you like{there}"
    )


def read(paths: Sequence[str], weights: Sequence[float] | None, on_bad_row: str, needs_scores: bool) -> TrainingRows:
    """Read the training files.

    A row's ``pos_scores`` and ``neg_scores`` are looked at only if ``needs_scores``; a row is bad then, too, if they
    are missing or do not fit. Bad rows are left out if ``on_bad_row`` is ``"skip"``.

    Raises:
        RecordError: a bad row.
        OSError, ValueError: a file that cannot be read or holds no usable rows.
    """
    builder = _Builder()
    rejected, digests = [], []
    for number, path in enumerate(paths):

        def scores_of(record: Record, path: str = path) -> dict[str, float]:
            return _scores(record, path) if needs_scores else {}

        source = Source(path, ("query", "pos_passage"), on_bad_row, check=scores_of)
        is_alone = _says_alone(path)
        for record in source:
            builder.add(record, scores_of(record), number, is_alone)
        rejected += source.rejected
        digests.append(source.digest)
    rows = builder.finish(list(weights or [1.0] * len(paths)))
    rows.rejected, rows.digests = rejected, digests
    return rows


class _Builder:
    """Numbers texts as rows come in."""

    def __init__(self) -> None:
        self.query_numbers: dict[str, int] = {}
        self.passage_numbers: dict[str, int] = {}
        self.queries: list[str] = []
        self.passages: list[str] = []
        self.known: list[set[int]] = []
        # Of each row; positives and negatives one row after another.
        self.query_ids, self.sources = array("q"), array("q")
        self.positives, self.n_positives = array("q"), array("q")
        self.negatives, self.n_negatives = array("q"), array("q")
        self.scores: list[dict[int, float]] = []
        self.prompts: dict[int, str] = {}
        self.types: dict[int, str] = {}
        self.alone = bytearray()
        self.keys = KeyCounts()

    def add(self, record: Record, scores: dict[str, float], source: int, is_alone: bool) -> None:
        """A row, with a teacher's scores by folded passage."""
        self._add_keys(record.row, is_alone)
        query = self.query_numbers.setdefault(fold(record.query), len(self.queries))
        if query == len(self.queries):
            self.queries.append(record.query)
            self.known.append(set())
        positives = _unique([self._passage(text) for text in record.pos_passage])
        negatives = _unique([self._passage(text) for text in record.neg_passage])
        self.known[query].update(positives)
        self.query_ids.append(query)
        self.sources.append(source)
        self.positives.extend(positives)
        self.n_positives.append(len(positives))
        self.negatives.extend(negatives)
        self.n_negatives.append(len(negatives))
        self.scores.append({self.passage_numbers[text]: score for text, score in scores.items()})

    def _add_keys(self, row: dict, is_alone: bool) -> None:
        self.keys.add(row)
        number, prompt, kind = len(self.query_ids), prompt_of(row), type_of(row)
        if prompt is not None:
            self.prompts[number] = prompt
        if kind is not None:
            self.types[number] = kind
        self.alone.append(is_alone or kind in ALONE)

    def _passage(self, text: str) -> int:
        number = self.passage_numbers.setdefault(fold(text), len(self.passages))
        if number == len(self.passages):
            self.passages.append(text)
        return number

    def finish(self, weights: list[float]) -> TrainingRows:
        named = Ragged.cut(self.n_negatives, np.asarray(self.negatives))
        known = (self.known[query] for query in self.query_ids)
        kept = Ragged.of([p for p in row.tolist() if p not in own] for row, own in zip(named, known, strict=True))
        return TrainingRows(
            queries=self.queries,
            query_ids=np.array(self.query_ids, np.int64),
            passages=self.passages,
            positives=Ragged.cut(self.n_positives, np.asarray(self.positives)),
            negatives=kept,
            scores=self.scores,
            sources=np.array(self.sources, np.int64),
            weights=weights,
            known_positives=self.known,
            n_false=len(named.values) - len(kept.values),
            prompts=self.prompts,
            types=self.types,
            alone=np.array(self.alone, bool),
            keys=self.keys,
        )


def _says_alone(path: str) -> bool:
    """Whether a file's name, or its folder's, says that no row of it has in-batch negatives."""
    folder, name = os.path.split(os.path.abspath(path))
    return folder.endswith(_ALONE_SUFFIX) or name.split(".")[0].endswith(_ALONE_SUFFIX)


def _scores(record: Record, path: str) -> dict[str, float]:
    """A teacher's scores of all of a row's passages, by folded text; a positive's own where it is a negative, too.

    Raises:
        RecordError: a passage has no score, or the scores do not fit.
    """
    found = {}
    for key, passages in (("neg_scores", record.neg_passage), ("pos_scores", record.pos_passage)):
        scores = record.row.get(key)
        if scores is None:
            continue
        if not isinstance(scores, list) or len(scores) != len(passages):
            raise RecordError(path, record.line, f'"{key}" does not fit; expected a list of {len(passages)} numbers')
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= _LARGEST_SCORE:
                raise RecordError(path, record.line, f'"{key}" holds {score!r:.40}; expected numbers of ordinary size')
        found |= dict(zip(map(fold, passages), map(float, scores), strict=True))
    if len(found) < len(set(map(fold, (*record.pos_passage, *record.neg_passage)))):
        raise RecordError(path, record.line, "pos_scores or neg_scores missing; this loss learns from both")
    return found


def _unique(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))
