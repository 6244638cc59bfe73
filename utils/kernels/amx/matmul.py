"""Products in bfloat16 by the processor's matrix instructions, with what follows them done in between.

A block of sums is finished while the matrix unit works on the next one: a bias is added, and an activation taken; or
what reaches a cut is noted, and the rest never written. A library would do the one after the other. Sums are float32.
"""

from typing import NamedTuple

import numpy as np

from .. import onednn
from ..compiled import compiled, inlined
from . import tiles, vectors

# Rows and columns of a block of sums, and the numbers that one step adds up.
_ROWS, _COLUMNS, _DEPTH = 32, 32, 32
_PLAIN, _ROUNDED, _GELU = 0, 1, 2
_EPILOGUES = {("none", np.float32): _PLAIN, ("none", np.uint16): _ROUNDED, ("gelu", np.uint16): _GELU}
# Of the right-hand matrix, what all rows go through before the next part does: it should stay in a core's own cache.
_KEPT_BYTES = 5 << 18
_inlined = inlined()


def supports(shape: tuple[int, int], activation: str = "none") -> bool:
    """True if matrices of this shape, [k, n], can be packed and multiplied by here."""
    return tiles.is_usable() and shape[0] % _DEPTH == 0 and shape[1] % _COLUMNS == 0 and activation in ("none", "gelu")


def supports_rows(k: int) -> bool:
    """True if rows of this width can be multiplied by each other here."""
    return tiles.is_usable() and k % _DEPTH == 0


class Packed:
    """A matrix in the order of the right-hand tiles.

    Args:
        values: bfloat16 (uint16) [k, n], for which ``supports`` says yes.

    Attributes:
        tiles: uint32 [n / 16, k / 32, 16, 16], each of two numbers.
    """

    def __init__(self, values: np.ndarray):
        k, n = values.shape
        assert supports((k, n))
        pairs = values.reshape(k // 32, 16, 2, n // 16, 16).transpose(3, 0, 1, 4, 2)
        self.tiles = onednn.empty((n // 16, k // 32, 16, 16), np.uint32)
        self.tiles.view(np.uint16).reshape(pairs.shape)[:] = pairs

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "Packed":
        """Of [n, k], as [k, n], filled up to a multiple of 32 columns with 0."""
        n, k = rows.shape
        padded = np.zeros((-(-n // _COLUMNS) * _COLUMNS, k), np.uint16)
        padded[:n] = rows
        self = cls.__new__(cls)
        self.tiles = onednn.empty((len(padded) // 16, k // 32, 16, 16), np.uint32)
        self.tiles[:] = padded.view(np.uint32).reshape(-1, 16, k // 32, 16).transpose(0, 2, 3, 1)
        return self

    def multiply(self, left: np.ndarray, result: np.ndarray, bias: np.ndarray, activation: str = "none") -> None:
        """``result`` becomes the activation of left times this plus bias, on this thread alone.

        Args:
            left: bfloat16 (uint16) [m, k], m a multiple of 32; C-contiguous, as is the result.
            result: float32 or bfloat16 [m, n]; bfloat16 if there is an activation.
            bias: float32 [n].
        """
        assert len(left) % _ROWS == 0 and left.shape[1] == _DEPTH * self.tiles.shape[1]
        assert result.shape == (len(left), 16 * len(self.tiles)) and len(bias) == result.shape[1]
        if len(left) == 0:
            return
        epilogue = _EPILOGUES[activation, result.dtype.type]
        sums = onednn.empty((_ROWS, _COLUMNS), np.float32)
        _multiply(tiles.WHOLE_TILES, left, self.tiles, _KEPT_BYTES, bias, epilogue, sums, result.view(np.uint8))

    def reaching(
        self, left: np.ndarray, row_bias: np.ndarray, cuts: np.ndarray, first: int, scratch: "Scratch"
    ) -> "Found":
        """The sums of left times this, plus a bias a row, that reach their column's cut.

        Args:
            left: bfloat16 (uint16) [m, k], C-contiguous.
            row_bias: float32 [m].
            cuts: float32 [n], infinity where columns were filled up.
            first: what the first row is called.
            scratch: where they are put, until the next call with it.
        """
        assert len(cuts) == 16 * len(self.tiles) and left.shape[1] == _DEPTH * self.tiles.shape[1]
        assert len(scratch.found.sums) >= len(left) * len(cuts)
        kept = _KEPT_BYTES
        n = _reaching(
            tiles.WHOLE_TILES, left, self.tiles, kept, row_bias, cuts, first, scratch.block, scratch.last, scratch.found
        )
        return Found(*(column[:n] for column in scratch.found))


class Found(NamedTuple):
    """Pairs of a column and a row, int64 [n] twice, and their sums, float32 [n]."""

    columns: np.ndarray
    rows: np.ndarray
    sums: np.ndarray


class Scratch(NamedTuple):
    """What ``reaching`` writes to: what it finds; a block of sums; the last rows, where they make no whole block."""

    found: Found
    block: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, m: int, packed: Packed) -> "Scratch":
        """For up to ``m`` rows."""
        n, k = 16 * len(packed.tiles), _DEPTH * packed.tiles.shape[1]
        found = Found(np.empty(m * n, np.int64), np.empty(m * n, np.int64), np.empty(m * n, np.float32))
        return cls(found, onednn.empty((_ROWS, _COLUMNS), np.float32), onednn.empty((_ROWS, k), np.uint16))


# Both loops go over blocks of sums in turn. While the tiles take one block's steps, the vector unit goes over the rows
# of the block before, which has been stored and is waiting; the last one's rows are left for the end:
#
#     tiles:    block 0, steps | block 1, steps  | ... | block n, steps   |
#     vectors:  (none waits)   | rows of block 0 | ... | rows of n - 1    | rows of block n


@compiled()
def _multiply(whole_tiles, left, right, kept_bytes, bias, epilogue, sums, result):
    steps, columns = right.shape[1], len(right) // 2
    at_left, from_row = left.ctypes.data, left.strides[0]
    at_right, from_tile, from_step = right.ctypes.data, right.strides[0], right.strides[1]
    at_bias, at_result, to_row = bias.ctypes.data, result.ctypes.data, result.strides[0]
    width = to_row // columns  # bytes of a block's row in the result
    at_sums, rows_a_step = sums.ctypes.data, -(-_ROWS // steps)
    tiles.configure(whole_tiles.ctypes.data)
    at_once = max(1, kept_bytes // (2 * from_tile))
    waiting, waiting_bias, row = at_result, at_bias, _ROWS  # none of its rows is left to do
    for first_column in range(0, columns, at_once):
        for block in range(len(left) // _ROWS):
            for column in range(first_column, min(first_column + at_once, columns)):
                tiles.clear_block()
                for step in range(steps):
                    above = at_left + block * _ROWS * from_row + 64 * step
                    tiles.add_product(above, from_row, at_right + 2 * column * from_tile + step * from_step, from_tile)
                    for _ in range(rows_a_step):
                        if row < _ROWS:
                            _epilogue(epilogue, at_sums + 128 * row, waiting_bias, waiting + row * to_row)
                            row += 1
                tiles.store_block(at_sums, 128)
                waiting, waiting_bias = at_result + block * _ROWS * to_row + column * width, at_bias + 128 * column
                row = 0
    for row in range(_ROWS):
        _epilogue(epilogue, at_sums + 128 * row, waiting_bias, waiting + row * to_row)
    tiles.release()


@compiled()
def _reaching(whole_tiles, left, right, kept_bytes, row_bias, cuts, first, sums, last, found):
    m, steps, columns, count = len(left), right.shape[1], len(right) // 2, 0
    from_row, at_last, at_cuts = left.strides[0], last.ctypes.data, cuts.ctypes.data
    at_right, from_tile, from_step = right.ctypes.data, right.strides[0], right.strides[1]
    at_sums, rows_a_step = sums.ctypes.data, -(-_ROWS // steps)
    whole = m // _ROWS
    for row in range(m - whole * _ROWS):  # a tile would read past the array's end
        last[row] = left[whole * _ROWS + row]
    tiles.configure(whole_tiles.ctypes.data)
    at_once = max(1, kept_bytes // (2 * from_tile))
    row, end, waiting = 0, 0, (0, 0)
    for first_column in range(0, columns, at_once):
        for block in range(-(-m // _ROWS)):
            at_left = left.ctypes.data + block * _ROWS * from_row if block < whole else at_last
            for column in range(first_column, min(first_column + at_once, columns)):
                tiles.clear_block()
                at_column = at_right + 2 * column * from_tile
                for step in range(steps):
                    tiles.add_product(at_left + 64 * step, from_row, at_column + step * from_step, from_tile)
                    for _ in range(rows_a_step):
                        if row < end:
                            count = _note(sums, at_sums, row, waiting, row_bias, at_cuts, first, found, count)
                            row += 1
                tiles.store_block(at_sums, 128)
                waiting = block * _ROWS, column * _COLUMNS
                row, end = 0, min(_ROWS, m - block * _ROWS)
    for row in range(end):
        count = _note(sums, at_sums, row, waiting, row_bias, at_cuts, first, found, count)
    tiles.release()
    return count


@_inlined
def _note(sums, at_sums, row, block, row_bias, at_cuts, first, found, count):
    """Which sums reach, of a row of a block; and the number of all so far."""
    own = block[0] + row
    bits = vectors.reaching(at_sums + 128 * row, row_bias[own], at_cuts + 4 * block[1])
    while bits:
        place = vectors.lowest_bit(bits)
        found.columns[count], found.rows[count] = block[1] + place, first + own
        found.sums[count] = sums[row, place] + row_bias[own]
        count += 1
        bits = np.uint32(bits & np.uint32(bits - np.uint32(1)))
    return count


@_inlined
def _epilogue(epilogue, sums, bias, to):
    if epilogue == _GELU:
        vectors.add_gelu_rounded(sums, bias, to)
    elif epilogue == _ROUNDED:
        vectors.add_rounded(sums, bias, to)
    else:
        vectors.add(sums, bias, to)
