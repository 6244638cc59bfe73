"""Pairs of queries that show a person what a threshold does, on both of its sides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..files import report
from ..search.scores import plain, scores_of
from .greedy import DedupResult

if TYPE_CHECKING:
    from .job import Removed

# Pairs shown of each kind, and the characters of a query.
_SHOWN, _WIDTH = 5, 50
# Kept queries whose nearest kept query is looked for, and how many of those are compared at a time.
_SAMPLE, _BLOCK = 512, 1 << 14
# The parts of the way from the threshold to 1 that removals are shown of, beside those nearest to the threshold.
_BANDS = (1 / 3, 2 / 3)


def removed(texts: Sequence[str], first: np.ndarray, rows: Sequence["Removed"]) -> list[dict]:
    """Removals of similar queries, each pair of texts once, by ascending cosine: those that the threshold decided the
    most narrowly, and one from each higher band.

    Args:
        texts, first: each row's query, and the first row of that text.
    """
    similar = sorted((r for r in rows if r.reason == "similar"), key=lambda r: r.score)
    pairs = {(int(first[r.row]), r.kept_row): r for r in reversed(similar)}
    ordered = sorted(pairs.values(), key=lambda r: r.score)
    shown, rest = ordered[:_SHOWN], ordered[_SHOWN:]
    for band in _BANDS:
        lowest = ordered[0].score + band * (1 - ordered[0].score) if ordered else 1.0
        shown += [r for r in rest if r.score >= lowest and r not in shown][:1]
    return [_pair(r.score, texts[r.row], texts[r.kept_row]) for r in shown]


def kept(vectors: np.ndarray, result: DedupResult, texts: Sequence[str], groups: np.ndarray) -> list[dict]:
    """Kept queries (of a sample, where there are many) that are nearest to another one, by descending cosine: first
    such as stayed because their answers differ, then those below the threshold.

    Args:
        vectors: float32 [n, dim] of the queries ``texts``; their answers are equal where ``groups`` are.
    """
    rows = result.kept_rows
    if len(rows) < 2:
        return []
    rng = np.random.default_rng(0)
    asked = rows if len(rows) <= _SAMPLE else np.sort(rng.choice(rows, _SAMPLE, replace=False))
    own = plain(vectors[asked])
    best, where = np.full(len(asked), -np.inf, np.float32), np.zeros(len(asked), np.int64)
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        products = own @ plain(vectors[part]).T
        products[asked[:, None] == part] = -np.inf
        nearest = products.argmax(axis=1)
        score = products[np.arange(len(asked)), nearest]
        better = score > best
        best[better], where[better] = score[better], part[nearest[better]]
    scores = scores_of(vectors, asked, vectors, where)
    shown, seen = [], set()
    for above in (True, False):
        n_before = len(shown)
        for i in np.argsort(-scores, kind="stable").tolist():
            pair = frozenset((int(asked[i]), int(where[i])))
            if (scores[i] >= result.threshold) == above and pair not in seen and len(shown) - n_before < _SHOWN:
                seen.add(pair)
                same = bool(groups[asked[i]] == groups[where[i]])
                shown.append(_pair(float(scores[i]), texts[asked[i]], texts[where[i]]) | {"same_answers": same})
    return shown


def _pair(score: float, query: str, other: str) -> dict:
    shown = report.differing(query, other, _WIDTH)
    return {"cosine": score, "query": shown[0], "kept_query": shown[1]}


def lines(closest: Sequence[dict], nearest: Sequence[dict]) -> list[str]:
    """Both kinds of pairs, for a person."""
    shown = []
    if closest:
        shown.append("removed, those closest to the threshold first (all are in <output>.removed.jsonl):")
        shown += map(_line, closest)
    if nearest:
        shown.append("kept, those closest to another kept query first:")
        shown += map(_line, nearest)
    return shown


def _line(pair: dict) -> str:
    why = "" if pair.get("same_answers", True) else "  (other answers)"
    return f"  {pair['cosine']:.4f}  {pair['query']}  ~  {pair['kept_query']}{why}"
