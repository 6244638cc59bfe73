"""Rows of different lengths held in one array instead of an object each, and what is asked of them all at once."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Ragged(Sequence):
    """Row i is ``values[lims[i]:lims[i + 1]]``, as in a compressed sparse matrix.

    Args:
        lims: int64 [n + 1], ascending from 0.
        values: [lims[n]], of any dtype.
    """

    def __init__(self, lims: np.ndarray, values: np.ndarray):
        assert lims[-1] == len(values)
        self.lims, self.values = lims, values

    @classmethod
    def of(cls, rows: Iterable[Iterable[int]]) -> "Ragged":
        """The same rows of whole numbers, int64."""
        values, lims = array("q"), array("q", [0])
        for row in rows:
            values.extend(row)
            lims.append(len(values))
        return cls(np.asarray(lims, np.int64), np.asarray(values, np.int64))

    @classmethod
    def cut(cls, sizes: Sequence[int] | np.ndarray, values: np.ndarray) -> "Ragged":
        """Of the rows' sizes, int [n], and the values of all in turn."""
        return cls(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), values)

    def __len__(self) -> int:
        return len(self.lims) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """Row i (from 0 on; none is counted from the end), a view."""
        return self.values[self.lims[i] : self.lims[i + 1]]

    def part(self, i: int) -> slice:
        """Where row i lies in ``values``, and in whatever else holds one entry for each of them."""
        return slice(self.lims[i], self.lims[i + 1])

    def sizes(self) -> np.ndarray:
        """How long each row is, int64 [n]."""
        return np.diff(self.lims)

    def owners(self) -> np.ndarray:
        """The row of each of ``values``, int64."""
        return np.repeat(np.arange(len(self)), self.sizes())

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """How many of each row's values are chosen, int64 [n].

        Args:
            chosen: bool, one for each of ``values``.
        """
        return np.diff(np.concatenate([[0], np.cumsum(chosen)])[self.lims])

    def keep(self, chosen: np.ndarray) -> "Ragged":
        """As many rows with only the chosen of their values; ``chosen`` as for ``counts``."""
        return Ragged.cut(self.counts(chosen), self.values[chosen])

    def take(self, rows: np.ndarray) -> "Ragged":
        """These rows (int [m]) in their order; a row may come twice."""
        sizes, places = self._places(rows)
        return Ragged.cut(sizes, self.values[places])

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sizes of some rows, and where in ``values`` theirs are, in turn."""
        first = self.lims[rows]
        sizes = self.lims[rows + 1] - first
        places = np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
        places += np.arange(len(places))
        return sizes, places

    def take_in_parts(self, rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The values of some rows in turn, at most ``size`` at a time: a row may be there often, and be long.

        Yields:
            Which of ``rows`` each value belongs to, int64, and the values.
        """
        first = self.lims[rows]
        ends = np.cumsum(self.lims[rows + 1] - first)
        begins = np.concatenate([[0], ends[:-1]])
        for start in range(0, int(ends[-1]) if len(ends) else 0, size):
            number = np.arange(start, min(start + size, ends[-1]))
            owners = np.searchsorted(ends, number, side="right")
            yield owners, self.values[first[owners] + number - begins[owners]]

    def find(self, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Where in ``values`` each row's wanted ones are, int64 [b, k]; -1 where the row does not have them.

        Args:
            rows: int [b]; the values of these must be whole numbers from 0 on, and ascend within each.
            wanted: int [b, k]; -1 is none.
        """
        different, which = np.unique(rows, return_inverse=True)  # a long row may be asked for often
        sizes, places = self._places(different)
        if len(places) == 0:
            return np.full(wanted.shape, -1)
        members = self.values[places]
        width = max(int(wanted.max(initial=0)), int(members.max())) + 1
        keys = np.repeat(np.arange(len(different)) * width, sizes) + members
        sought = which[:, None] * width + wanted
        which = np.searchsorted(keys, sought)
        np.minimum(which, len(keys) - 1, out=which)
        missing = (keys[which] != sought) | (wanted < 0)
        found = places[which]
        found[missing] = -1
        return found

    def lowest(self, values: np.ndarray) -> np.ndarray:
        """The lowest of each row's values, float64 [n]; infinity where a row is empty.

        Args:
            values: one for each of ``self.values``.
        """
        return self._reduced(np.minimum, values)

    def highest(self, values: np.ndarray) -> np.ndarray:
        """As ``lowest``, the highest of each row's values; infinity where a row is empty."""
        return self._reduced(np.maximum, values)

    def _reduced(self, by: np.ufunc, values: np.ndarray) -> np.ndarray:
        reduced = np.full(len(self), np.inf)
        filled = np.flatnonzero(self.sizes())
        if len(filled):
            reduced[filled] = by.reduceat(values, self.lims[filled])
        return reduced

    def median(self, values: np.ndarray) -> np.ndarray:
        """As ``lowest``, the median of each row's values: the mean of the middle two where their number is even."""
        median, sizes = np.full(len(self), np.inf), self.sizes()
        filled = np.flatnonzero(sizes)
        ascending = values[np.lexsort((values, self.owners()))].astype(np.float64)
        first, size = self.lims[filled], sizes[filled]
        median[filled] = (ascending[first + (size - 1) // 2] + ascending[first + size // 2]) / 2
        return median

    def one_of_each(self, values: np.ndarray, which: str) -> np.ndarray:
        """``lowest``, ``median`` or ``highest`` by its name."""
        return {"lowest": self.lowest, "median": self.median, "highest": self.highest}[which](values)


class Growing:
    """Ragged rows of several columns, added in their order.

    Args:
        n: how many rows there will be.
        most: how many values there may be. Those that do not come take no memory.
        dtypes: of the columns.
    """

    def __init__(self, n: int, most: int, dtypes: Sequence[type]):
        self._lims = np.zeros(n + 1, np.int64)
        self._columns = tuple(np.empty(most, dtype) for dtype in dtypes)
        self._n = 0

    def add(self, sizes: Sequence[int] | np.ndarray, *columns: Sequence | np.ndarray) -> None:
        """The next rows: their sizes, and the columns of all in turn."""
        ends = self._lims[self._n] + np.cumsum(sizes)
        part = slice(self._lims[self._n], ends[-1])
        for column, values in zip(self._columns, columns, strict=True):
            column[part] = values
        self._lims[self._n + 1 : self._n + 1 + len(sizes)] = ends
        self._n += len(sizes)

    def finish(self) -> tuple[Ragged, tuple[np.ndarray, ...]]:
        """The rows of the first column, and the other columns, all [values]."""
        first, *others = (column[: self._lims[-1]] for column in self._columns)
        return Ragged(self._lims, first), tuple(others)
