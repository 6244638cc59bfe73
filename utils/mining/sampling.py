"""Which of the candidates that passed become each row's negatives: strategies, near-copies, backfill.

What is drawn depends on the seed and the row's number, never on the other rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..files.ragged import Growing
from ..ranks.mapped import release
from ..search.scores import rounding_bound, scores_of
from .margins import similarity_limit
from .rules import COLUMNS, Candidates, Criteria, Rules, Screened

# Rows between two reports of progress.
_BLOCK_ROWS = 1024
# How often backfill draws for a row at most, if too many draws look like answers; and how many it tests at once.
_DRAWS, _TRIED = 4, 32
# Ranks of negatives that are none of the candidates.
BACKFILLED, KEPT = -1, -2
_NONE = np.zeros(0, np.int64)
# Streams of random numbers that must not repeat each other.
_SAMPLING, _BACKFILL = 0, 1


class Negative(NamedTuple):
    """A passage chosen for a row: its row in the corpus, its score against the query, its rank.

    The rank counts from 0 among the query's candidates, without its own positives; ``BACKFILLED`` marks a random
    passage that filled up a short row, ``KEPT`` one of the row's own.
    """

    row: int
    score: float
    rank: int


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
class Choice:
    """``negatives[i]`` belongs to row i. short_queries: the rows with fewer than asked for, before any backfill."""

    negatives: Negatives
    short_queries: np.ndarray
    drops_by_reason: dict[str, int]


def choose(criteria: Criteria, screened: Screened, progress: Callable[[int], None] = lambda count: None) -> Choice:
    """Draw each row's negatives from the candidates that passed, and fill up short rows if asked to.

    A row's own negatives, if they are to be kept, come first, and take the first places of the strategies.
    """
    problem, rules = criteria.problem, criteria.rules
    drops = dict(screened.drops)
    n_rows = len(problem.query_of_row)
    left = screened.left
    most = np.full(n_rows, problem.n_candidates) if rules.backfill else left.rows.sizes()[problem.query_of_row]
    n_kept = len(problem.kept.values) if problem.kept is not None else 0
    chosen = Growing(n_rows, int(np.minimum(most, rules.wanted).sum()) + n_kept, COLUMNS)
    short = []
    copies, distances = _Copies(criteria), _Distances(criteria)
    for row, query in enumerate(problem.query_of_row.tolist()):
        part = left.rows.part(query)
        own = left.rows.values[part]
        picked, too_alike = _draw(row, own, left.scores[part], criteria, copies, distances)
        drops["negative_similarity"] += too_alike
        rows, scores, ranks = own[picked], left.scores[part][picked], left.ranks[part][picked]
        kept = problem.kept[row] if problem.kept is not None else _NONE
        if len(kept):
            kept_scores = scores_of(problem.query_vectors, np.full(len(kept), query), problem.passage_vectors, kept)
            rows, scores = np.concatenate([kept, rows]), np.concatenate([kept_scores, scores])
            ranks = np.concatenate([np.full(len(kept), KEPT), ranks])
        if len(rows) < rules.wanted:
            short.append(row)
            if rules.backfill:
                more = _backfill(criteria, row, screened, rows)
                rows, scores = np.concatenate([rows, more[0]]), np.concatenate([scores, more[1]])
                ranks = np.concatenate([ranks, np.full(len(more[0]), BACKFILLED)])
        chosen.add([len(rows)], rows, scores, ranks)
        if row % _BLOCK_ROWS == _BLOCK_ROWS - 1:
            release(problem.passage_vectors)
            progress(_BLOCK_ROWS)
    progress(n_rows % _BLOCK_ROWS)
    rows, columns = chosen.finish()
    return Choice(Negatives(rows, *columns), np.array(short, np.int64), drops)


def _draw(
    row: int, rows: np.ndarray, scores: np.ndarray, criteria: Criteria, copies: "_Copies", distances: "_Distances"
) -> tuple[np.ndarray, int]:
    """Which of one row's candidates are taken, ascending (so by rank), and how many were too alike.

    Each strategy orders the candidates that are left and takes the first ones that are no near-copies
    of one already taken.
    """
    rules, problem = criteria.rules, criteria.problem
    picked: list[int] = []
    gone = np.zeros(len(rows), bool)
    kept = problem.kept[row] if problem.kept is not None else _NONE
    copies.start(kept)
    if len(kept) and problem.repeats is not None:
        gone |= np.isin(rows, problem.repeats[row])
    n_alike = 0
    rng = None
    for strategy, count in _parts_left(rules, len(kept)):
        open_ = np.flatnonzero(~gone)
        if strategy != "top":
            rng = rng or np.random.default_rng([rules.seed, _SAMPLING, row])
            keys = rng.random(len(open_))
            if strategy == "easy":
                # The order of a multinomial without replacement (Gumbel-top-k; Kool et al. 2019).
                weight = distances(row, rows, scores)[open_] / rules.temperature
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


def _parts_left(rules: Rules, n_kept: int) -> Iterator[tuple[str, int]]:
    """How many negatives each strategy is still to give."""
    for strategy, count in rules.parts:
        taken = min(n_kept, count)
        n_kept -= taken
        if count > taken:
            yield strategy, count - taken


class _Distances:
    """How far from a query, or from its nearest positive, candidates are: 0 as by chance, -1 as a positive is.

    Those from positives are kept for the next row that asks the query.
    """

    def __init__(self, criteria: Criteria):
        self.criteria = criteria
        self._from_positives: dict[int, np.ndarray] = {}

    def __call__(self, row: int, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Of all candidates of a row's query, float64 like ``scores``."""
        background, problem = self.criteria.background, self.criteria.problem
        if self.criteria.rules.easy_from == "query":
            return (background.pairs - scores) / background.spread
        query = int(problem.query_of_row[row])
        if query not in self._from_positives:
            cosines = problem.nearest_positive(query, rows)
            self._from_positives[query] = (background.passages - cosines) / max(1 - background.passages, 1e-6)
        return self._from_positives[query]


class _Copies:
    """The vectors chosen for one row so far, against which the next is compared."""

    def __init__(self, criteria: Criteria):
        self.problem, rules = criteria.problem, criteria.rules
        self.limit = None
        if rules.negative_similarity is not None:
            self.limit = similarity_limit(rules.negative_similarity, criteria.background)
        dim = self.problem.passage_vectors.shape[1]
        most = max(rules.wanted, max(self.problem.kept.sizes(), default=0) if self.problem.kept is not None else 0)
        self._vectors = np.empty((most, dim), np.float32)
        self._rows = np.empty(most, np.int64)
        self._n = 0
        # Screening is in float32; whatever comes near the limit is settled canonically.
        self._slack = rounding_bound(dim, 1.1) + 1e-6

    def start(self, rows: np.ndarray) -> None:
        """Anew, with these passages chosen."""
        self._n = 0
        for row in rows.tolist():
            self.add(row)

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


def _backfill(criteria: Criteria, row: int, screened: Screened, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random passages for a short row and their scores: neither forbidden, nor likely answers, nor taken already.

    Those that no list holds go through the same tests on single candidates, but for ``min_score``: chance passages are
    easy, whatever else is asked for. Fewer than are needed if chance finds no more.
    """
    problem, rules = criteria.problem, criteria.rules
    need = rules.wanted - len(taken)
    query = int(problem.query_of_row[row])
    asked = np.array([query])
    repeats = problem.repeats[row] if problem.repeats is not None else _NONE
    banned = [problem.forbidden[query], screened.presumed[query], repeats, taken]
    banned = np.unique(np.concatenate(banned).astype(np.int64))
    found, found_scores, n_found = [], [], 0
    for some in _draws(np.random.default_rng([rules.seed, _BACKFILL, row]), problem.n_candidates, need, banned):
        scores = scores_of(problem.query_vectors, np.full(len(some), query), problem.passage_vectors, some)
        passes = np.ones((1, len(some)), bool)
        for reason, fails in criteria.tests(asked, some[None], scores[None]):
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
