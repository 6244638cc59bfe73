"""Lists of whole numbers, one for each of many rows, held in one array instead of an object each."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class NumberLists(Sequence):
    """``values``, int64, holds the lists one after another; list i ends where list i + 1 begins.

    Args:
        values: int64 [total], or an ``array("q")``.
        lengths: of each list, int [n].
    """

    def __init__(self, values: np.ndarray | array, lengths: Sequence[int] | np.ndarray):
        self.values = np.asarray(values, np.int64)
        self.lengths = np.asarray(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        assert self.starts[-1] == len(self.values)

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> "NumberLists":
        """The same lists."""
        values, lengths = array("q"), array("q")
        for numbers in lists:
            values.extend(numbers)
            lengths.append(len(numbers))
        return cls(values, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """List i, int64, a view."""
        return self.values[self.starts[i] : self.starts[i + 1]]

    def take(self, rows: np.ndarray) -> "NumberLists":
        """The lists of these rows, in their order."""
        lengths = self.lengths[rows]
        places = np.repeat(self.starts[rows] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        return NumberLists(self.values[places], lengths)
