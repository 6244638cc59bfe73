"""TREC run and qrels files, the formats of trec_eval and its like."""

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .jsonl import RecordError, read_lines, set_aside

logger = logging.getLogger(__name__)

# The last column of a run: who made it.
_TAG = "embedding_evaluate"


def read_run(
    path: str,
    queries: dict[str, int],
    passages: dict[str, int],
    n_candidates: int,
    rejected: list[RecordError] | None = None,
    passes_unknown_queries: bool = False,
    older: tuple[dict[str, int], dict[str, int]] = ({}, {}),
) -> list[list[int]]:
    """The passages that a TREC run lists for each query, best score first, equal scores in file order.

    Args:
        queries, passages: rows by their ids.
        n_candidates: passages from this row on are known, but not among those that may be found, and are left out.
        rejected: collects bad lines, if given.
        passes_unknown_queries: lines of other queries are passed over, as trec_eval does.
        older: what else queries and passages may be called, which a log line tells.

    Raises:
        RecordError: a line that is not ``query Q0 passage rank score tag``, or an id that is unknown.
    """
    found: dict[str, dict[int, float]] = {}
    n_lines = n_left_out = n_older = 0
    for raw in read_lines(path):
        n_lines += 1
        try:
            name, text, score = _run_line(raw.content, path, raw.number)
            passage = _known(text, passages, older[1], path, raw.number)
            n_older += (name not in queries and name in older[0]) or text not in passages
            if name not in queries and name not in older[0]:
                if passes_unknown_queries:
                    continue
                example = next(iter(queries))
                reason = f"unknown query id {name!r:.80}; expected one such as {example!r}"
                raise RecordError(path, raw.number, reason)
            ranked = found.setdefault(name, {})
            if passage in ranked:
                raise RecordError(path, raw.number, f"passage {text!r:.80} is named twice for query {name!r:.80}")
        except RecordError as error:
            set_aside(error, rejected)
            continue
        ranked[passage] = score
        n_left_out += passage >= n_candidates
    if n_older:
        logger.warning(
            "warning: %s: %d of %d lines name queries or passages by their numbers from 0, as write_corpus once did;"
            " now they are q and a line, d and a number from 1", path, n_older, n_lines,
        )  # fmt: skip
    if n_left_out:
        logger.info("%s: %d of %d lines name passages that are not searched; left out", path, n_left_out, n_lines)
    if n_lines == 0:
        raise ValueError(f"{path}: the file is empty; expected lines of query id, Q0, passage id, rank, score, tag")
    merged: list[dict[int, float]] = [{} for _ in range(max(queries.values()) + 1)]
    for name, scores in found.items():  # one query may have several ids
        own = merged[queries[name] if name in queries else older[0][name]]
        for passage, score in scores.items():
            if passage < n_candidates:
                own[passage] = max(score, own.get(passage, score))
    return [sorted(scores, key=lambda passage: -scores[passage]) for scores in merged]


def _known(name: str, passages: dict[str, int], older: dict[str, int], path: str, line: int) -> int:
    """A passage's row."""
    if name not in passages and name not in older:
        example = next(iter(passages))
        raise RecordError(path, line, f"unknown passage id {name!r:.80}; expected one such as {example!r}")
    return passages[name] if name in passages else older[name]


def _run_line(content: bytes, path: str, line: int) -> tuple[str, str, float]:
    """The query's id, the passage's, and the score."""
    try:
        columns = content.decode().split()
    except UnicodeDecodeError:
        raise RecordError(path, line, "the line is not UTF-8; expected UTF-8 text") from None
    if len(columns) != 6:
        spaced = " ".join(columns[2:-3])
        hint = f"; {spaced!r:.80} cannot be a passage id, as it holds white space" if len(columns) > 6 else ""
        reason = f"{len(columns)} columns; expected 6: query id, Q0, passage id, rank, score, tag{hint}"
        raise RecordError(path, line, reason)
    query, _, passage, _, score, _ = columns
    try:
        value = float(score)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise RecordError(path, line, f"the score is {score!r:.40}; expected a number")
    return query, passage, value


def check_ids(query_ids: Iterable[str], passage_ids: Iterable[str]) -> None:
    """Columns are parted by white space, so an id must hold none.

    Raises:
        ValueError: an id that cannot be written.
    """
    for what, ids in (("query", query_ids), ("passage", passage_ids)):
        for name in ids:
            if len(name.split()) != 1 or name != name.strip():
                raise ValueError(f"the {what} id {name!r:.80} holds white space; write_trec needs ids without it")


def falling_scores(scores: np.ndarray) -> np.ndarray:
    """Scores of one ranking as float32, each strictly below the one before.

    trec_eval reads float32, sorts by it and settles ties by id; so that it sees the ranking that was
    judged here, a score that float32 cannot tell from the one above it goes down by its last bit.
    """
    falling = np.asarray(scores, np.float32).copy()
    for place in range(1, len(falling)):
        if not falling[place] < falling[place - 1]:
            falling[place] = np.nextafter(falling[place - 1], np.float32(-np.inf))
    return falling


def run_lines(query_id: str, passage_ids: Sequence[str], scores: np.ndarray) -> str:
    """One query's ranking, best first."""
    lines = [
        f"{query_id} Q0 {passage_id} {rank} {score} {_TAG}\n"
        for rank, (passage_id, score) in enumerate(zip(passage_ids, falling_scores(scores), strict=True), 1)
    ]
    return "".join(lines)


def qrels_lines(judgments: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Of each judgment's query id, passage id and grade."""
    for query_id, passage_id, grade in judgments:
        yield f"{query_id} 0 {passage_id} {grade}\n"
