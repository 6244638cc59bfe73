"""What ``cpu`` and ``attention`` share: blocks of rows on all cores, products in bfloat16, dropout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...kernels import onednn
from ...process import runtime
from ...process.threads import in_threads

if TYPE_CHECKING:
    from ...kernels.training_loops import Dropping

# Rows that one thread works on at a time. Sums over rows are made block by block, so this is part of their last bits.
_ROWS = 256
# Rows that are multiplied in bfloat16 at a time; what the last ones are filled up to a multiple of, since preparing a
# product takes longer than running it; and the fewest whose part of a weight's gradient is worth a sum of its own.
_BFLOAT16_ROWS, _FILLED_ROWS, _SUMMED_ROWS = 512, 128, 1024


@dataclass(frozen=True)
class Drop:
    """Dropout: the share of values to drop, and the seed words that settle which."""

    share: float = 0.0
    seed: Sequence[int] = ()

    def settled(self, *place: int) -> "Dropping":
        """As ``training_loops`` take it; the key is of the seed and a place."""
        from ...kernels.training_loops import Dropping

        key = np.random.SeedSequence([*self.seed, *place]).generate_state(1)[0] if self.share else 0
        threshold = min(round(self.share * 2**32), 2**32 - 1)
        return Dropping(np.uint32(key), np.uint32(threshold), np.float32(1 / (1 - self.share)))


def in_blocks(n: int, work: Callable[..., None], sums: np.ndarray | None = None) -> None:
    """``work`` of every block of rows; if ``sums`` are given, also of an array like them, to be added to them."""

    def block(start: int) -> np.ndarray | None:
        rows = slice(start, start + _ROWS)
        if sums is None:
            return work(rows)
        own = np.zeros_like(sums)
        work(rows, own)
        return own

    for own in in_threads(block, range(0, n, _ROWS)):
        if sums is not None:
            sums += own


def in_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 rows [n, h] rounded to bfloat16, filled up with zeros to a multiple of ``_FILLED_ROWS``."""
    n = len(values)
    rounded = onednn.empty((-(-n // _FILLED_ROWS) * _FILLED_ROWS, values.shape[1]), np.uint16)
    in_blocks(n, lambda rows: onednn.to_bfloat16(values[rows], rounded[rows]))
    rounded[n:] = 0
    return rounded


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float32 [n, b] of bfloat16 [n, a] and [a, b]."""
    n = len(left)
    result = onednn.empty((n, right.shape[1]), np.float32)

    def work(start: int) -> None:
        rows = slice(start, start + _BFLOAT16_ROWS)
        onednn.matmul(left[rows], right, result[rows])

    in_threads(work, range(0, n, _BFLOAT16_ROWS))
    return result


def product_over_rows(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float32 [a, b] of bfloat16 [n, a], transposed, and [n, b]."""
    n = len(left)
    n_sums = max(1, min(runtime.cpu_threads(), n // _SUMMED_ROWS))
    size = -(-n // (n_sums * _FILLED_ROWS)) * _FILLED_ROWS

    def work(start: int) -> np.ndarray:
        rows, result = slice(start, start + size), onednn.empty((left.shape[1], right.shape[1]), np.float32)
        onednn.matmul(left[rows].T, right[rows], result)
        return result

    total, *others = in_threads(work, range(0, n, size))
    for other in others:
        total += other
    return total
