"""TREC run and qrels files, the formats of trec_eval and its like."""

from collections.abc import Iterable, Sequence

import numpy as np

from utils.collection import Collection

# The last column of a run: who made it.
_TAG = "embedding_evaluate"


def check_ids(collection: Collection) -> None:
    """Columns are parted by white space, so an id must hold none.

    Raises:
        ValueError: an id that cannot be written.
    """
    for what, ids in (("query", collection.query_ids), ("passage", collection.passage_ids or ())):
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


def qrels_lines(collection: Collection) -> Iterable[str]:
    """Every judgment of every query."""
    for query, query_id in enumerate(collection.query_ids):
        for row, grade in collection.judgments.of_query(query):
            yield f"{query_id} 0 {collection.passage_id(row)} {grade}\n"
