"""Compiled loops of the CPU engine, between an encoder's matrix products.

Each runs on one core and without Python's lock. All arrays are float32 and C-contiguous unless said otherwise.
"""

import numpy as np

from .compiled import MATHS, compiled, inlined
from .maths import exp, highest

_F, _U = np.float32, np.uint32
_inlined = inlined(MATHS)
_compiled = compiled(MATHS)


@_inlined
def _coarse_exp2(x):
    """2**x to 8e-5 of its value, never below 2**-100, for what is rounded to bfloat16.

    The cubic is the one whose largest relative error over half a normalised to either side of 0 is the least.
    """
    x = _F(-100.0) if x < _F(-100.0) else x
    power = np.floor(x + _F(0.5))
    rest = x - power
    series = _F(0.05517167) * rest + _F(0.24261112)
    series = series * rest + _F(0.69326099)
    series = series * rest + _F(0.99992807)
    bits = np.int32((np.int32(power) + np.int32(127)) << np.int32(23))
    return series * bits.view(np.float32)


@_compiled
def split_heads(qkv, parts):
    """Queries, keys and values of texts, [b, t, 3 * width], to [3, b * heads, t, head width]; of any one type."""
    b, t, _ = qkv.shape
    _, batch, _, width = parts.shape
    heads = batch // b
    for which in range(3):
        for text in range(b):
            for head in range(heads):
                column = (which * heads + head) * width
                for i in range(t):
                    for j in range(width):
                        parts[which, text * heads + head, i, j] = qkv[text, i, column + j]


@_compiled
def join_heads(parts, rows):
    """The reverse for one of them: [b * heads, t, head width] to [b, t, width]."""
    b, t, _ = rows.shape
    batch, _, width = parts.shape
    heads = batch // b
    for text in range(b):
        for head in range(heads):
            for i in range(t):
                for j in range(width):
                    rows[text, i, head * width + j] = parts[text * heads + head, i, j]


@_compiled
def masked_softmax(scores, lengths):
    """Scores of attention [b, rows, t] become weights, with none past each one's length, int64 [b]."""
    b, n, t = scores.shape
    for number in range(b):
        length = lengths[number]
        for i in range(n):
            row = scores[number, i]
            largest, total = highest(row, length), _F(0.0)
            for j in range(length):
                row[j] = exp(row[j] - largest)
                total += row[j]
            total = _F(1.0) / total
            for j in range(length):
                row[j] *= total
            for j in range(length, t):
                row[j] = _F(0.0)


@_compiled
def masked_softmax_to_bfloat16(scores, lengths, weights):
    """The same of scores in units of log 2, and to bfloat16 ``weights`` (uint16 [at least b, rows, t])."""
    b, n, t = scores.shape
    own = np.empty(t, np.float32)
    bits = own.view(np.uint32)
    for number in range(b):
        length = lengths[number]
        for i in range(n):
            row, rounded = scores[number, i], weights[number, i]
            largest, total = highest(row, length), _F(0.0)
            for j in range(length):
                value = _coarse_exp2(row[j] - largest)
                own[j] = value
                total += value
            total = _F(1.0) / total
            for j in range(length):
                own[j] *= total
            for j in range(length):
                rounded[j] = np.uint16(_U(bits[j] + _U(0x8000)) >> _U(16))
            for j in range(length, t):
                rounded[j] = np.uint16(0)


@_compiled
def add_and_norm(x, z, gain, offset, epsilon, rounded):
    """x [n, h] becomes the layer norm of x + z; and, if ``rounded`` (uint16 [n, h]) is not empty, so does that."""
    n, h = x.shape
    for i in range(n):
        total = _F(0.0)
        for j in range(h):
            x[i, j] += z[i, j]
            total += x[i, j]
        mean = total / _F(h)
        total = _F(0.0)
        for j in range(h):
            value = x[i, j] - mean
            total += value * value
        scale = _F(1.0) / np.sqrt(total / _F(h) + epsilon)
        for j in range(h):
            x[i, j] = (x[i, j] - mean) * scale * gain[j] + offset[j]
        if len(rounded):
            bits = x[i].view(np.uint32)
            for j in range(h):
                rounded[i, j] = np.uint16(_U(bits[j] + _U(0x7FFF) + (_U(bits[j] >> _U(16)) & _U(1))) >> _U(16))
