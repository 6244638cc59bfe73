"""The gradients of attention in bfloat16, by the processor's matrix instructions.

As ``attention``: 32 queries of a head at a time, whose scores are made again and never leave the core's own cache
(FlashAttention, Dao et al., 2022). With the weights P of the values V, and the gradient O of the result:

    dV = P' O,   dP = O V',   dS = P * (dP - the sum over a row of P * dP),   dQ = dS K,   dK = dS' Q.

P and dS are rounded to bfloat16 before they are multiplied; sums are float32.
"""

from typing import NamedTuple

import numpy as np

from .. import onednn
from ..compiled import MATHS, compiled, inlined
from . import tiles, vectors
from .attention import ALIGNED, QUERIES, copy_rows, exponentiate, multiply_rows, pack_keys, pack_values

_F, _U = np.float32, np.uint32
_LOG_2 = np.float32(np.log(2))
_inlined = inlined(MATHS)


def attention_backward(qkv: np.ndarray, d_context: np.ndarray, heads: int, d_qkv: np.ndarray) -> None:
    """The gradient of ``attention.attention`` of one text without padding.

    Args:
        qkv: uint16 (bfloat16) [t, 3 * heads * width], as for the attention: its scores are logarithms to base 2.
        d_context: uint16 (bfloat16) [t, heads * width], the gradient of what came out.
        d_qkv: float32 [t, 3 * heads * width], filled in: the gradients of queries, before they were scaled by
            1 / (log 2 * sqrt(width)), of keys, and of values.
    """
    t, own = len(qkv), d_context.shape[1] // heads
    widest = -(-t // ALIGNED) * ALIGNED
    # Rows are a line of the cache longer than need be: see amx_attention.
    scratch = _Scratch(
        onednn.empty((3, widest // 16, own // 32, 16, 16), np.uint32),
        onednn.empty((own // 16, widest // 32, 16, 16), np.uint32),
        onednn.empty((2, own, widest + 32), np.uint16),
        onednn.empty((2, own, widest + 16), np.float32),
        onednn.empty((2, QUERIES, widest + 16), np.float32),
        onednn.empty((2, QUERIES, widest + 32), np.uint16),
        onednn.empty((2, widest // 16, 16, 16), np.uint32),
        onednn.empty((QUERIES, own), np.float32),
        onednn.empty((2, QUERIES, own), np.uint16),
        np.empty((2, widest), np.float32),
        np.empty(QUERIES, np.float32),
    )
    _backward(tiles.WHOLE_TILES, qkv, d_context, heads, scratch, d_qkv)


class _Scratch(NamedTuple):
    """Where a head's work goes on; see ``attention``.

    across: keys and values, packed to be multiplied by rows of theirs. along: keys, packed to be summed up over.
    transposed: queries and ``d_context``, bfloat16 [2, width, t]. sums: the gradients of keys and of values, float32
    [2, width, t]. scores: of a block, and the gradients of its weights, float32 [2, 32, t]. weights: bfloat16
    [2, 32, t], a block's weights and gradients of scores. packed: the same, packed. result: float32 [32, width]. last:
    bfloat16 [2, 32, width], the last queries and ``d_context``. row: float32 [2, t]. totals: float32 [32], of the
    weights.
    """

    across: np.ndarray
    along: np.ndarray
    transposed: np.ndarray
    sums: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    packed: np.ndarray
    result: np.ndarray
    last: np.ndarray
    row: np.ndarray
    totals: np.ndarray


@compiled(MATHS, makes_arrays=False)
def _backward(whole_tiles, qkv, d_context, heads, scratch, d_qkv):
    length, width = d_context.shape
    own = width // heads
    padded = -(-length // ALIGNED) * ALIGNED
    scale = _F(1.0) / np.sqrt(_F(own))
    pairs, totals = qkv.view(np.uint32), scratch.totals
    keys, values = scratch.across[0], scratch.across[1]
    scores, d_weights = scratch.scores[0], scratch.scores[1]
    weights, d_scores = scratch.weights[0], scratch.weights[1]
    scratch.last[:] = 0
    tiles.configure(whole_tiles.ctypes.data)
    for head in range(heads):
        query, key, value = head * own, width + head * own, 2 * width + head * own
        pack_keys(pairs, length, padded, key // 2, keys)
        pack_keys(pairs, length, padded, value // 2, values)
        pack_values(qkv, length, padded, key, own, scratch.along)
        _transpose(qkv, length, query, scratch.transposed[0])
        _transpose(d_context, length, query, scratch.transposed[1])
        scratch.sums[:] = _F(0.0)
        for first in range(0, length, QUERIES):
            n = min(QUERIES, length - first)
            left, left_step = qkv[first, query:].ctypes.data, qkv.strides[0]
            right, right_step = d_context[first, query:].ctypes.data, d_context.strides[0]
            if n < QUERIES:  # a tile would read past the text's end
                copy_rows(qkv, first, n, query, scratch.last[0])
                copy_rows(d_context, first, n, query, scratch.last[1])
                left, left_step = scratch.last[0].ctypes.data, scratch.last.strides[1]
                right, right_step = scratch.last[1].ctypes.data, scratch.last.strides[1]
            multiply_rows(left, left_step, keys, own // 32, padded // 32, scores)
            exponentiate(scores, n, length, padded, weights, totals)
            multiply_rows(right, right_step, values, own // 32, padded // 32, d_weights)
            for i in range(n):
                _row(weights[i], d_scores[i], d_weights[i], _F(1.0) / totals[i], padded, scratch.row[0], scratch.row[1])
            weights[n:] = 0
            d_scores[n:] = 0
            multiply_rows(
                d_scores.ctypes.data, d_scores.strides[0], scratch.along, padded // 32, own // 32, scratch.result
            )
            for i in range(n):
                to, result = d_qkv[first + i, query : query + own], scratch.result[i]
                for j in range(own):
                    to[j] = result[j] * scale
            for which in range(2):
                block, packed = scratch.weights[1 - which], scratch.packed[which]
                for p in range(QUERIES // 2):
                    one, other = block[2 * p].ctypes.data, block[2 * p + 1].ctypes.data
                    vectors.paired(one, other, padded, packed[0, p].ctypes.data, packed.strides[0])
                transposed = scratch.transposed[which]
                for part in range(own // 32):
                    at_left = transposed[32 * part, first:].ctypes.data
                    at_sums = scratch.sums[which, 32 * part].ctypes.data
                    _accumulate(at_left, transposed.strides[0], packed, padded // 32, at_sums, scratch.sums.strides[1])
        _transpose_back(scratch.sums[0], _LOG_2, length, key, d_qkv)
        _transpose_back(scratch.sums[1], _F(1.0), length, value, d_qkv)
    tiles.release()


@_inlined
def _row(weights, d_scores, d_weights, share, padded, weight, product):
    """A query's weights, until now not over their total, and the gradients of its scores."""
    bits = weight.view(np.uint32)
    for j in range(padded):
        bits[j] = _U(_U(weights[j]) << _U(16))
    along = _F(0.0)
    for j in range(padded):
        weight[j] *= share
        along += weight[j] * d_weights[j]
    for j in range(padded):
        product[j] = weight[j] * (d_weights[j] - along)
    vectors.scaled(weight.ctypes.data, padded, _F(1.0), weights.ctypes.data)
    vectors.scaled(product.ctypes.data, padded, _F(1.0), d_scores.ctypes.data)


@_inlined
def _transpose(rows, length, column, transposed):
    """A head's columns of rows as rows, filled up with 0."""
    for i in range(len(transposed)):
        own = transposed[i]
        for j in range(length):
            own[j] = rows[j, column + i]
        own[length:] = 0


@_inlined
def _transpose_back(transposed, factor, length, column, rows):
    """The reverse, times a factor."""
    for j in range(length):
        own = rows[j, column : column + len(transposed)]
        for i in range(len(transposed)):
            own[i] = transposed[i, j] * factor


@_inlined
def _accumulate(left, from_row, right, columns, sums, to_row):
    """Add a product of [32, 32] by [32, 32 * columns] to float32 [32, 32 * columns]."""
    b, from_column = right.ctypes.data, right.strides[0]
    for column in range(columns):
        to = sums + 128 * column
        tiles.load_block(to, to_row)
        tiles.add_product(left, from_row, b + 2 * column * from_column, from_column)
        tiles.store_block(to, to_row)
