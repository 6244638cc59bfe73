"""Which cosine makes two queries duplicates: given, measured by what unrelated ones score, or found for a size.

Models differ in what they give unrelated queries; a threshold within that removes rows at random.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..search.scores import pair_scores
from .greedy import DedupResult

logger = logging.getLogger(__name__)

# Fewer queries than this say little of what unrelated ones score: they may all be alike. The threshold measured on
# them goes no higher than what hardly any model gives unrelated queries.
_ENOUGH_QUERIES, _HIGHEST_MEASURED = 50, 0.97
# The threshold where none is given; and, for models that unrelated queries get as much from, how much of the way from
# those up to 1.
_THRESHOLD, _ABOVE_UNRELATED = 0.75, 0.85
# How much of the way from the threshold up to 1 two queries must be apart at most if their answers differ. Of the
# removals of a bank's questions and of medical ones, pairs that ask different things come as near as 0.995 where the
# threshold is 0.97, and hardly nearer.
_OTHER_ANSWERS = 0.1
# What float32 may leave of a unit vector's cosine with itself.
SAME = 1 - 1e-6
# Pairs that unrelated_scores draws.
_SAMPLE_PAIRS = 4000
# find looks for the threshold in steps of this.
STEP = 1e-4


@dataclass(frozen=True)
class Unrelated:
    """What unrelated queries score with a model, by random pairs of ``n_queries``.

    mean, high: the mean and the 99th percentile; -1 where there are no two queries.
    """

    n_queries: int
    mean: float = -1.0
    high: float = -1.0

    @classmethod
    def of(cls, vectors: np.ndarray) -> "Unrelated":
        """Of the queries' vectors, float32 [n, dim] of length 1."""
        if len(vectors) < 2:
            return cls(len(vectors))
        scores = unrelated_scores(vectors)
        return cls(len(vectors), float(scores.mean()), float(scores[int(0.99 * (len(scores) - 1))]))

    @property
    def few(self) -> bool:
        """Whether they say little."""
        return self.n_queries < _ENOUGH_QUERIES

    @property
    def above(self) -> float:
        """A threshold that lies above what they score."""
        return round(self.mean + _ABOVE_UNRELATED * (1 - self.mean), 2)

    def described(self) -> dict[str, float]:
        """For the report."""
        return {"mean": round(self.mean, 4), "99th_percentile": round(self.high, 4)}


def unrelated_scores(vectors: np.ndarray) -> np.ndarray:
    """Canonical scores of random pairs of rows (float32 [n, dim]): what unrelated texts get from this model.

    Ascending, seeded, of at most ``_SAMPLE_PAIRS`` pairs; the fewer the rows, the fewer the pairs.
    """
    rng = np.random.default_rng(0)
    size = min(_SAMPLE_PAIRS, len(vectors) * (len(vectors) - 1) // 2)
    left = rng.integers(0, len(vectors), size)
    right = (left + rng.integers(1, max(2, len(vectors)), size)) % len(vectors)
    return np.sort(pair_scores(vectors[left], vectors[right]))


def reachable(threshold: float) -> float:
    """The threshold that is given, low enough for equal vectors to reach."""
    return min(threshold, SAME)


def warn_if_low(threshold: float, unrelated: Unrelated, advice: str) -> None:
    """A warning where unrelated queries reach the threshold, or else where it is lower than the model needs."""
    if unrelated.few:
        return
    if threshold <= unrelated.high:
        logger.warning(
            "warning: the threshold %g lies within what unrelated queries score with this model (mean %.2f, "
            "99th percentile %.2f): many removals will be wrong; %s, and read what is removed",
            threshold, unrelated.mean, unrelated.high, advice,
        )  # fmt: skip
    elif unrelated.high >= _THRESHOLD and threshold < unrelated.above:
        logger.warning(
            "warning: the threshold %g is below %g, what would be taken for this model, whose unrelated queries score "
            "%.2f on average; %s, or read what is removed",
            threshold, unrelated.above, unrelated.mean, advice,
        )  # fmt: skip


def measured(unrelated: Unrelated) -> float:
    """The threshold where none is given: one that suits most models, or lies above what unrelated queries score."""
    if unrelated.high < _THRESHOLD:
        return _THRESHOLD
    if unrelated.few:
        above = min(unrelated.above, _HIGHEST_MEASURED)
        logger.info("threshold: %g; %d queries are few to measure it by, so look at what is removed, or give one",
                    above, unrelated.n_queries)  # fmt: skip
        return above
    logger.info("threshold: %g, because unrelated queries score %.2f on average with this model",
                unrelated.above, unrelated.mean)  # fmt: skip
    return unrelated.above


def of_other_answers(threshold: float) -> float:
    """The threshold for queries whose answers differ, where the one for the others is measured."""
    return reachable(round(1 - _OTHER_ANSWERS * (1 - threshold), 4))


def find(clean: Callable[[float], DedupResult], target_size: int) -> DedupResult:
    """The highest threshold, to a step of ``STEP``, at which at most ``target_size`` rows stay.

    Found by bisection, with one full greedy run for each candidate. The number of kept rows need not
    rise with the threshold strictly, so "highest" means: one step above, more than the target stay.

    Raises:
        ValueError: even at -1 more rows stay.
    """
    low, high = round(-1 / STEP), round(1 / STEP)
    result = clean(high * STEP)
    if len(result.kept_rows) <= target_size:
        logger.info("target_size %d asks for nothing: there are %d queries, and only equal ones are removed",
                    target_size, len(result.kept_rows))  # fmt: skip
        return result
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        result = clean(round(middle * STEP, 4))
        if len(result.kept_rows) <= target_size:
            low, best = middle, result
        else:
            high = middle
    if best is None:
        best = clean(-1.0)
        if len(best.kept_rows) > target_size:
            raise ValueError(f"no threshold leaves {target_size} rows or fewer")
    logger.info("threshold: %g, the highest that leaves %d queries or fewer", best.threshold, target_size)
    return best
