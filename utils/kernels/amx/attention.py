"""Attention in bfloat16 by the processor's matrix instructions, each head's from its first product to its last.

32 queries at a time go through all keys, 32 by 32. While the tiles make a block of scores, the vector unit takes the
powers of the block before, so that no more of them is ever in memory than a core's first cache holds; sums over the
values follow (after FlashAttention, Dao et al., 2022). A softmax takes its powers below the highest score; here that
is looked for only where powers turn out too large or too small. Scores are added up in float32, and weights rounded
to bfloat16 before they are summed up over the values.
"""

from typing import NamedTuple

import numpy as np

from .. import onednn
from ..compiled import MATHS, compiled, inlined
from . import tiles, vectors

_F, _U = np.float32, np.uint32
# Queries that go through together, and the keys that a tile holds in each of the two products.
QUERIES, _SCORED, _SUMMED = 32, 16, 32
# Keys are filled up to a multiple of both; and the score of such a key.
ALIGNED, _LOWEST = 32, np.float32(-3e38)
_PAIRS = 16  # of bfloat16 in a tile's row
# Between these, what powers of 2 add up to is as good as if they had been taken below the highest.
_LEAST, _MOST = np.float32(2.0**-60), np.float32(2.0**60)
_inlined = inlined(MATHS)
_compiled = compiled(MATHS, makes_arrays=False)


def supports(head_width: int) -> bool:
    """True if heads of this width can be computed here."""
    return tiles.is_usable() and head_width % 32 == 0


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
    # Long rows are a line of the cache longer than need be: at a power of two apart, they would all fall into few of
    # its places.
    scratch = _Scratch(
        onednn.empty((2, widest // _SCORED, own // 32, _PAIRS, _SCORED), np.uint32),
        onednn.empty((2, own // 16, widest // _SUMMED, _PAIRS, 16), np.uint32),
        onednn.empty((2, QUERIES, own), np.uint16),
        onednn.empty((QUERIES, 32), np.float32),
        onednn.empty((2, 32), np.float32),
        onednn.empty((2, QUERIES, widest + 32), np.uint16),
        onednn.empty((2, QUERIES, 16), np.float32),
        np.empty(QUERIES, np.float32),
        onednn.empty((QUERIES, own), np.float32),
        onednn.empty((QUERIES, widest + 16), np.float32),
    )
    scratch.added[0] = 0
    _attention(tiles.WHOLE_TILES, qkv, lengths, heads, scratch, context)


class _Scratch(NamedTuple):
    """Where queries are under way; all begin with a line of the cache, or each access would take two.

    Keys, values, ``last``, weights and parts are there twice: for the queries under way and for those before.

    keys: uint32 [2, tiles, steps, 16, 16], packed. values: uint32 [2, columns, tiles, 16, 16], packed. last: bfloat16
    [2, 32, width], a text's last queries. block: float32 [32, 32], scores. added: float32 [2, 32], what is added to a
    row of them: 0, and for the last keys what leaves those out that are none. weights: bfloat16 [2, 32, any]. parts:
    float32 [2, 32, 16], of the weights' totals, float32 [32]. sums: float32 [32, width]. scores: float32 [32, any],
    where all are needed at a time.
    """

    keys: np.ndarray
    values: np.ndarray
    last: np.ndarray
    block: np.ndarray
    added: np.ndarray
    weights: np.ndarray
    parts: np.ndarray
    totals: np.ndarray
    sums: np.ndarray
    scores: np.ndarray


class _Queries(NamedTuple):
    """Up to 32 queries.

    n: how many; rows: where they lie, and how many bytes apart. length, padded: the keys there are, and these filled
    up to whole blocks. half, head_half: which of what is there twice is theirs, and their head's. to: where the result
    goes.
    """

    n: int
    rows: int
    from_row: int
    length: int
    padded: int
    half: int
    head_half: int
    to: int


class _Block(NamedTuple):
    """Scores to be weighed, if ``n`` is not 0: where all that belongs to them is, and how many bytes apart rows are."""

    n: int
    scores: int
    added: int
    weights: int
    from_weights: int
    parts: int


@_compiled
def _attention(whole_tiles, qkv, lengths, heads, scratch, context):
    b, _, width = context.shape
    own, pairs, to_row = width // heads, qkv.view(np.uint32), context.strides[1]
    half, head_half, before = 0, 0, _Queries(0, 0, 0, 0, 0, 0, 0, 0)
    tiles.configure(whole_tiles.ctypes.data)
    for text in range(b):
        length = lengths[text]
        padded = -(-length // ALIGNED) * ALIGNED
        for head in range(heads):
            query, key, value = head * own, width + head * own, 2 * width + head * own
            for first in range(0, length, QUERIES):
                half = 1 - half
                n = min(QUERIES, length - first)
                rows, from_row = qkv[text, first, query:].ctypes.data, qkv.strides[1]
                if n < QUERIES:  # a tile would read past the text's end, and perhaps past the array's
                    copy_rows(qkv[text], first, n, query, scratch.last[half])
                    rows, from_row = scratch.last[half].ctypes.data, scratch.last.strides[1]
                if first == 0:
                    head_half = 1 - head_half
                    pack_keys(pairs[text], length, padded, key // 2, scratch.keys[head_half])
                    pack_values(qkv[text], length, padded, value, own, scratch.values[head_half])
                to = context[text, first, query:].ctypes.data
                # With 0 added, an unsigned address becomes a number of ``before``'s type.
                queries = _Queries(n, rows + 0, from_row, length, padded, half, head_half, to + 0)
                _score(queries, 0, scratch, _last_block(before, scratch))
                _finish(before, to_row, scratch)
                _begin(queries, scratch)
                for column in range(1, padded // 32):
                    _score(queries, column, scratch, _block(queries, column - 1, 0, scratch))
                before = queries
    block = _last_block(before, scratch)
    for row in range(0, QUERIES, 8):
        _weigh(block, row)
    _finish(before, to_row, scratch)
    tiles.release()


@_inlined
def _score(queries, column, scratch, before):
    """A block of scores, made while the block before is weighed."""
    steps, (to_half, from_tile, from_step, _, _) = scratch.keys.shape[2], scratch.keys.strides
    left, right = queries.rows, scratch.keys.ctypes.data + queries.head_half * to_half + 2 * column * from_tile
    tiles.clear_block()
    for _ in range(steps - 1):
        tiles.add_product(left, queries.from_row, right, from_tile)
        left, right = left + 64, right + from_step
    # What ``add_product`` does, with something for the vector unit to do meanwhile.
    tiles.load(4, left, queries.from_row)
    tiles.load(5, left + 16 * queries.from_row, queries.from_row)
    tiles.load(6, right, 64)
    tiles.load(7, right + from_tile, 64)
    tiles.multiply(0, 4, 6)
    _weigh(before, 0)
    tiles.multiply(1, 4, 7)
    _weigh(before, 8)
    tiles.multiply(2, 5, 6)
    _weigh(before, 16)
    tiles.multiply(3, 5, 7)
    _weigh(before, 24)
    tiles.store_block(scratch.block.ctypes.data, 128)


@_inlined
def _block(queries, column, is_last, scratch):
    """The scores of some queries and a number of 32 keys, which are there now."""
    weights = scratch.weights.ctypes.data + queries.half * scratch.weights.strides[0] + 64 * column
    parts = scratch.parts.ctypes.data + queries.half * scratch.parts.strides[0]
    added = scratch.added.ctypes.data + is_last * scratch.added.strides[0]
    return _Block(queries.n, scratch.block.ctypes.data, added, weights, scratch.weights.strides[1], parts)


@_inlined
def _last_block(queries, scratch):
    return _block(queries, queries.padded // 32 - 1, 1, scratch)


@_inlined
def _weigh(block, first):
    """Eight rows of scores become weights, and add to the totals."""
    if block.n > 0:
        for row in range(first, first + 8):
            scores, weights = block.scores + 128 * row, block.weights + row * block.from_weights
            vectors.powers_of_2_added(scores, block.added, weights, block.parts + 64 * row)


@_inlined
def _begin(queries, scratch):
    """Nothing has been added up; and where the last keys are none, they will get no weight."""
    scratch.parts[queries.half] = _F(0.0)
    added = scratch.added[1]
    for j in range(32):
        added[j] = _F(0.0) if queries.padded - 32 + j < queries.length else _LOWEST


@_inlined
def _finish(queries, to_row, scratch):
    """Sums over the values, by the weights, become the result."""
    if queries.n > 0:
        weights, values, totals = scratch.weights[queries.half], scratch.values[queries.head_half], scratch.totals
        at_parts, are_good = scratch.parts[queries.half].ctypes.data, True
        for row in range(queries.n):
            totals[row] = vectors.total(at_parts + 64 * row)
            are_good &= _LEAST < totals[row] < _MOST
        if not are_good:
            keys, scores = scratch.keys[queries.head_half], scratch.scores
            multiply_rows(queries.rows, queries.from_row, keys, keys.shape[1], queries.padded // 32, scores)
            exponentiate(scores, queries.n, queries.length, queries.padded, weights, totals)
        sums, from_weights = scratch.sums, weights.strides[0]
        n_steps, columns = queries.padded // _SUMMED, sums.shape[1] // 32
        multiply_rows(weights.ctypes.data, from_weights, values, n_steps, columns, sums)
        for row in range(queries.n):
            address = sums.ctypes.data + row * sums.strides[0]
            vectors.scaled(address, sums.shape[1], _F(1.0) / totals[row], queries.to + row * to_row)


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
        tiles.clear_block()
        for step in range(steps):
            tiles.add_product(left + 64 * step, from_row, b + 2 * column * from_column + step * from_step, from_column)
        tiles.store_block(c + 128 * column, to_row)


@_inlined
def copy_rows(rows, first, n, column, block):
    for i in range(n):
        own, to = rows[first + i, column : column + block.shape[1]], block[i]
        for j in range(len(to)):
            to[j] = own[j]


# Parts of rows are cut out before they are gone through: an index that might be negative, for all that the compiler
# knows, keeps it from taking several values at once.


@_inlined
def pack_keys(rows, length, padded, column, packed):
    """A head's keys, in pairs (uint32), as the right-hand tiles of queries times keys; 0 past the last of them."""
    at_rows, from_row = rows.ctypes.data + 4 * column, rows.strides[0]
    at_packed, to_tile, to_step = packed.ctypes.data, packed.strides[0], packed.strides[1]
    whole = length // _SCORED
    for tile in range(whole):
        for step in range(packed.shape[1]):
            own = at_rows + tile * _SCORED * from_row + 64 * step
            vectors.transposed(own, from_row, at_packed + tile * to_tile + step * to_step)
    packed[whole : padded // _SCORED] = _U(0)
    for key in range(whole * _SCORED, length):
        for step in range(packed.shape[1]):
            for p in range(_PAIRS):
                packed[whole, step, p, key % _SCORED] = rows[key, column + step * _PAIRS + p]


@_inlined
def pack_values(rows, length, padded, column, width, packed):
    """A head's values as the right-hand tiles of weights times values; 0 past the last of them."""
    at_rows, from_row = rows.ctypes.data + 2 * column, rows.strides[0]
    at_packed, to_part, to_tile = packed.ctypes.data, packed.strides[0], packed.strides[1]
    for p in range(length // 2):
        own = at_rows + 2 * p * from_row
        vectors.paired(own, own + from_row, width, at_packed + p // _PAIRS * to_tile + p % _PAIRS * 64, to_part)
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
        totals[i] = vectors.powers_of_2(address, padded, vectors.largest(address, padded), weights[i].ctypes.data)
