"""Attention in bfloat16 by the processor's matrix instructions, each head's from its first product to its last.

For 32 queries at a time, the scores of all keys, their softmax, and its product with the values follow each
other in the core's own cache (after FlashAttention, Dao et al., 2022, for which a row of scores is too long;
here whole rows fit). Scores are added up in float32, and weights rounded to bfloat16 before they are summed up
over the values.
"""

import numba
import numpy as np

from utils import amx
from utils.compiled import compiled
from utils.cpu_kernels import MATHS, coarse_exp2, highest

_F, _U = np.float32, np.uint32
# Queries that go through together, and the keys that a tile holds in each of the two products.
_QUERIES, _SCORED, _SUMMED = 32, 16, 32
# Keys are filled up to a multiple of what the compiled loops over a row of scores take at once; what is left over
# would go one by one. And the score of such a key.
_ALIGNED, _LOWEST = 64, np.float32(-3e38)
_PAIRS = 16  # of bfloat16 in a tile's row
_inlined = numba.njit(fastmath=MATHS, inline="always", error_model="numpy")
_compiled = compiled(MATHS)


def supports(head_width: int) -> bool:
    """True if heads of this width can be computed here."""
    return amx.is_usable() and head_width % 32 == 0


def attention(qkv: np.ndarray, lengths: np.ndarray, heads: int, context: np.ndarray) -> None:
    """Softmax attention of each text within itself (Vaswani et al., 2017).

    Args:
        qkv: queries, keys and values, uint16 (bfloat16) [b, t, 3 * heads * width]. What comes out for a query
            is the mean of the values, weighted by 2 to the power of the scores.
        lengths: int64 [b], the tokens of each text that are no padding.
        context: uint16 [b, t, heads * width], filled in but for padding.
    """
    assert supports(context.shape[2] // heads)
    _attention(amx.WHOLE_TILES, qkv, lengths, heads, context)


@_compiled
def _attention(whole_tiles, qkv, lengths, heads, context):
    b, t, width = context.shape
    own = width // heads
    widest = -(-t // _ALIGNED) * _ALIGNED
    keys = np.empty((widest // _SCORED, own // 32, _PAIRS, _SCORED), np.uint32)
    values = np.empty((own // 16, widest // _SUMMED, _PAIRS, 16), np.uint32)
    # Rows are a line of the cache longer than need be: at a power of two apart, they would all fall into few of its
    # places.
    scores, weights = np.empty((_QUERIES, widest + 16), np.float32), np.empty((_QUERIES, widest + 32), np.uint16)
    last, rounded = np.empty((_QUERIES, own), np.uint16), np.empty((_QUERIES, own), np.uint16)
    result = np.empty((_QUERIES, own), np.float32)
    pairs, fours = qkv.view(np.uint32), context.view(np.uint64)
    amx.configure(whole_tiles.ctypes.data)
    for text in range(b):
        length = lengths[text]
        padded = -(-length // _ALIGNED) * _ALIGNED
        for head in range(heads):
            query, key, value = head * own, width + head * own, 2 * width + head * own
            _pack_keys(pairs[text], length, padded, key // 2, keys)
            _pack_values(qkv[text], length, padded, value, values)
            for first in range(0, length, _QUERIES):
                n = min(_QUERIES, length - first)
                left, stride = qkv[text, first, query:].ctypes.data, qkv.strides[1]
                if n < _QUERIES:  # a tile would read past the text's end, and perhaps past the array's
                    _copy(qkv[text], first, n, query, last)
                    left, stride = last.ctypes.data, last.strides[0]
                _multiply(left, stride, keys, own // 32, padded // 32, scores)
                _weigh(scores, n, length, padded, weights)
                _multiply(weights.ctypes.data, weights.strides[0], values, padded // _SUMMED, own // 32, result)
                _put(result, rounded, n, fours[text], first, query // 4)
    amx.release()


@_inlined
def _multiply(left, from_row, right, steps, columns, result):
    """The first 32 * ``columns`` columns of ``result``, float32 [32, any], become those of left times right.

    Args:
        left: the address of uint16 [32, 32 * steps], rows ``from_row`` bytes apart.
        right: packed, uint32 [at least 2 * columns, at least steps, 16, 16].
    """
    b, from_column, from_step = right.ctypes.data, right.strides[0], right.strides[1]
    c, to_row = result.ctypes.data, result.strides[0]
    for column in range(columns):
        amx.zero(0)
        amx.zero(1)
        amx.zero(2)
        amx.zero(3)
        for step in range(steps):
            above, first = left + 64 * step, b + 2 * column * from_column + step * from_step
            amx.load(4, above, from_row)
            amx.load(5, above + 16 * from_row, from_row)
            amx.load(6, first, 64)
            amx.load(7, first + from_column, 64)
            amx.multiply(0, 4, 6)
            amx.multiply(1, 4, 7)
            amx.multiply(2, 5, 6)
            amx.multiply(3, 5, 7)
        to = c + 128 * column
        amx.store(0, to, to_row)
        amx.store(1, to + 64, to_row)
        amx.store(2, to + 16 * to_row, to_row)
        amx.store(3, to + 16 * to_row + 64, to_row)


@_inlined
def _copy(rows, first, n, column, block):
    for i in range(n):
        block[i] = rows[first + i, column : column + block.shape[1]]


# Parts of rows are cut out before they are gone through: an index that might be negative, for all that the compiler
# knows, keeps it from taking several values at once.


@_inlined
def _pack_keys(rows, length, padded, column, packed):
    """A head's keys, in pairs (uint32), as the right-hand tiles of queries times keys; 0 past the last of them."""
    for tile in range(padded // _SCORED):
        for step in range(packed.shape[1]):
            own, start = packed[tile, step], column + step * _PAIRS
            for j in range(_SCORED):
                key = tile * _SCORED + j
                if key < length:
                    row = rows[key, start : start + _PAIRS]
                    for p in range(_PAIRS):
                        own[p, j] = row[p]
                else:
                    for p in range(_PAIRS):
                        own[p, j] = _U(0)


@_inlined
def _pack_values(rows, length, padded, column, packed):
    """A head's values as the right-hand tiles of weights times values; 0 past the last of them."""
    for p in range(padded // 2):
        for part in range(len(packed)):
            own, start = packed[part, p // _PAIRS, p % _PAIRS], column + part * 16
            if 2 * p + 1 < length:
                one, other = rows[2 * p, start : start + 16], rows[2 * p + 1, start : start + 16]
                for j in range(16):
                    own[j] = _U(one[j]) | _U(_U(other[j]) << _U(16))
            elif 2 * p < length:
                one = rows[2 * p, start : start + 16]
                for j in range(16):
                    own[j] = _U(one[j])
            else:
                for j in range(16):
                    own[j] = _U(0)


@_inlined
def _weigh(scores, n, length, padded, weights):
    """``n`` rows of ``length`` scores become weights that add up to 1, and these bfloat16."""
    for i in range(n):
        row = scores[i]
        for j in range(length, padded):
            row[j] = _LOWEST
        largest, total = highest(row, padded), _F(0.0)
        for j in range(padded):
            row[j] = coarse_exp2(row[j] - largest)
            total += row[j]
        share = _F(1.0) / total
        for j in range(padded):
            row[j] *= share
        bits, rounded = row.view(np.uint32), weights[i]
        for j in range(padded):
            rounded[j] = np.uint16(_U(bits[j] + _U(0x8000)) >> _U(16))


@_inlined
def _put(sums, rounded, n, context, first, column):
    """``n`` rows, rounded to bfloat16, into a head's columns of a text's; these as uint64, four numbers each."""
    bits, flat = sums.reshape(-1).view(np.uint32), rounded.reshape(-1)
    for j in range(len(flat)):
        flat[j] = np.uint16(_U(bits[j] + _U(0x8000)) >> _U(16))
    fours = rounded.view(np.uint64)
    for i in range(n):
        own, to = fours[i], context[first + i, column : column + fours.shape[1]]
        for j in range(len(own)):
            to[j] = own[j]
