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
from utils.margins import Background, score_limit, similarity_limit
from utils.mining_problem import Problem
from utils.ragged import Growing, Ragged
from utils.rankings import Rankings
from utils.scores import rounding_bound, scores_of

# Why a candidate is dropped. "forbidden" ones are known positives or the query itself and take up no
# place in the window, before whose end they are counted; the others are among the window's candidates.
REASONS = (
    "forbidden", "relative_margin", "absolute_margin", "max_score", "min_score", "positive_similarity",
    "reranker_margin", "negative_similarity",
)  # fmt: skip
# Those that hang on a positive's score, the one that margin_positive names.
MARGINS = ("relative_margin", "absolute_margin", "reranker_margin")

_BLOCK_ROWS = 1024
# Pairs of a candidate and a positive that are compared at a time.
_PAIRS = 1 << 18
# How often backfill draws for a row at most, if too many draws look like answers; and how many it tests at once.
_DRAWS, _TRIED = 4, 32
# Of rows, scores and ranks.
_COLUMNS = (np.int32, np.float64, np.int32)
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


@dataclass(frozen=True, eq=False)
class Candidates:
    """Each query's candidates that are left, best first; or each row's negatives.

    Attributes:
        rows: int32, each query's passages.
        scores, ranks: float64 and int32, one for each of ``rows.values``.
    """

    rows: Ragged
    scores: np.ndarray
    ranks: np.ndarray

    def keep(self, stays: np.ndarray) -> "Candidates":
        """Those where ``stays`` (bool, one for each candidate) is true."""
        return Candidates(self.rows.keep(stays), self.scores[stays], self.ranks[stays])


class Negatives(Candidates, Sequence):
    """Each row's negatives, as lists of ``Negative`` that are made when they are asked for."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        part = self.rows.part(i)
        columns = (column[part].tolist() for column in (self.rows.values, self.scores, self.ranks))
        return [Negative(*values) for values in zip(*columns, strict=True)]

    def __eq__(self, other: object) -> bool:
        """As of lists."""
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass
class MiningResult:
    """``negatives[i]`` belongs to row i. short_queries: the rows with fewer than asked for, before any backfill."""

    negatives: Negatives
    short_queries: np.ndarray
    drops_by_reason: dict[str, int]
    report: dict = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Rules:
    """The user's choices; None switches a test off. See utils.arguments.MiningArguments."""

    window: tuple[int, int] = (0, 50)
    parts: tuple[tuple[str, int], ...] = (("top", 15),)
    relative_margin: float | None = None
    absolute_margin: float | None = None
    margin_positive: str = "lowest"
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


@dataclass
class Screened:
    """What the tests on single candidates leave of each query's.

    Attributes:
        left: those that passed.
        presumed: passages that backfill may not draw: dropped as too near a positive or, where there is to be any
            backfill, nearer than the window's first.
        drops, n_window: how many were dropped, and looked at, counted once for each row that asks the query.
        by_margin: bool [queries], whether a margin dropped any of a query's.
    """

    left: Candidates
    presumed: Ragged
    drops: dict[str, int]
    n_window: int
    by_margin: np.ndarray


def screen(
    problem: Problem,
    rankings: Rankings,
    positives: np.ndarray,
    rules: Rules,
    background: Background,
    progress: Callable[[int], None] = lambda count: None,
) -> Screened:
    """Apply every test that looks at one candidate at a time, once for each query, however many rows ask it.

    Args:
        rankings: each query's candidates, best first; scores are canonical, row -1 is none.
        positives: from ``problem.positive_scores``.
    """
    reference = problem.positives.one_of_each(positives, rules.margin_positive)
    drops = dict.fromkeys(REASONS, 0)
    times = problem.times_asked()
    by_margin = np.zeros(len(times), bool)
    asked = np.flatnonzero(times)
    left = Growing(len(asked), len(asked) * min(problem.n_candidates, rules.window[1] - rules.window[0]), _COLUMNS)
    n_near, rows_near = [], []
    n_window = 0
    for start in range(0, len(asked), _BLOCK_ROWS):
        block = asked[start : start + _BLOCK_ROWS]
        passed: list[tuple[np.ndarray, ...]] = []
        near: list[tuple[np.ndarray, ...]] = []
        for place, (scores, rows) in rankings.parts(block):
            queries = block[place]
            weight = times[queries]
            open_, rank, n_forbidden = problem.in_window(queries, rows, rules.window)
            drops["forbidden"] += int(n_forbidden @ weight)
            n_window += int(open_.sum(axis=1) @ weight)
            # What the user's window passes over is as likely an answer as what it begins with, or likelier.
            too_near = (rank >= 0) & (rank < rules.window[0]) if rules.backfill else np.zeros_like(open_)
            for reason, fails in _tests(problem, queries, rows, scores, reference, rules, background):
                failing = open_ & fails(open_)
                drops[reason] += int(failing.sum(axis=1) @ weight)
                open_ &= ~failing
                if reason in MARGINS:
                    by_margin[queries] |= failing.any(axis=1)
                if reason != "min_score":
                    too_near |= failing
            passed.append((place[np.nonzero(open_)[0]], rows[open_], scores[open_], rank[open_]))
            near.append((place[np.nonzero(too_near)[0]], rows[too_near]))
        left.add(*_by_place(passed, len(block)))
        sizes, rows = _by_place(near, len(block))
        n_near.append(sizes)
        rows_near.append(rows.astype(np.int32))
        progress(int(times[block].sum()))
    n_left, n_presumed = np.zeros((2, len(times)), np.int64)
    rows_left, columns = left.finish()
    n_left[asked], n_presumed[asked] = rows_left.sizes(), np.concatenate(n_near)
    candidates = Candidates(Ragged.cut(n_left, rows_left.values), *columns)
    presumed = Ragged.cut(n_presumed, np.concatenate(rows_near))
    return Screened(candidates, presumed, drops, n_window, by_margin)


def _by_place(parts: list[tuple[np.ndarray, ...]], n: int) -> tuple[np.ndarray, ...]:
    """How many passages each of a block's ``n`` places has, and the columns of all in turn.

    Args:
        parts: the place of each passage and its columns, in order within a place.
    """
    place, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(place, kind="stable")
    return np.bincount(place, minlength=n), *(column[order] for column in columns)


def _tests(
    problem: Problem,
    queries: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
    reference: np.ndarray,
    rules: Rules,
    background: Background,
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """(reason, test) in order; a test gets the candidates still open, bool [b, k], and says which fail.

    Args:
        reference: float64 [all queries], the positive's score that margins are measured from.
    """
    if rules.relative_margin is not None:
        limit = score_limit(reference[queries], rules.relative_margin, background)
        yield "relative_margin", lambda open_: scores > limit[:, None]
    if rules.absolute_margin is not None:
        yield "absolute_margin", lambda open_: scores > (reference[queries] - rules.absolute_margin)[:, None]
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
    candidates = rows[where, place]
    for which, positive in problem.positives.take_in_parts(queries[where], _PAIRS):
        close = which[problem.cosines(candidates[which], positive) >= cut]
        near[where[close], place[close]] = True
    return near


def apply_reranker(
    problem: Problem,
    screened: Screened,
    logits: np.ndarray,
    positive_logits: np.ndarray,
    margin: float,
    margin_positive: str = "lowest",
) -> Screened:
    """Drop the candidates whose logit is within ``margin`` of their query's lowest, median or highest positive's.

    Args:
        logits: float [candidates], in the order of ``screened.left.rows.values``.
        positive_logits: float, in the order of ``problem.positives.values``.
    """
    left, times = screened.left, problem.times_asked()
    n = len(times)
    query = left.rows.owners()
    near = logits > problem.positives.one_of_each(positive_logits, margin_positive)[query] - margin
    before = screened.presumed.owners(), screened.presumed.values
    presumed = Ragged.cut(*_by_place([before, (query[near], left.rows.values[near])], n))
    drops = screened.drops | {"reranker_margin": int(times[query[near]].sum())}
    by_margin = screened.by_margin | (np.bincount(query[near], minlength=n) > 0)
    return Screened(left.keep(~near), presumed, drops, screened.n_window, by_margin)


def choose(
    problem: Problem,
    screened: Screened,
    positives: np.ndarray,
    rules: Rules,
    background: Background,
    progress: Callable[[int], None] = lambda count: None,
) -> MiningResult:
    """Draw each row's negatives from the candidates that passed, and fill up short rows if asked to.

    Args:
        positives: from ``problem.positive_scores``.
    """
    drops = dict(screened.drops)
    n_rows = len(problem.query_of_row)
    left = screened.left
    most = np.full(n_rows, problem.n_candidates) if rules.backfill else left.rows.sizes()[problem.query_of_row]
    chosen = Growing(n_rows, int(np.minimum(most, rules.wanted).sum()), _COLUMNS)
    short = []
    copies = _Copies(problem, rules, background)
    reference = problem.positives.one_of_each(positives, rules.margin_positive)
    for row, query in enumerate(problem.query_of_row.tolist()):
        part = left.rows.part(query)
        own, own_scores = left.rows.values[part], left.scores[part]
        picked, too_alike = _draw(row, own, own_scores, rules, background, copies)
        drops["negative_similarity"] += too_alike
        rows, scores, ranks = own[picked], own_scores[picked], left.ranks[part][picked]
        if len(picked) < rules.wanted:
            short.append(row)
            if rules.backfill:
                more = _backfill(problem, row, screened, rows, reference, rules, background)
                rows, scores = np.concatenate([rows, more[0]]), np.concatenate([scores, more[1]])
                ranks = np.concatenate([ranks, np.full(len(more[0]), -1)])
        chosen.add([len(rows)], rows, scores, ranks)
        if row % _BLOCK_ROWS == _BLOCK_ROWS - 1:
            release(problem.passage_vectors)
            progress(_BLOCK_ROWS)
    progress(n_rows % _BLOCK_ROWS)
    rows, columns = chosen.finish()
    return MiningResult(Negatives(rows, *columns), np.array(short, np.int64), drops)


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
    problem: Problem,
    row: int,
    screened: Screened,
    taken: np.ndarray,
    reference: np.ndarray,
    rules: Rules,
    background: Background,
) -> tuple[np.ndarray, np.ndarray]:
    """Random passages for a short row and their scores: neither forbidden, nor likely answers, nor taken already.

    Those that no list holds go through the same tests on single candidates, but for ``min_score``: chance passages are
    easy, whatever else is asked for. Fewer than are needed if chance finds no more.
    """
    need = rules.wanted - len(taken)
    query = int(problem.query_of_row[row])
    asked = np.array([query])
    banned = np.unique(np.concatenate([problem.forbidden[query], screened.presumed[query], taken]).astype(np.int64))
    found, found_scores, n_found = [], [], 0
    for some in _draws(np.random.default_rng([rules.seed, _BACKFILL, row]), problem.n_candidates, need, banned):
        scores = scores_of(problem.query_vectors, np.full(len(some), query), problem.passage_vectors, some)
        passes = np.ones((1, len(some)), bool)
        for reason, fails in _tests(problem, asked, some[None], scores[None], reference, rules, background):
            if reason != "min_score":
                passes &= ~fails(passes)
        found.append(some[passes[0]])
        found_scores.append(scores[passes[0]])
        n_found += len(found[-1])
        if n_found >= need:
            break
    if not found:
        return np.zeros(0, np.int64), np.zeros(0)
    return np.concatenate(found)[:need], np.concatenate(found_scores)[:need]


def _draws(rng: np.random.Generator, n: int, need: int, banned: np.ndarray) -> Iterator[np.ndarray]:
    """Random numbers below ``n``, a few at a time, none twice and none that is banned; not without end."""
    for _ in range(_DRAWS):
        if n <= 4 * (need + len(banned)):
            drawn = np.setdiff1d(rng.permutation(n), banned, assume_unique=True)
        else:
            # Several times what can be refused, repeats aside: cheap however large the corpus is.
            drawn = rng.integers(0, n, 4 * (need + len(banned)))
            _, first = np.unique(drawn, return_index=True)
            drawn = drawn[np.sort(first)]
            drawn = drawn[~np.isin(drawn, banned)]
        yield from np.split(drawn, range(_TRIED, len(drawn), _TRIED))
        banned = np.union1d(banned, drawn)
