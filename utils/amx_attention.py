"""Attention in bfloat16 by the processor's matrix instructions, each head's from its first product to its last.

For 32 queries at a time, the scores of all keys, their softmax, and its product with the values follow each
other in the core's own cache (after FlashAttention, Dao et al., 2022, for which a row of scores is too long;
here whole rows fit). Scores are added up in float32, and weights rounded to bfloat16 before they are summed up
over the values.
"""

from typing import NamedTuple

import numpy as np

from utils import amx, avx512, matmul
from utils.compiled import MATHS, compiled, inlined

_F, _U = np.float32, np.uint32
# Queries that go through together, and the keys that a tile holds in each of the two products.
QUERIES, _SCORED, _SUMMED = 32, 16, 32
# Keys are filled up to a multiple of both; and the score of such a key.
ALIGNED, _LOWEST = 32, np.float32(-3e38)
_PAIRS = 16  # of bfloat16 in a tile's row
_inlined = inlined(MATHS)
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
    own = context.shape[2] // heads
    assert supports(own)
    widest = -(-context.shape[1] // ALIGNED) * ALIGNED
    scratch = _Scratch(
        matmul.empty((widest // _SCORED, own // 32, _PAIRS, _SCORED), np.uint32),
        matmul.empty((own // 16, widest // _SUMMED, _PAIRS, 16), np.uint32),
        # Rows are a line of the cache longer than need be: at a power of two apart, they would all fall into few of
        # its places.
        matmul.empty((QUERIES, widest + 16), np.float32),
        matmul.empty((QUERIES, widest + 32), np.uint16),
        matmul.empty((QUERIES, own), np.float32),
        matmul.empty((QUERIES, own), np.uint16),
    )
    _attention(amx.WHOLE_TILES, qkv, lengths, heads, scratch, context)


class _Scratch(NamedTuple):
    """Where a head's work goes on; all begin with a line of the cache, or each access would take two.

    keys: uint32 [tiles, steps, 16, 16], packed. values: uint32 [columns, tiles, 16, 16], packed. scores: float32
    [32, any]. weights: bfloat16 [32, any]. sums: float32 [32, width]. last: bfloat16 [32, width], the last queries.
    """

    keys: np.ndarray
    values: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    sums: np.ndarray
    last: np.ndarray


@_compiled
def _attention(whole_tiles, qkv, lengths, heads, scratch, context):
    b, _, width = context.shape
    own = width // heads
    totals, pairs = np.empty(QUERIES, np.float32), qkv.view(np.uint32)
    keys, values, scores, weights = scratch.keys, scratch.values, scratch.scores, scratch.weights
    amx.configure(whole_tiles.ctypes.data)
    for text in range(b):
        length = lengths[text]
        padded = -(-length // ALIGNED) * ALIGNED
        for head in range(heads):
            query, key, value = head * own, width + head * own, 2 * width + head * own
            pack_keys(pairs[text], length, padded, key // 2, keys)
            pack_values(qkv[text], length, padded, value, own, values)
            for first in range(0, length, QUERIES):
                n = min(QUERIES, length - first)
                left, stride = qkv[text, first, query:].ctypes.data, qkv.strides[1]
                if n < QUERIES:  # a tile would read past the text's end, and perhaps past the array's
                    copy_rows(qkv[text], first, n, query, scratch.last)
                    left, stride = scratch.last.ctypes.data, scratch.last.strides[0]
                multiply_rows(left, stride, keys, own // 32, padded // 32, scores)
                exponentiate(scores, n, length, padded, weights, totals)
                multiply_rows(
                    weights.ctypes.data, weights.strides[0], values, padded // _SUMMED, own // 32, scratch.sums
                )
                for i in range(n):
                    to = context[text, first + i, query:].ctypes.data
                    avx512.scaled(scratch.sums[i].ctypes.data, own, _F(1.0) / totals[i], to)
    amx.release()


@_inlined
def multiply_rows(left, from_row, right, steps, columns, result):
    """The first 32 * ``columns`` columns of ``result``, float32 [32, any], become those of left times right.

    Args:
        left: the address of uint16 [32, 32 * steps], rows ``from_row`` bytes apart.
        right: packed, uint32 [at least 2 * columns, at least steps, 16, 16].
    """
    b, from_column, from_step = right.ctypes.data, right.strides[0], right.strides[1]
    c, to_row = result.ctypes.data, result.strides[0]
    for column in range(columns):
        amx.clear_block()
        for step in range(steps):
            amx.add_product(left + 64 * step, from_row, b + 2 * column * from_column + step * from_step, from_column)
        amx.store_block(c + 128 * column, to_row)


@_inlined
def copy_rows(rows, first, n, column, block):
    for i in range(n):
        block[i] = rows[first + i, column : column + block.shape[1]]


# Parts of rows are cut out before they are gone through: an index that might be negative, for all that the compiler
# knows, keeps it from taking several values at once.


@_inlined
def pack_keys(rows, length, padded, column, packed):
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
def pack_values(rows, length, padded, column, width, packed):
    """A head's values as the right-hand tiles of weights times values; 0 past the last of them."""
    for p in range(length // 2):
        to = packed[0, p // _PAIRS, p % _PAIRS].ctypes.data
        one, other = rows[2 * p, column:].ctypes.data, rows[2 * p + 1, column:].ctypes.data
        avx512.paired(one, other, width, to, packed.strides[0])
    for p in range(length // 2, padded // 2):
        for part in range(len(packed)):
            own = packed[part, p // _PAIRS, p % _PAIRS]
            own[:] = _U(0)
            if 2 * p < length:
                one = rows[2 * p, column + part * 16 : column + part * 16 + 16]
                for j in range(16):
                    own[j] = _U(one[j])


@_inlined
def exponentiate(scores, n, length, padded, weights, totals):
    """``n`` rows of ``length`` scores become weights, bfloat16, which add up to what goes into ``totals``."""
    for i in range(n):
        row = scores[i]
        for j in range(length, padded):
            row[j] = _LOWEST
        address = row.ctypes.data
        totals[i] = avx512.powers_of_2(address, padded, avx512.largest(address, padded), weights[i].ctypes.data)
