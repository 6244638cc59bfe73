"""A mined row in the shapes that training tools read."""

from collections.abc import Callable
from typing import NamedTuple

from ..files.jsonl import passages_key

_PASSAGE_KEYS = ("pos_passage", "pos", "neg_passage", "neg")
# What a row says of the negatives that it had, and is not true of those that it gets.
_OF_NEGATIVES = ("neg_passage", "neg", "neg_scores", "neg_backfilled")


class MinedRow(NamedTuple):
    """One input row with what was mined for it. n_backfilled: how many negatives, at the end, are random."""

    row: dict
    query: str
    positives: list[str]
    negatives: list[str]
    pos_scores: list[float]
    neg_scores: list[float]
    n_backfilled: int


def writer(name: str, with_scores: bool, answer_key: str, no_answer_text: str) -> Callable[[MinedRow], list[dict]]:
    """What turns a mined row into output rows; ``name`` is one of arguments.FORMATS."""
    if name == "context_qa":
        return lambda mined: _context_qa(mined, answer_key, no_answer_text)
    shape = {
        "list": _list, "flagembedding": _flagembedding, "triplet": _triplet, "n-tuple": _n_tuple,
        "labeled-list": _labeled_list,
    }[name]  # fmt: skip
    return lambda mined: shape(mined, with_scores)


def answer_of(row: dict, key: str) -> str | None:
    """The row's answer: a string, or the first string of a list; None if there is none."""
    value = row.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and value.strip() else None


def as_list(mined: MinedRow) -> dict:
    """The row with its negatives, in place of those that it had, and of what was said of those.

    They are called ``neg`` where the row calls its positives ``pos``.
    """
    name = "neg" if passages_key(mined.row, "pos_passage") == "pos" else "neg_passage"
    return {key: value for key, value in mined.row.items() if key == name or key not in _OF_NEGATIVES} | {
        name: mined.negatives
    }


def _list(mined: MinedRow, with_scores: bool) -> list[dict]:
    return [as_list(mined) | _extras(mined, with_scores)]


def _flagembedding(mined: MinedRow, with_scores: bool) -> list[dict]:
    known = {"query": mined.query, "pos": mined.positives, "neg": mined.negatives}
    rest = {key: value for key, value in mined.row.items() if key not in ("query", *_PASSAGE_KEYS, *_OF_NEGATIVES)}
    return [known | rest | _extras(mined, with_scores)]


def _extras(mined: MinedRow, with_scores: bool) -> dict:
    extras: dict = {"pos_scores": mined.pos_scores, "neg_scores": mined.neg_scores} if with_scores else {}
    if mined.n_backfilled:
        extras["neg_backfilled"] = mined.n_backfilled
    return extras


def _triplet(mined: MinedRow, with_scores: bool) -> list[dict]:
    return [
        {"anchor": mined.query, "positive": positive, "negative": negative}
        | ({"scores": [pos_score, neg_score]} if with_scores else {})
        for positive, pos_score in zip(mined.positives, mined.pos_scores, strict=True)
        for negative, neg_score in zip(mined.negatives, mined.neg_scores, strict=True)
    ]


def _n_tuple(mined: MinedRow, with_scores: bool) -> list[dict]:
    negatives = {f"negative_{i}": text for i, text in enumerate(mined.negatives, 1)}
    return [
        {"anchor": mined.query, "positive": positive, **negatives}
        | ({"scores": [pos_score, *mined.neg_scores]} if with_scores else {})
        for positive, pos_score in zip(mined.positives, mined.pos_scores, strict=True)
    ]


def _labeled_list(mined: MinedRow, with_scores: bool) -> list[dict]:
    row: dict = {"query": mined.query, "docs": mined.positives + mined.negatives}
    if with_scores:
        return [row | {"scores": mined.pos_scores + mined.neg_scores}]
    return [row | {"labels": [1] * len(mined.positives) + [0] * len(mined.negatives)}]


def _context_qa(mined: MinedRow, answer_key: str, no_answer_text: str) -> list[dict]:
    answer = answer_of(mined.row, answer_key)
    rows = [{"context": text, "question": mined.query, "answer": answer} for text in mined.positives]
    return rows + [{"context": text, "question": mined.query, "answer": no_answer_text} for text in mined.negatives]


def negatives_in(rows: list[dict], n: int, name: str) -> list[str]:
    """The ``n`` negatives that the output rows of one mined row have; ``name`` is one of arguments.FORMATS."""
    if n == 0:
        return []
    if name == "triplet":
        return [row["negative"] for row in rows[:n]]  # of the first positive
    if name == "n-tuple":
        return [rows[0][f"negative_{i}"] for i in range(1, n + 1)]
    if name == "labeled-list":
        return rows[0]["docs"][-n:]
    if name == "context_qa":
        return [row["context"] for row in rows[-n:]]
    return rows[0][passages_key(rows[0], "neg_passage")]
