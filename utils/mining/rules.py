"""Which neighbours may become negatives: window, forbidden passages, margins, and what is too near a positive.

A candidate passes through the tests in the order of ``REASONS`` and is counted under the first that
it fails. Every score is canonical (``scores.pair_scores``), so the same candidates are dropped for any
block size and any number of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..files.ragged import Growing, Ragged
from .margins import Background, score_limit, similarity_limit
from .problem import Problem
from .tiers import Rankings

# Why a candidate is dropped. "forbidden" ones are known positives or the query itself and take up no
# place in the window, before whose end they are counted; the others are among the window's candidates.
REASONS = (
    "forbidden", "relative_margin", "absolute_margin", "max_score", "min_score", "positive_similarity",
    "reranker_margin", "negative_similarity",
)  # fmt: skip
# Those that hang on a positive's score, the one that margin_positive names.
MARGINS = ("relative_margin", "absolute_margin", "reranker_margin")
# Of candidates' rows, scores and ranks.
COLUMNS = (np.int32, np.float64, np.int32)

_NONE = np.zeros(0, np.int64)
_BLOCK_ROWS = 1024
# Pairs of a candidate and a positive that are compared at a time.
_PAIRS = 1 << 18


@dataclass(frozen=True)
class Rules:
    """The user's choices; None switches a test off. See utils.arguments.scripts.MiningArguments."""

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
    easy_from: str = "query"
    seed: int = 0
    backfill: bool = False

    @property
    def wanted(self) -> int:
        """Negatives in a full row."""
        return sum(count for _, count in self.parts)


@dataclass(frozen=True)
class Criteria:
    """What passages are tested by, one at a time, as negatives of a query.

    Attributes:
        positives: from ``problem.positive_scores``.
    """

    problem: Problem
    positives: np.ndarray
    rules: Rules
    background: Background

    @cached_property
    def reference(self) -> np.ndarray:
        """The score of each query's lowest, median or highest positive, which margins are measured from: float64."""
        return self.problem.positives.one_of_each(self.positives, self.rules.margin_positive)

    def tests(
        self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray
    ) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
        """(reason, test) in order; a test gets the candidates still open, bool [b, k], and says which fail.

        Args:
            queries: int [b].
            rows, scores: int and float64 [b, k], of each query's candidates.
        """
        rules, reference = self.rules, self.reference[queries][:, None]
        if rules.relative_margin is not None:
            limit = score_limit(reference, rules.relative_margin, self.background)
            yield "relative_margin", lambda open_: scores > limit
        if rules.absolute_margin is not None:
            yield "absolute_margin", lambda open_: scores > reference - rules.absolute_margin
        if rules.max_score is not None:
            yield "max_score", lambda open_: scores > rules.max_score
        if rules.min_score is not None:
            yield "min_score", lambda open_: scores < rules.min_score
        if rules.positive_similarity is not None:
            cut = similarity_limit(rules.positive_similarity, self.background)
            yield "positive_similarity", lambda open_: _near_a_positive(self.problem, queries, rows, open_, cut)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Each query's candidates that are left, best first; or each row's negatives.

    Attributes:
        rows: int32, each query's passages.
        scores, ranks: float64 and int32, one for each of ``rows.values``; as in ``COLUMNS``.
    """

    rows: Ragged
    scores: np.ndarray
    ranks: np.ndarray

    def keep(self, stays: np.ndarray) -> "Candidates":
        """Those where ``stays`` (bool, one for each candidate) is true."""
        return Candidates(self.rows.keep(stays), self.scores[stays], self.ranks[stays])


@dataclass
class Screened:
    """What the tests on single candidates leave of each query's.

    Attributes:
        left: those that passed.
        presumed: passages that backfill may not draw: dropped as too near a positive or, where there is to be any
            backfill, nearer than the window's first.
        drops_of: by reason how many of each query's were dropped, int64 [queries].
        n_window_of: how many of each were looked at, int64 [queries].
        by_margin: bool [queries], whether a margin dropped any of a query's.
        times: how many rows ask each query, int64 [queries].
    """

    left: Candidates
    presumed: Ragged
    drops_of: dict[str, np.ndarray]
    n_window_of: np.ndarray
    by_margin: np.ndarray
    times: np.ndarray

    @property
    def drops(self) -> dict[str, int]:
        """How many were dropped, counted once for each row that asks the query."""
        return {reason: int(counts @ self.times) for reason, counts in self.drops_of.items()}

    @property
    def n_window(self) -> int:
        """How many were looked at, counted once for each row that asks the query."""
        return int(self.n_window_of @ self.times)

    def replaced(self, queries: np.ndarray, found: "Screened") -> "Screened":
        """With what another screening found of some queries (int64), of which alone it has any."""
        is_old = np.ones(len(self.times), bool)
        is_old[queries] = False
        both = [self.left.keep(is_old[self.left.rows.owners()]), found.left]
        owners = np.concatenate([part.rows.owners() for part in both])
        columns = [
            np.concatenate([column(part) for part in both])
            for column in (lambda c: c.rows.values, lambda c: c.scores, lambda c: c.ranks)
        ]
        sizes, rows, scores, ranks = _by_place([(owners, *columns)], len(is_old))
        kept = self.presumed.keep(is_old[self.presumed.owners()])
        presumed = [(part.owners(), part.values) for part in (kept, found.presumed)]
        return Screened(
            Candidates(Ragged.cut(sizes, rows), scores, ranks),
            Ragged.cut(*_by_place(presumed, len(is_old))),
            {reason: np.where(is_old, counts, found.drops_of[reason]) for reason, counts in self.drops_of.items()},
            np.where(is_old, self.n_window_of, found.n_window_of),
            np.where(is_old, self.by_margin, found.by_margin),
            self.times,
        )


def screen(
    criteria: Criteria,
    rankings: Rankings,
    progress: Callable[[int], None] = lambda count: None,
    asked: np.ndarray | None = None,
) -> Screened:
    """Apply every test that looks at one candidate at a time, once for each query, however many rows ask it.

    Args:
        rankings: each query's candidates, best first; scores are canonical, row -1 is none.
        asked: int64, ascending, the queries to look at; by default all that some row asks.
    """
    problem, rules = criteria.problem, criteria.rules
    times = problem.times_asked()
    drops = {reason: np.zeros(len(times), np.int64) for reason in REASONS}
    by_margin, n_window = np.zeros(len(times), bool), np.zeros(len(times), np.int64)
    asked = np.flatnonzero(times) if asked is None else asked
    most = np.minimum(problem.n_candidates, rankings.stops(asked, rules.window[1]) - rules.window[0])
    left = Growing(len(asked), int(most.sum()), COLUMNS)
    n_near, rows_near = [], []
    for start in range(0, len(asked), _BLOCK_ROWS):
        block = asked[start : start + _BLOCK_ROWS]
        passed: list[tuple[np.ndarray, ...]] = []
        near: list[tuple[np.ndarray, ...]] = []
        for place, (scores, rows) in rankings.parts(block):
            queries = block[place]
            window = rules.window[0], rankings.stops(queries, rules.window[1])
            open_, rank, n_forbidden = problem.in_window(queries, rows, window)
            drops["forbidden"][queries] += n_forbidden
            n_window[queries] += open_.sum(axis=1)
            # What the user's window passes over is as likely an answer as what it begins with, or likelier.
            too_near = (rank >= 0) & (rank < rules.window[0]) if rules.backfill else np.zeros_like(open_)
            for reason, fails in criteria.tests(queries, rows, scores):
                failing = open_ & fails(open_)
                drops[reason][queries] += failing.sum(axis=1)
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
    n_left[asked], n_presumed[asked] = rows_left.sizes(), np.concatenate([_NONE, *n_near])
    candidates = Candidates(Ragged.cut(n_left, rows_left.values), *columns)
    presumed = Ragged.cut(n_presumed, np.concatenate([_NONE.astype(np.int32), *rows_near]))
    return Screened(candidates, presumed, drops, n_window, by_margin, times)


def _by_place(parts: list[tuple[np.ndarray, ...]], n: int) -> tuple[np.ndarray, ...]:
    """How many passages each of a block's ``n`` places has, and the columns of all in turn.

    Args:
        parts: the place of each passage and its columns, in order within a place.
    """
    place, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(place, kind="stable")
    return np.bincount(place, minlength=n), *(column[order] for column in columns)


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
    criteria: Criteria, screened: Screened, logits: np.ndarray, positive_logits: np.ndarray, margin: float
) -> Screened:
    """Drop the candidates whose logit is within ``margin`` of that of their query's ``margin_positive``.

    Args:
        logits: float [candidates], in the order of ``screened.left.rows.values``.
        positive_logits: float, in the order of ``problem.positives.values``.
    """
    problem, left = criteria.problem, screened.left
    n = len(screened.times)
    query = left.rows.owners()
    near = logits > problem.positives.one_of_each(positive_logits, criteria.rules.margin_positive)[query] - margin
    before = screened.presumed.owners(), screened.presumed.values
    presumed = Ragged.cut(*_by_place([before, (query[near], left.rows.values[near])], n))
    dropped = np.bincount(query[near], minlength=n)
    return replace(
        screened, left=left.keep(~near), presumed=presumed, by_margin=screened.by_margin | (dropped > 0),
        drops_of=screened.drops_of | {"reranker_margin": dropped},
    )  # fmt: skip
