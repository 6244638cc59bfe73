"""Which queries have the same answers, which are then near duplicates at a lower cosine than others.

Two queries that a model puts close together may still ask different things, such as for the causes and for the
treatment of one disease. If their answers differ, that is evidence against their being duplicates.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..files.ragged import Ragged
from ..search.scores import Neighbors, plain, rounding_bound, scores_of
from .deal import Pairs

# Rows of a block that are compared with the kept rows of their answers at a time, and those kept rows.
_PART_ROWS, _PART_KEPT = 512, 8192


def _but_for_space(passage: str) -> str:
    return " ".join(passage.split())


class AnswersRead:
    """The positives of a file's rows as they are read, as numbers of 64 bits; equal ones have equal texts but for
    white space (two others of 10 million with a probability of 3 in a million).

    Args:
        folded: what makes two texts equal, instead.
    """

    def __init__(self, folded: Callable[[str], str] = _but_for_space) -> None:
        self._folded = folded
        self._values, self._sizes = array("q"), array("q")

    def add(self, passages: Iterable[str]) -> None:
        """The next row's."""
        numbers = {_number(self._folded(passage)) for passage in passages}
        self._values.extend(sorted(numbers))
        self._sizes.append(len(numbers))

    def of_rows(self) -> Ragged:
        """Each row's different answers, ascending, int64."""
        return Ragged.cut(np.asarray(self._sizes, np.int64), np.asarray(self._values, np.int64))


def _number(passage: str) -> int:
    digest = hashlib.blake2b(passage.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def joined(answers: Ragged, owner: np.ndarray) -> Ragged:
    """The answers of rows and of all that belong to them: ``owner`` gives each row's own, int64 [rows]."""
    owners = owner[answers.owners()]
    order = np.lexsort((answers.values, owners))
    owners, values = owners[order], answers.values[order]
    new = np.ones(len(values), bool)
    new[1:] = (owners[1:] != owners[:-1]) | (values[1:] != values[:-1])
    return Ragged.cut(np.bincount(owners[new], minlength=len(answers)), values[new])


def groups(answers: Ragged, rows: np.ndarray) -> np.ndarray:
    """A number for each of some rows (int64 [n]), the same for rows with the same answers; int64 [n]."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(answers[row].tobytes(), len(numbers)) for row in rows.tolist()], np.int64)


@dataclass(frozen=True)
class Losses:
    """What the kept rows no longer say.

    Attributes:
        n_answers, n_lost: the input's different answers, and those that no kept row has.
        rows: bool [rows], the removed rows with an answer that their kept row lacks.
    """

    n_answers: int
    n_lost: int
    rows: np.ndarray

    def share(self) -> float:
        """Of the answers, those that are lost."""
        return self.n_lost / max(1, self.n_answers)


def losses(answers: Ragged, kept_for: np.ndarray, gives: np.ndarray) -> Losses:
    """What is lost.

    Args:
        answers: each row's.
        kept_for: int64 [rows], the row that was kept for each removed one; -1 for one that has none in this file, and
            for kept rows their own.
        gives: bool [rows], the removed rows whose answers join their kept row's.
    """
    n = len(answers)
    stays = np.arange(n)
    final = joined(answers, np.where(gives, kept_for, stays))
    owners = final.owners()
    is_kept = (kept_for == stays)[owners]
    everything, left = np.unique(answers.values), np.unique(final.values[is_kept])
    lacking = np.zeros(n, bool)
    for row in np.flatnonzero((kept_for != stays) & ~gives).tolist():
        kept = kept_for[row]
        lacking[row] = bool(np.setdiff1d(answers[row], final[kept] if kept >= 0 else left).size)
    return Losses(len(everything), len(everything) - len(left), lacking)


class Agreeing:
    """Rows with the same answers, to be compared at a lower threshold than others; used on rank 0.

    Args:
        vectors: float32 [n, dim].
        groups: from ``groups``, int64 [n].
        threshold: the lowest score that makes a row a duplicate of one with the same answers.
        usual: and of another one.
    """

    def __init__(self, vectors: np.ndarray, groups: np.ndarray, threshold: float, usual: float):
        self._vectors, self._groups, self._threshold, self._usual = vectors, groups, threshold, usual
        self._is_shared = np.bincount(groups)[groups] > 1
        self._kept: dict[int, list[int]] = {}

    def joined(self, here: np.ndarray, best: Neighbors, pairs: Pairs, most: int) -> tuple[Neighbors, Pairs | None]:
        """A block's nearest kept rows and its pairs, with those that the lower threshold adds; None for too many.

        Args:
            here: int64 [b], the block's rows.
            best, pairs: at the higher threshold, of all rows.
        """
        scores, rows = best.scores.copy(), best.rows.copy()
        found, n_found = [pairs], len(pairs.scores)
        of_block: dict[int, list[int]] = {}
        for place in np.flatnonzero(self._is_shared[here]).tolist():
            of_block.setdefault(int(self._groups[here[place]]), []).append(place)
        for group, members in of_block.items():
            places = np.array(members)
            kept = np.array(self._kept.get(group, []), np.int64)
            for which, others, own in self._near(here[places], kept):
                place, number = places[which], kept[others]
                order = np.lexsort((-number, own, place))
                # The highest of each, and of those the lowest row.
                last = order[np.append(np.diff(place[order]) > 0, True)] if len(order) else order
                better = own[last] > scores[place[last], 0]
                scores[place[last[better]], 0], rows[place[last[better]], 0] = own[last[better]], number[last[better]]
            for which, others, own in self._near(here[places], here[places]):
                later, earlier = places[which], places[others]
                new = (earlier < later) & (own < self._usual)
                found.append(Pairs(later[new], earlier[new], own[new]))
                n_found += int(new.sum())
                if n_found > most:
                    return best, None
        return Neighbors(scores, rows), Pairs.joined(found)

    def _near(self, rows: np.ndarray, others: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Positions of pairs that reach the threshold, int64 [p] twice, and their canonical scores, by parts."""
        for start in range(0, len(rows), _PART_ROWS):
            part = plain(self._vectors[rows[start : start + _PART_ROWS]])
            for first in range(0, len(others), _PART_KEPT):
                against = plain(self._vectors[others[first : first + _PART_KEPT]])
                slack = rounding_bound(part.shape[1], 1.0)
                which, place = np.nonzero(part @ against.T >= self._threshold - slack)
                own = scores_of(part, which, against, place)
                reach = own >= self._threshold
                yield which[reach] + start, place[reach] + first, own[reach]

    def add(self, rows: np.ndarray) -> None:
        """Rows that are kept, int64."""
        for row in rows[self._is_shared[rows]].tolist():
            self._kept.setdefault(int(self._groups[row]), []).append(row)
