"""Retrieval metrics: the formulae, the value of each query, and the mean over all of them.

Binary metrics call a passage relevant when its grade is at least 1, as trec_eval does by default. Every
mean is over all queries: one that finds nothing, or for which nothing is judged relevant, counts 0 and
stays in the denominator. What is asked for is written ``name@k``, such as ``ndcg@10``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Relevance(NamedTuple):
    """What was found for each query, and what there was to find.

    grades: float64 [q, width], the grade of the passage at each rank, best first; 0 where it is not
        relevant or there is none. The width is the largest cut-off, or less if the corpus is smaller.
    ideal: float64 [q, largest cut-off], the highest grades of all judged passages, descending, whether or
        not they were found or are in the corpus; 0 where there are no more.
    n_relevant: int64 [q], the number of judged passages with a grade of at least 1.
    """

    grades: np.ndarray
    ideal: np.ndarray
    n_relevant: np.ndarray

    @classmethod
    def of_hits(cls, hits: np.ndarray, n_relevant: np.ndarray, deepest: int) -> "Relevance":
        """Binary relevance: ``hits`` bool [q, width], and cut-offs of at most ``deepest``."""
        ideal = (np.arange(deepest) < np.asarray(n_relevant)[:, None]).astype(np.float64)
        return cls(np.asarray(hits, np.float64), ideal, np.asarray(n_relevant, np.int64))


def hit_rate(relevance: Relevance, k: int) -> np.ndarray:
    """1 if any of the first k passages is relevant, else 0: float64 [q].

    trec_eval's ``success_k``; accuracy@k in sentence-transformers.
    """
    return _hits(relevance, k).any(axis=1).astype(np.float64)


def precision(relevance: Relevance, k: int) -> np.ndarray:
    """Relevant passages among the first k, divided by k (by k even if fewer were found): float64 [q].

    trec_eval's ``P_k``.
    """
    return _hits(relevance, k).sum(axis=1) / k


def recall(relevance: Relevance, k: int) -> np.ndarray:
    """Relevant passages among the first k, divided by all that are judged relevant: float64 [q].

    trec_eval's ``recall_k``. It cannot reach 1 for a query with more than k relevant passages.
    """
    return _hits(relevance, k).sum(axis=1) / np.maximum(relevance.n_relevant, 1)


def mrr(relevance: Relevance, k: int) -> np.ndarray:
    """1 / rank of the first relevant passage, 0 if none is among the first k: float64 [q].

    trec_eval's ``recip_rank`` of a run cut at k (Voorhees, TREC-8 question answering track, 1999).
    """
    hits = _hits(relevance, k)
    if hits.shape[1] == 0:
        return np.zeros(len(hits))
    return np.where(hits.any(axis=1), 1.0 / (hits.argmax(axis=1) + 1), 0.0)


def average_precision(relevance: Relevance, k: int) -> np.ndarray:
    """The sum of precision@i over the ranks i <= k that hold a relevant passage, divided by all relevant: float64 [q].

    trec_eval's ``map_cut_k``. sentence-transformers divides by min(k, relevant) instead; the two agree
    for every query with at most k relevant passages.
    """
    hits = _hits(relevance, k)
    precisions = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (precisions * hits).sum(axis=1) / np.maximum(relevance.n_relevant, 1)


def ndcg(relevance: Relevance, k: int) -> np.ndarray:
    """DCG@k of the ranking over DCG@k of the best ranking possible: float64 [q].

    DCG@k is the sum over ranks i <= k of grade / log2(i + 1), so the gain is the grade itself (Järvelin
    and Kekäläinen, ACM TOIS 20(4), 2002, with the logarithm's base 2), not 2^grade - 1. trec_eval's
    ``ndcg_cut_k``: the ideal ranking holds all judged passages, and grades below 0 gain nothing.
    """
    found, best = (_dcg(grades[:, :k]) for grades in (relevance.grades, relevance.ideal))
    shares = np.divide(found, best, out=np.zeros_like(found), where=best > 0)
    # Both sums of a perfect ranking are the same numbers, but not added in the same order.
    return np.minimum(shares, 1.0)


FORMULAE: dict[str, Callable[[Relevance, int], np.ndarray]] = {
    "hit_rate": hit_rate,
    "mrr": mrr,
    "ndcg": ndcg,
    "recall": recall,
    "precision": precision,
    "map": average_precision,
}


def split_name(name: str) -> tuple[str, int]:
    """``"ndcg@10"`` as ``("ndcg", 10)``."""
    metric, _, k = name.rpartition("@")
    return metric, int(k)


def is_name(name: str) -> bool:
    """Whether this is what a metric is called, such as ``ndcg@10``."""
    metric, _, k = name.rpartition("@")
    return metric in FORMULAE and k.isdecimal()


def per_query(relevance: Relevance, names: Sequence[str]) -> np.ndarray:
    """The named metrics of each query: float64 [q, len(names)]."""
    values = np.empty((len(relevance.grades), len(names)), np.float64)
    for column, name in enumerate(names):
        metric, k = split_name(name)
        values[:, column] = FORMULAE[metric](relevance, k)
    return values


def compute(relevance: Relevance, names: Sequence[str]) -> dict[str, float]:
    """The named metrics' means over all queries."""
    return aggregate(per_query(relevance, names), names)


def aggregate(values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Means over all queries of ``values``, float64 [q, len(names)]."""
    return dict(zip(names, values.mean(axis=0).tolist(), strict=True))


def _hits(relevance: Relevance, k: int) -> np.ndarray:
    return relevance.grades[:, :k] >= 1


def _dcg(grades: np.ndarray) -> np.ndarray:
    return (np.maximum(grades, 0.0) / np.log2(np.arange(2, grades.shape[1] + 2))).sum(axis=1)
