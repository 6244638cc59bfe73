"""Several rankings of one query as one.

A list of candidates is int64 [queries, depth]: passage rows, best first, -1 where there are no more.
"""

from collections.abc import Sequence

import numpy as np

# Reciprocal rank fusion's constant (Cormack, Clarke and Buettcher, SIGIR 2009).
_RRF_K = 60


def padded(lists: Sequence[Sequence[int]], depth: int) -> np.ndarray:
    """Lists of any length as one array of candidates."""
    rows = np.full((len(lists), depth), -1, np.int64)
    for row, values in zip(rows, lists, strict=True):
        row[: len(values)] = values[:depth]
    return rows


def fuse(lists: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """Several lists as one by reciprocal rank: each adds 1 / (60 + rank); ties go to the lower row."""
    if len(lists) == 1:
        return lists[0][:, :depth]
    fused = np.full((len(lists[0]), depth), -1, np.int64)
    for number in range(len(fused)):
        rows = np.concatenate([candidates[number] for candidates in lists])
        weights = np.concatenate([1.0 / (_RRF_K + 1 + np.arange(candidates.shape[1])) for candidates in lists])
        different, which = np.unique(rows[rows >= 0], return_inverse=True)
        total = np.bincount(which, weights[rows >= 0], minlength=len(different))
        best = different[np.lexsort((different, -total))][:depth]
        fused[number, : len(best)] = best
    return fused
