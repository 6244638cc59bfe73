"""Kept rows that are set aside as a dev set, so that training rows give none of their answers away.

Rows that are near duplicates, or have an answer in common, are on the same side, and so are all that hang together by
them. Cleaning may keep near duplicates whose answers differ.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files.ragged import Ragged
from ..files.store import derive
from ..ranks.group import Ranks
from ..search.exact import ShardedIndex
from ..search.scores import Neighbors, largest_norm, plain, rounding_bound, scores_of

logger = logging.getLogger(__name__)

# Near duplicates that are looked for of each row at first, and rows whose results are held at a time.
_NEIGHBORS, _ROWS = 16, 1 << 16
# Rows with more of them that are compared with all rows at a time, and how many of those.
_PART_ROWS, _PART_OTHERS = 512, 8192


class Kept(NamedTuple):
    """The kept rows. vectors: float32 [n, dim]; answers: each row's, as numbers."""

    vectors: np.ndarray
    answers: Ragged


@dataclass(frozen=True)
class Drawing:
    """How rows are drawn.

    Attributes:
        size: a share of the rows below 1, or how many.
        threshold: the lowest score of near duplicates.
        is_apart: True if it is known that no two rows are near duplicates.
    """

    size: float
    seed: int
    threshold: float
    is_apart: bool


def asked(size: float, n: int) -> int:
    """How many of ``n`` rows a share or a number of them is.

    Raises:
        ValueError: all of them, or more.
    """
    wanted = max(1, round(size * n)) if size < 1 else int(size)
    if wanted >= n:
        raise ValueError(f"holdout is {size:g}; expected fewer rows than the {n:,} that there are")
    return wanted


@dataclass(frozen=True)
class Split:
    """What is set aside, and whether anything leaks.

    Attributes:
        held: int64, ascending, numbers of kept rows.
        n_groups, largest: of rows that hang together, how many there are, and the size of the largest.
        near: rows of the other side that are near duplicates of one of ``held``.
        answers: answers that both sides have.
    """

    held: np.ndarray
    n_groups: int
    largest: int
    near: int
    answers: int

    def described(self) -> dict[str, int]:
        """For the report."""
        return {
            "groups": self.n_groups,
            "largest_group": self.largest,
            "near_duplicates_across": self.near,
            "answers_across": self.answers,
        }


def split(ranks: Ranks, kept: Kept | None, drawing: Drawing, path: Path, device: str = "cpu") -> Split | None:
    """Set rows aside; every rank calls it, and rank 0, which alone has ``kept``, gets the result.

    Args:
        path: where the vectors of the rows that are set aside are kept for the check.

    Raises:
        ValueError: there are not so many rows.
    """
    wanted = ranks.on_first(lambda: asked(drawing.size, len(kept.vectors)))
    vectors = kept.vectors if kept is not None else None
    n, dim = ranks.broadcast_object(vectors.shape if vectors is not None else None)
    labels = np.arange(n)  # those of rank 0 count
    if kept is not None:
        labels = joined(labels, *_answers_in_common(kept.answers))
    if not drawing.is_apart:
        labels = _joined_by_nearness(ranks, vectors, labels, dim, drawing.threshold, device)
    held = drawn(labels, wanted, np.random.default_rng(drawing.seed)) if kept is not None else None
    near = _near(ranks, vectors, held, path, drawing.threshold, device)
    if kept is None or held is None:
        return None
    rest = np.setdiff1d(np.arange(n), held)
    in_both = np.intersect1d(kept.answers.take(held).values, kept.answers.take(rest).values)
    sizes = np.bincount(labels)
    if len(held) < wanted:
        logger.warning(
            "warning: holdout: %s rows are set aside instead of %s: near duplicates and rows with an answer in common "
            "stay together, and the largest such group has %s of the %s rows",
            f"{len(held):,}", f"{wanted:,}", f"{sizes.max():,}", f"{n:,}",
        )  # fmt: skip
    return Split(held, int(np.count_nonzero(sizes)), int(sizes.max()), near, len(in_both))


def joined(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Groups that some pairs of rows (int64 [pairs] twice) join: each row's label is the lowest row of its group.

    Args:
        labels: of the groups so far, int64 [n].
    """
    labels = labels.copy()
    while True:
        ends = labels[left], labels[right]
        if (ends[0] == ends[1]).all():
            return labels
        lower = np.minimum(*ends)
        for end in ends:
            np.minimum.at(labels, end, lower)
        while (further := labels[labels]).tobytes() != labels.tobytes():
            labels = further


def _answers_in_common(answers: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that join all rows that have an answer."""
    order = np.argsort(answers.values, kind="stable")
    values, owners = answers.values[order], answers.owners()[order]
    same = np.flatnonzero(values[1:] == values[:-1])
    return owners[same], owners[same + 1]


def drawn(labels: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of whole groups, ``wanted`` of them or as many fewer as the groups' sizes leave; int64, ascending.

    The groups are taken in random order, and those that are too large for what is left to draw are passed over.
    """
    names, sizes = np.unique(labels, return_counts=True)
    order, left = rng.permutation(len(names)), wanted
    chosen = []
    for group in order.tolist():
        if sizes[group] <= left:
            chosen.append(group)
            left -= int(sizes[group])
            if left == 0:
                break
    return np.flatnonzero(np.isin(labels, names[chosen]))


def _joined_by_nearness(
    ranks: Ranks, vectors: np.ndarray | None, labels: np.ndarray, dim: int, threshold: float, device: str
) -> np.ndarray:
    """With near duplicates in one group; on rank 0. Rows that have many may hang together by others than the nearest,
    so these are compared with all.
    """
    n = len(labels)
    k = min(_NEIGHBORS, n)
    crowded = []
    index = ShardedIndex.of(ranks, vectors, n, dim, device)
    for start, found in _found(index, vectors, n, k, threshold):
        row, place = np.nonzero(found.rows >= 0)
        labels = joined(labels, row + start, found.rows[row, place])
        crowded.append(np.flatnonzero(found.rows[:, -1] >= 0) + start)
    if vectors is not None and n > k:
        labels = _compared_with_all(vectors, np.concatenate(crowded), labels, threshold)
    return labels


def _found(
    index: ShardedIndex, vectors: np.ndarray | None, n: int, k: int, threshold: float
) -> Iterator[tuple[int, Neighbors]]:
    """The nearest of each of ``n`` rows in an index, by parts with the number of their first row, on every rank."""
    for start in range(0, n, _ROWS):
        size = min(_ROWS, n - start)
        yield (
            start,
            index.search_all(vectors[start : start + size] if vectors is not None else None, size, k, threshold),
        )


def _compared_with_all(vectors: np.ndarray, rows: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Groups that are joined by near duplicates of some rows (int64) among all."""
    slack = rounding_bound(vectors.shape[1], largest_norm(vectors) ** 2)
    for start in range(0, len(rows), _PART_ROWS):
        here = rows[start : start + _PART_ROWS]
        own = plain(vectors[here])
        for first in range(0, len(vectors), _PART_OTHERS):
            others = np.arange(first, min(first + _PART_OTHERS, len(vectors)))
            against = plain(vectors[others[0] : others[-1] + 1])
            differ = labels[here][:, None] != labels[others]
            if not differ.any():
                continue
            which, place = np.nonzero(differ & (own @ against.T >= threshold - slack))
            reach = scores_of(own, which, against, place) >= threshold
            labels = joined(labels, here[which[reach]], others[place[reach]])
    return labels


def _near(
    ranks: Ranks, vectors: np.ndarray | None, held: np.ndarray | None, path: Path, threshold: float, device: str
) -> int:
    """How many rows that are not held are near duplicates of one that is: by a search of its own, to be sure."""
    theirs = ranks.on_first(lambda: derive(vectors, path, held, normalize=False))
    shapes = (len(vectors), *theirs.shape) if vectors is not None and theirs is not None else None
    n, n_held, dim = ranks.broadcast_object(shapes)
    if n_held == 0:
        return 0
    is_near = np.zeros(n, bool)
    index = ShardedIndex.of(ranks, theirs, n_held, dim, device)
    for start, found in _found(index, vectors, n, 1, threshold):
        is_near[start : start + len(found.rows)] = found.rows[:, 0] >= 0
    if held is not None:
        is_near[held] = False
    return int(is_near.sum())
