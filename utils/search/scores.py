"""The canonical score of a pair of vectors, and how far a matrix product may lie from it.

A float32 product can be off by some 2e-5 at 384 dimensions, and differently for every block size and thread
count; what is decided from it would depend on the machine. So products only choose which pairs to look at,
and ``pair_scores`` decides.
"""

from typing import NamedTuple

import numpy as np

from ..kernels import search_loops
from ..ranks.mapped import is_mapped, release, taken

# Pairs that are scored at a time.
_PAIRS = 1024
# Below twice the smallest normal float32, what a processor may take a product of bfloat16 for is 0.
_TINY = 2.0**-125
# Sums of squares below this may have lost some to float32's smallest number.
_SMALL_SQUARE = 1e-30


class Neighbors(NamedTuple):
    """The best corpus rows of each query, best first; where there are fewer than k, row is -1.

    scores: float64 [q, k], minus infinity where there is none. rows: int64 [q, k].
    """

    scores: np.ndarray
    rows: np.ndarray

    @classmethod
    def none(cls, n: int, k: int) -> "Neighbors":
        """Of ``n`` queries that have found nothing."""
        return cls(np.full((n, k), -np.inf), np.full((n, k), -1, np.int64))


def pair_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The canonical score of each pair of rows: float32 [n, d] twice to float64 [n].

    ``left`` may also be one row, for every row of ``right``. The same two rows give the same bits wherever
    they are scored: see ``kernels.search_loops.canonical``.
    """
    numbers = np.arange(len(right))
    return scores_of(left, np.zeros_like(numbers) if len(left) == 1 else numbers, right, numbers)


def scores_of(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """The canonical scores of pairs that are given by their rows, int64 [n], in two arrays; float64 [n].

    They are taken by ``right``'s rows, so that a memory-mapped array is read from its beginning to its end; and
    of such an array no more is kept in memory than a thousand pairs need.
    """
    scores = np.empty(len(right_rows), np.float64)
    order = np.argsort(right_rows)
    for start in range(0, len(scores), _PAIRS):
        pairs = order[start : start + _PAIRS]
        lefts, rights = left_rows[pairs], right_rows[pairs]
        if is_mapped(left):
            vectors, places = taken(left, lefts), np.arange(len(pairs))
        else:
            vectors, places = left, lefts
        scores[pairs] = search_loops.score_pairs(plain(vectors), places, plain(right), rights)
        release(right[rights[0] : rights[-1] + 1])
    return scores


def best_of_pairs(
    queries: np.ndarray, corpus: np.ndarray, query: np.ndarray, row: np.ndarray, floor: float, best: Neighbors
) -> None:
    """Fill in the best of each query's pairs with a canonical score of at least ``floor``, ties to the lower row.

    Args:
        queries, corpus: float32 [q, d] and [n, d].
        query, row: int64 [pairs]; no pair twice.
        best: the result, without neighbours yet; its width is how many are wanted.
    """
    search_loops.take_best(query, row, scores_of(queries, query, corpus, row), floor, best.scores, best.rows)


def plain(vectors: np.ndarray) -> np.ndarray:
    """The same as a float32 array that lies row by row, which the compiled loops are compiled for."""
    return np.ascontiguousarray(vectors, np.float32).view(np.ndarray)


def evenly(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``array[rows]`` for ascending rows, without a copy where they are evenly spaced."""
    if len(rows) < 2:
        return array[rows]
    step = int(rows[1] - rows[0])
    if (np.diff(rows) != step).any():
        return array[rows]
    return array[int(rows[0]) : int(rows[-1]) + 1 : step]


def rounding_bound(dim: int, norms: float) -> float:
    """How far a float32 inner product may lie from the true one, for vectors whose norms multiply to ``norms``.

    The classical bound gamma_n |x| |y| with n = dim + 1 and unit roundoff 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1); it holds for any order of summation. And what a number too
    small for the processor's products loses, for each of them.
    """
    return (dim + 1) * 2.0**-24 * 1.01 * norms + dim * _TINY


def largest_norm(vectors: np.ndarray) -> float:
    """The largest Euclidean norm of float32 rows [n, d]."""
    largest = 0.0
    for start in range(0, len(vectors), 1 << 14):
        block = vectors[start : start + (1 << 14)]
        squares = np.einsum("ij,ij->i", block, block)
        if squares.max(initial=0.0) < _SMALL_SQUARE:
            squares = np.einsum("ij,ij->i", block, block, dtype=np.float64)
        largest = max(largest, float(squares.max(initial=0.0)))
    return largest**0.5 * (1 + 1e-3)


def merge(parts: list[Neighbors], k: int) -> Neighbors:
    """The k best of several results for the same queries, by score and then by row number."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    best = Neighbors.none(len(scores), k)
    query, place = np.nonzero(rows >= 0)
    search_loops.take_best(query, rows[query, place], scores[query, place], -np.inf, best.scores, best.rows)
    return best
