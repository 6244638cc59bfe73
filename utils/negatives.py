"""Which neighbours become negatives: window, forbidden passages, margins, near-copies, sampling.

A candidate passes through the tests in the order of ``REASONS`` and is counted under the first that
it fails. Every score is canonical (``scores.pair_scores``), so the same candidates are dropped for any
block size and any number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from utils.mapped import release
from utils.scores import Neighbors, rounding_bound, scores_of

# Why a candidate is dropped. "forbidden" ones are known positives or the query itself and take up no
# place in the window; the others are counted among the window's candidates.
REASONS = (
    "forbidden", "relative_margin", "absolute_margin", "max_score", "min_score", "positive_similarity",
    "reranker_margin", "negative_similarity",
)  # fmt: skip

# Random pairs that the background is measured on.
_BACKGROUND_PAIRS = 20_000
_BLOCK_ROWS = 1024
# A margin that is measured is a multiple of this, and at most that; and the queries that it is measured on, if there
# are so many at least. With fewer, it is the widest.
MARGIN_STEP, WIDEST_MARGIN, _MARGIN_QUERIES, _FEWEST_QUERIES = 0.05, 0.25, 10_000, 100
# Streams of random numbers that must not repeat each other.
_SAMPLING, _BACKFILL = 0, 1


class Negative(NamedTuple):
    """A passage chosen for a row: its row in the corpus, its score against the query, its rank.

    The rank counts from 0 among the query's candidates, without its own positives; -1 marks a random
    passage that filled up a short row.
    """

    row: int
    score: float
    rank: int


class Negatives(Sequence):
    """Each row's negatives, as lists of ``Negative`` that are made when they are asked for.

    Attributes:
        lims: int64 [rows + 1]; those of row i are ``lims[i]:lims[i + 1]``.
        rows, scores, ranks: int32, float64 and int32 [negatives], the columns.
    """

    def __init__(self, lims: np.ndarray, rows: np.ndarray, scores: np.ndarray, ranks: np.ndarray):
        self.lims, self.rows, self.scores, self.ranks = lims, rows, scores, ranks

    def __len__(self) -> int:
        return len(self.lims) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        part = slice(self.lims[i], self.lims[i + 1])
        columns = (column[part].tolist() for column in (self.rows, self.scores, self.ranks))
        return [Negative(*values) for values in zip(*columns, strict=True)]

    def __eq__(self, other: object) -> bool:
        """As of lists."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def sizes(self) -> np.ndarray:
        """How many each row has, int64 [rows]."""
        return np.diff(self.lims)


@dataclass
class MiningResult:
    """``negatives[i]`` belongs to row i. short_queries: the rows with fewer than asked for, before any backfill."""

    negatives: Negatives
    short_queries: np.ndarray
    drops_by_reason: dict[str, int]
    report: dict = field(default_factory=dict, repr=False)


class Groups(NamedTuple):
    """Passages of each query: those of query i are ``rows[lims[i]:lims[i + 1]]``, ascending."""

    lims: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, groups: list[list[int]]) -> "Groups":
        lims = np.cumsum([0, *map(len, groups)], dtype=np.int64)
        return cls(lims, np.array([row for group in groups for row in sorted(group)], np.int64))

    def __getitem__(self, i) -> np.ndarray:
        return self.rows[self.lims[i] : self.lims[i + 1]]

    def sizes(self) -> np.ndarray:
        return np.diff(self.lims)

    def members(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The groups of some queries in turn: the position of each passage's query among them, and the passages."""
        sizes = self.sizes()[queries]
        where = np.repeat(np.arange(len(queries)), sizes)
        offset = np.arange(len(where)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return where, self.rows[self.lims[queries][where] + offset]


@dataclass(frozen=True)
class Problem:
    """What mining starts from.

    Attributes:
        query_of_row: int64 [rows], each input row's query.
        query_vectors, passage_vectors: float32 [queries, dim] and [passages, dim].
        positives: each query's known positives.
        forbidden: each query's passages that must never be negatives; the positives are among them.
        n_candidates: passages from this row on are positives that may not be mined.
        unit: True if the vectors have length 1.
    """

    query_of_row: np.ndarray
    query_vectors: np.ndarray
    passage_vectors: np.ndarray
    positives: Groups
    forbidden: Groups
    n_candidates: int
    unit: bool = True

    def cosines(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosines between passages, by their rows, float64; 0 of a passage whose vector is 0."""

        def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return scores_of(self.passage_vectors, a, self.passage_vectors, b)

        cosines = products(left, right)
        if self.unit:
            return cosines
        norms = np.sqrt(products(left, left)) * np.sqrt(products(right, right))
        return np.divide(cosines, norms, out=np.zeros_like(cosines), where=norms > 0)


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


@dataclass(frozen=True)
class Rules:
    """The user's choices; None switches a test off. See utils.arguments.MiningArguments."""

    window: tuple[int, int] = (0, 50)
    parts: tuple[tuple[str, int], ...] = (("top", 15),)
    relative_margin: float | None = None
    absolute_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    positive_similarity: float | None = None
    negative_similarity: float | None = None
    temperature: float = 0.1
    seed: int = 0
    backfill: bool = False

    @property
    def wanted(self) -> int:
        """Negatives in a full row."""
        return sum(count for _, count in self.parts)


class Candidates(NamedTuple):
    """Each row's candidates that are left, best first: those of row i are ``lims[i]:lims[i + 1]``."""

    lims: np.ndarray
    rows: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray

    def keep(self, stays: np.ndarray) -> "Candidates":
        """Those where ``stays`` (bool, one for each candidate) is true."""
        before = np.concatenate([[0], np.cumsum(stays)])
        return Candidates(before[self.lims], self.rows[stays], self.scores[stays], self.ranks[stays])


@dataclass
class Screened:
    """What the tests on single candidates leave. presumed: for each row, passages dropped as too near a positive."""

    left: Candidates
    presumed: Groups
    drops: dict[str, int]
    n_window: int


def positive_scores(problem: Problem) -> np.ndarray:
    """The score of each query with each of its positives, float64, in the order of ``problem.positives.rows``."""
    queries = np.repeat(np.arange(len(problem.positives.lims) - 1), problem.positives.sizes())
    return scores_of(problem.query_vectors, queries, problem.passage_vectors, problem.positives.rows)


def lowest_of_each(groups: Groups, values: np.ndarray) -> np.ndarray:
    """The lowest value of each group, float64; infinity where a group is empty."""
    lowest = np.full(len(groups.lims) - 1, np.inf)
    filled = np.flatnonzero(groups.sizes())
    if len(filled):
        lowest[filled] = np.minimum.reduceat(values, groups.lims[filled])
    return lowest


def measure_background(problem: Problem, positives: np.ndarray) -> tuple[Background, dict]:
    """The background of these vectors, on a sample that depends on nothing but their numbers.

    Returns:
        The background, and what the report says about it.
    """
    rng = np.random.default_rng(0)
    n_queries, n_passages = len(problem.query_vectors), len(problem.passage_vectors)
    n = min(_BACKGROUND_PAIRS, n_queries * n_passages)
    queries, passages = rng.integers(0, n_queries, n), rng.integers(0, n_passages, n)
    allowed = ~_is_member(problem.forbidden, queries, passages[:, None])[:, 0]
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


def score_limit(lowest_positive: np.ndarray, rules: Rules, background: Background) -> np.ndarray:
    """The highest score that the relative margin allows each query's candidates, float64.

    ``background + (1 - margin) * (positive - background)``; where a positive scores below the
    background the margin is still taken downwards, or it would let through what outscores the positive.
    """
    if rules.relative_margin is None:
        return np.full(len(lowest_positive), np.inf)
    gap = np.abs(lowest_positive - background.pairs)
    return lowest_positive - rules.relative_margin * np.where(np.isfinite(gap), gap, 0.0)


def measure_margin(
    problem: Problem, neighbors: Neighbors, lowest_positive: np.ndarray, rules: Rules, background: Background
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
        lowest_positive: from ``lowest_of_each``. With several positives there is more above the lowest of them, which
            makes the margin wider.

    Returns:
        The margin, and for the report what was counted at each distance.
    """
    # A query is counted once, and from its nearest passage on, whatever part of the window is wanted.
    asked = np.unique(problem.query_of_row)
    asked = asked[np.unique(np.linspace(0, len(asked) - 1, min(len(asked), _MARGIN_QUERIES)).astype(np.int64))]
    n_bands = round(WIDEST_MARGIN / MARGIN_STEP)
    below, above, squares = np.zeros((3, n_bands), np.int64)
    for start in range(0, len(asked), _BLOCK_ROWS):
        queries = asked[start : start + _BLOCK_ROWS]
        scores, positive = neighbors.scores[queries], lowest_positive[queries][:, None]
        open_ = _in_window(problem, queries, neighbors.rows[queries], (0, rules.window[1]))[0]
        # The margin's own scale, with the two in either order.
        unit = np.maximum(scores, positive) - background.pairs
        counted = open_ & np.isfinite(unit) & (unit > 0)
        distance = np.divide(scores - positive, unit, out=np.zeros_like(unit), where=counted) / MARGIN_STEP
        for band in range(n_bands):
            below[band] += (counted & (distance <= 0) & (-distance >= band) & (-distance < band + 1)).sum()
            of_each = (counted & (distance > 0) & (distance >= band) & (distance < band + 1)).sum(axis=1)
            above[band] += of_each.sum()
            squares[band] += (of_each**2).sum()  # those of one query come together
    answers = above + np.sqrt(squares)
    doubtful = np.flatnonzero(2 * answers > below) if len(asked) >= _FEWEST_QUERIES else [n_bands - 1]
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


def screen(
    problem: Problem,
    neighbors: Neighbors,
    positives: np.ndarray,
    rules: Rules,
    background: Background,
    progress: Callable[[int], None] = lambda count: None,
) -> Screened:
    """Apply every test that looks at one candidate at a time.

    Args:
        neighbors: each query's candidates, best first; scores are canonical, row -1 is none.
        positives: from ``positive_scores``.
    """
    lowest = lowest_of_each(problem.positives, positives)
    limit = score_limit(lowest, rules, background)
    drops = dict.fromkeys(REASONS, 0)
    n_rows = len(problem.query_of_row)
    left = _Growing(n_rows, n_rows * min(neighbors.rows.shape[1], rules.window[1] - rules.window[0]))
    n_near, rows_near = [], []
    n_window = 0
    for start in range(0, n_rows, _BLOCK_ROWS):
        queries = problem.query_of_row[start : start + _BLOCK_ROWS]
        rows, scores = neighbors.rows[queries], neighbors.scores[queries]
        open_, rank, n_forbidden = _in_window(problem, queries, rows, rules.window)
        drops["forbidden"] += n_forbidden
        n_window += int(open_.sum())
        near = np.zeros_like(open_)
        for reason, fails in _tests(problem, queries, rows, scores, lowest, limit, rules, background):
            failing = open_ & fails(open_)
            drops[reason] += int(failing.sum())
            open_ &= ~failing
            if reason != "min_score":
                near |= failing
        left.add(open_.sum(axis=1), rows[open_], scores[open_], rank[open_])
        n_near.append(near.sum(axis=1))
        rows_near.append(rows[near].astype(np.int32))
        progress(len(queries))
    presumed = Groups(_lims(np.concatenate(n_near)), np.concatenate(rows_near))
    return Screened(Candidates(*left.columns()), presumed, drops, n_window)


def _in_window(
    problem: Problem, queries: np.ndarray, rows: np.ndarray, window: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Which of ``rows`` [b, k] are in the window, bool [b, k]; their ranks; and how many are forbidden."""
    there = rows >= 0
    forbidden = _is_member(problem.forbidden, queries, rows) & there
    open_ = there & ~forbidden
    rank = np.cumsum(open_, axis=1) - 1
    open_ &= (rank >= window[0]) & (rank < window[1])
    return open_, rank, int(forbidden.sum())


class _Growing:
    """Rows, scores and ranks of each input row's passages, to which rows are added in their order.

    Args:
        n_rows: how many rows there will be.
        most: how many passages there may be. Those that do not come take no memory.
    """

    def __init__(self, n_rows: int, most: int):
        self._lims = np.zeros(n_rows + 1, np.int64)
        self._columns = tuple(np.empty(most, dtype) for dtype in (np.int32, np.float64, np.int32))
        self._n = 0

    def add(self, sizes: Sequence[int] | np.ndarray, *columns: Sequence | np.ndarray) -> None:
        """The next rows: how many passages each has, and those of all in turn."""
        ends = self._lims[self._n] + np.cumsum(sizes)
        part = slice(self._lims[self._n], ends[-1])
        for column, values in zip(self._columns, columns, strict=True):
            column[part] = values
        self._lims[self._n + 1 : self._n + 1 + len(sizes)] = ends
        self._n += len(sizes)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where each row's passages begin and end, and the columns."""
        return (self._lims, *(column[: self._lims[-1]] for column in self._columns))


def _tests(
    problem: Problem,
    queries: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
    lowest: np.ndarray,
    limit: np.ndarray,
    rules: Rules,
    background: Background,
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """(reason, test) in order; a test gets the candidates still open, bool [b, k], and says which fail."""
    if rules.relative_margin is not None:
        yield "relative_margin", lambda open_: scores > limit[queries][:, None]
    if rules.absolute_margin is not None:
        yield "absolute_margin", lambda open_: scores > (lowest[queries] - rules.absolute_margin)[:, None]
    if rules.max_score is not None:
        yield "max_score", lambda open_: scores > rules.max_score
    if rules.min_score is not None:
        yield "min_score", lambda open_: scores < rules.min_score
    if rules.positive_similarity is not None:
        cut = similarity_limit(rules.positive_similarity, background)
        yield "positive_similarity", lambda open_: _near_a_positive(problem, queries, rows, open_, cut)


def _near_a_positive(
    problem: Problem, queries: np.ndarray, rows: np.ndarray, open_: np.ndarray, cut: float
) -> np.ndarray:
    """Which open candidates have a cosine of at least ``cut`` with some positive of their query."""
    near = np.zeros_like(open_)
    where, place = np.nonzero(open_)
    which, positive = problem.positives.members(queries[where])
    close = which[problem.cosines(rows[where[which], place[which]], positive) >= cut]
    near[where[close], place[close]] = True
    return near


def _is_member(groups: Groups, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whether each of ``rows`` [b, k] is in its query's group, bool [b, k]."""
    where, members = groups.members(queries)
    width = max(int(rows.max(initial=0)), int(members.max(initial=0))) + 1
    known = np.sort(where * width + members)
    if len(known) == 0:
        return np.zeros(rows.shape, bool)
    wanted = np.arange(len(queries))[:, None] * width + rows
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return (known[place] == wanted) & (rows >= 0)


def _lims(sizes: np.ndarray) -> np.ndarray:
    """Where each group begins, and where the last one ends; int64 [groups + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def apply_reranker(
    problem: Problem, screened: Screened, logits: np.ndarray, positive_logits: np.ndarray, margin: float
) -> Screened:
    """Drop the candidates whose logit is within ``margin`` of their query's lowest positive's.

    Args:
        logits: float [candidates], in the order of ``screened.left``.
        positive_logits: float, in the order of ``problem.positives.rows``.
    """
    left = screened.left
    of_row = np.repeat(np.arange(len(left.lims) - 1), np.diff(left.lims))
    lowest = lowest_of_each(problem.positives, positive_logits)[problem.query_of_row[of_row]]
    near = logits > lowest - margin
    presumed_of = np.repeat(np.arange(len(left.lims) - 1), screened.presumed.sizes())
    of = np.concatenate([presumed_of, of_row[near]])
    order = np.argsort(of, kind="stable")
    rows = np.concatenate([screened.presumed.rows, left.rows[near]])[order]
    presumed = Groups(_lims(np.bincount(of, minlength=len(left.lims) - 1)), rows)
    drops = screened.drops | {"reranker_margin": int(near.sum())}
    return Screened(left.keep(~near), presumed, drops, screened.n_window)


def choose(
    problem: Problem,
    screened: Screened,
    rules: Rules,
    background: Background,
    progress: Callable[[int], None] = lambda count: None,
) -> MiningResult:
    """Draw each row's negatives from the candidates that passed, and fill up short rows if asked to."""
    drops = dict(screened.drops)
    n_rows = len(problem.query_of_row)
    left = screened.left
    most = np.full(n_rows, problem.n_candidates) if rules.backfill else np.diff(left.lims)
    chosen = _Growing(n_rows, int(np.minimum(most, rules.wanted).sum()))
    short = []
    copies = _Copies(problem, rules, background)
    for row in range(n_rows):
        part = slice(left.lims[row], left.lims[row + 1])
        picked, too_alike = _draw(row, left.rows[part], left.scores[part], rules, background, copies)
        drops["negative_similarity"] += too_alike
        rows, scores, ranks = left.rows[part][picked], left.scores[part][picked], left.ranks[part][picked]
        if len(picked) < rules.wanted:
            short.append(row)
            if rules.backfill:
                more = _backfill(problem, row, screened, rows, rules)
                rows, scores = np.concatenate([rows, more[0]]), np.concatenate([scores, more[1]])
                ranks = np.concatenate([ranks, np.full(len(more[0]), -1)])
        chosen.add([len(rows)], rows, scores, ranks)
        if row % _BLOCK_ROWS == _BLOCK_ROWS - 1:
            release(problem.passage_vectors)
            progress(_BLOCK_ROWS)
    progress(n_rows % _BLOCK_ROWS)
    return MiningResult(Negatives(*chosen.columns()), np.array(short, np.int64), drops)


def _draw(
    row: int, rows: np.ndarray, scores: np.ndarray, rules: Rules, background: Background, copies: "_Copies"
) -> tuple[np.ndarray, int]:
    """Which of one row's candidates are taken, ascending (so by rank), and how many were too alike.

    Each strategy orders the candidates that are left and takes the first ones that are no near-copies
    of one already taken.
    """
    picked: list[int] = []
    gone = np.zeros(len(rows), bool)
    copies.start()
    n_alike = 0
    rng = None
    for strategy, count in rules.parts:
        open_ = np.flatnonzero(~gone)
        if strategy != "top":
            rng = rng or np.random.default_rng([rules.seed, _SAMPLING, row])
            keys = rng.random(len(open_))
            if strategy == "easy":
                # The order of a multinomial without replacement (Gumbel-top-k; Kool et al. 2019).
                weight = (background.pairs - scores[open_]) / (rules.temperature * background.spread)
                keys = -(weight - np.log(-np.log(np.maximum(keys, 1e-300))))
            open_ = open_[np.argsort(keys, kind="stable")]
        taken = 0
        for candidate in open_.tolist():
            if taken == count:
                break
            gone[candidate] = True
            if copies.holds_one_of(rows[candidate]):
                n_alike += 1
                continue
            copies.add(rows[candidate])
            picked.append(candidate)
            taken += 1
    return np.sort(np.array(picked, np.int64)), n_alike


class _Copies:
    """The vectors chosen for one row so far, against which the next is compared."""

    def __init__(self, problem: Problem, rules: Rules, background: Background):
        self.problem = problem
        self.limit = None
        if rules.negative_similarity is not None:
            self.limit = similarity_limit(rules.negative_similarity, background)
        dim = problem.passage_vectors.shape[1]
        self._vectors = np.empty((rules.wanted, dim), np.float32)
        self._rows = np.empty(rules.wanted, np.int64)
        self._n = 0
        # Screening is in float32; whatever comes near the limit is settled canonically.
        self._slack = rounding_bound(dim, 1.1) + 1e-6

    def start(self) -> None:
        self._n = 0

    def add(self, row: int) -> None:
        if self.limit is not None:
            self._vectors[self._n] = self._unit(row)
            self._rows[self._n] = row
            self._n += 1

    def holds_one_of(self, row: int) -> bool:
        """True if some vector already chosen is a near-copy of this passage's."""
        if self.limit is None or self._n == 0:
            return False
        products = self._vectors[: self._n] @ self._unit(row)
        near = np.flatnonzero(products >= self.limit - self._slack)
        if len(near) == 0:
            return False
        return bool((self.problem.cosines(self._rows[near], np.full(len(near), row)) >= self.limit).any())

    def _unit(self, row: int) -> np.ndarray:
        vector = self.problem.passage_vectors[row]
        return vector if self.problem.unit else vector / max(float(np.linalg.norm(vector)), 1e-30)


def _backfill(
    problem: Problem, row: int, screened: Screened, taken: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray]:
    """Random passages for a short row and their scores: neither forbidden, nor presumed false, nor taken already."""
    need = rules.wanted - len(taken)
    query = int(problem.query_of_row[row])
    banned = np.unique(np.concatenate([problem.forbidden[query], screened.presumed[row], taken]).astype(np.int64))
    rng = np.random.default_rng([rules.seed, _BACKFILL, row])
    n = problem.n_candidates
    if n <= 4 * (need + len(banned)):
        drawn = np.setdiff1d(rng.permutation(n), banned, assume_unique=True)
    else:
        # Twice as many draws as can be refused, repeats aside: cheap however large the corpus is.
        drawn = rng.integers(0, n, 4 * (need + len(banned)))
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
        drawn = drawn[~np.isin(drawn, banned)]
    drawn = drawn[:need]
    return drawn, scores_of(problem.query_vectors, np.full(len(drawn), query), problem.passage_vectors, drawn)
