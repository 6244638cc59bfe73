"""How far below its positives a candidate must score: measured on the data, against what scores mean nothing."""

from dataclasses import dataclass

import numpy as np

from ..search.scores import scores_of
from .problem import Problem
from .tiers import Rankings

# Random pairs that the background is measured on.
_BACKGROUND_PAIRS = 20_000
_BLOCK_ROWS = 1024
# A margin that is measured is a multiple of this, and at most that; and the queries that it is measured on, if there
# are so many at least. With fewer, it is the widest.
MARGIN_STEP, WIDEST_MARGIN, _MARGIN_QUERIES, FEWEST_QUERIES = 0.05, 0.25, 10_000, 100


@dataclass(frozen=True)
class Background:
    """What scores mean nothing: the zero of relative margins and of similarities between passages.

    pairs, passages: the score of a random query-passage pair, and the cosine of two random passages.
    spread: how far the positives' mean score lies above ``pairs``, the standard deviation of ``pairs`` at
        least; the unit of ``temperature``.
    """

    pairs: float
    passages: float
    spread: float


def measure_background(problem: Problem, positives: np.ndarray) -> tuple[Background, dict]:
    """The background of these vectors, on a sample that depends on nothing but their numbers.

    Returns:
        The background, and what the report says about it.
    """
    rng = np.random.default_rng(0)
    n_queries, n_passages = len(problem.query_vectors), len(problem.passage_vectors)
    n = min(_BACKGROUND_PAIRS, n_queries * n_passages)
    queries, passages = rng.integers(0, n_queries, n), rng.integers(0, n_passages, n)
    allowed = problem.forbidden.find(queries, passages[:, None])[:, 0] < 0
    pairs = scores_of(problem.query_vectors, queries[allowed], problem.passage_vectors, passages[allowed])
    left, right = rng.integers(0, n_passages, n), rng.integers(0, n_passages, n)
    different = left != right
    cosines = problem.cosines(left[different], right[different])
    centre = float(pairs.mean()) if len(pairs) else 0.0
    between = min(float(cosines.mean()), 1.0) if len(cosines) else 0.0
    # Where the model does not tell positives from chance, the spread of chance is a unit at least.
    spread = max(float(positives.mean()) - centre, float(pairs.std()) if len(pairs) else 0.0, 1e-6)
    about = {
        "query_passage": {"mean": centre, "std": float(pairs.std()) if len(pairs) else 0.0, "pairs": len(pairs)},
        "passage_passage": {
            "mean": between, "std": float(cosines.std()) if len(cosines) else 0.0, "pairs": len(cosines),
        },
    }  # fmt: skip
    return Background(centre, between, spread), about


def score_limit(positive: np.ndarray, margin: float, background: Background) -> np.ndarray:
    """The highest score that the relative margin allows each query's candidates, float64 like ``positive``.

    ``background + (1 - margin) * (positive - background)``; where a positive scores below the
    background the margin is still taken downwards, or it would let through what outscores the positive.
    """
    gap = np.abs(positive - background.pairs)
    return positive - margin * np.where(np.isfinite(gap), gap, 0.0)


def measure_margin(
    problem: Problem, rankings: Rankings, positive: np.ndarray, depth: int, background: Background
) -> tuple[float, list[dict]]:
    """The smallest relative margin beyond which most candidates cannot be answers; see ``WIDEST_MARGIN``.

    If it is chance which of its answers a query is labelled with, an unlabelled one is as likely to score above the
    labelled one by some distance as below it by the same. So among the candidates at a distance below, no more answers
    are to be expected than there are candidates, of whatever kind, at that distance above. (Knockoffs bound false
    discoveries by the same symmetry: Barber and Candes, 2015, Annals of Statistics 43.) From the margin on to the
    widest one, these are at most half of those below at every distance, a standard deviation of their number included.

    Where labels are no chance but what a similar model ranks first, there is nothing above them, whatever is below;
    hence the least margin, of one step.

    Args:
        positive: float64 [queries], the score that margins are measured from. With several positives there is more
            above the lowest of them, which makes the margin wider, and less above the highest.
        depth: how many of a query's candidates are looked at.

    Returns:
        The margin, and for the report what was counted at each distance.
    """
    # A query is counted once, and from its nearest passage on, whatever part of the window is wanted.
    asked = np.unique(problem.query_of_row)
    asked = asked[np.unique(np.linspace(0, len(asked) - 1, min(len(asked), _MARGIN_QUERIES)).astype(np.int64))]
    n_bands = round(WIDEST_MARGIN / MARGIN_STEP)
    below, above, squares = np.zeros((3, n_bands), np.int64)
    for start in range(0, len(asked), _BLOCK_ROWS):
        for some, (scores, rows) in rankings.parts(asked[start : start + _BLOCK_ROWS]):
            queries = asked[start + some]
            own = positive[queries][:, None]
            open_ = problem.in_window(queries, rows, (0, depth))[0]
            # The margin's own scale, with the two in either order.
            unit = np.maximum(scores, own) - background.pairs
            counted = open_ & np.isfinite(unit) & (unit > 0)
            distance = np.divide(scores - own, unit, out=np.zeros_like(unit), where=counted) / MARGIN_STEP
            for band in range(n_bands):
                below[band] += (counted & (distance <= 0) & (-distance >= band) & (-distance < band + 1)).sum()
                of_each = (counted & (distance > 0) & (distance >= band) & (distance < band + 1)).sum(axis=1)
                above[band] += of_each.sum()
                squares[band] += (of_each**2).sum()  # those of one query come together
    answers = above + np.sqrt(squares)
    doubtful = np.flatnonzero(2 * answers > below) if len(asked) >= FEWEST_QUERIES else [n_bands - 1]
    steps = max(1, int(doubtful[-1]) + 1 if len(doubtful) else 0)
    counts = zip(below.tolist(), above.tolist(), answers.tolist(), strict=True)
    about = [
        {"distance": round(MARGIN_STEP * band, 2), "below": n, "above": m, "answers_at_most": round(most, 1)}
        for band, (n, m, most) in enumerate(counts)
    ]
    return round(MARGIN_STEP * steps, 2), about


def similarity_limit(similarity: float, background: Background) -> float:
    """The cosine that a similarity above the background means: 0 is the background, 1 is 1."""
    return background.passages + similarity * (1.0 - background.passages)
