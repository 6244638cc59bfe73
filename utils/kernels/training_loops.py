"""Compiled loops of a transformer that is trained on a CPU: what NumPy and Paddle do in many passes, in one.

Each works on the rows that it is given, on one core and without Python's lock, so that blocks of rows run
in threads beside each other. All arrays are float32 and C-contiguous unless said otherwise.

Dropout draws nothing: whether a value stays is a hash of its place and of a key, so that the backward
pass, a replayed forward pass and a resumed training find the same decisions and nothing need be kept.
"""

from typing import NamedTuple

import numpy as np

from .compiled import MATHS, compiled, inlined
from .maths import exp, ordered

_F, _U = np.float32, np.uint32
_inlined = inlined(MATHS)
_compiled = compiled(MATHS)


class Dropping(NamedTuple):
    """Which values dropout keeps, and how.

    key: uint32, what besides the place decides. threshold: uint32, 2**32 times the share that is dropped; 0 is none.
    upscale: float32, by which the others are multiplied.
    """

    key: np.uint32
    threshold: np.uint32
    upscale: np.float32


@_inlined
def _dropped(value, place, dropping):
    """The value at a place after dropout; whether it stays is a hash (MurmurHash3's finaliser)."""
    mixed = _U(_U(place) * _U(0x9E3779B1))
    # The key comes after a round of mixing: added to the place, it would only move along one and the same sequence.
    mixed = _U(_U(_U(mixed ^ _U(mixed >> _U(16))) * _U(0x85EBCA6B)) ^ dropping.key)
    mixed = _U(_U(mixed ^ _U(mixed >> _U(13))) * _U(0xC2B2AE35))
    return value * dropping.upscale if _U(mixed ^ _U(mixed >> _U(16))) >= dropping.threshold else _F(0.0)


@_compiled
def dropout(x, first, dropping, result):
    """x [n, h] after dropout; ``first`` is the number of its first row."""
    n, h = x.shape
    for i in range(n):
        for j in range(h):
            result[i, j] = _dropped(x[i, j], (first + i) * h + j, dropping)


@_compiled
def gelu(x, bias, result, slope):
    """The GELU of x [n, h] plus bias [h], and its derivative there.

    The error function is Abramowitz and Stegun's 7.1.26, good to 1.5e-7.
    """
    n, h = x.shape
    for i in range(n):
        for j in range(h):
            value = x[i, j] + bias[j]
            bell = exp(value * value * _F(-0.5))
            t = _F(1.0) / (_F(1.0) + _F(0.23164189) * abs(value))
            tail = _F(1.061405429) * t - _F(1.453152027)
            tail = tail * t + _F(1.421413741)
            tail = tail * t - _F(0.284496736)
            tail = tail * t + _F(0.254829592)
            tail = tail * t * bell * _F(0.5)
            below = _F(1.0) - tail if value >= _F(0.0) else tail
            result[i, j] = value * below
            slope[i, j] = below + value * bell * _F(0.39894228)


@_compiled
def scale(slope, gradient, sums):
    """``slope`` [n, h] is multiplied by the gradient, and its column sums are added to ``sums`` [h]."""
    n, h = gradient.shape
    for i in range(n):
        for j in range(h):
            slope[i, j] *= gradient[i, j]
            sums[j] += slope[i, j]


@_compiled
def add_columns(x, sums):
    """The column sums of x [n, h], added to ``sums`` [h]."""
    n, h = x.shape
    for i in range(n):
        for j in range(h):
            sums[j] += x[i, j]


@_compiled
def add_norm(x, z, bias, gain, offset, epsilon, first, dropping, y, normalised, scales):
    """y = layer norm of x + dropout(z + bias), all [n, h]; keeps the normed rows and what scaled them [n]."""
    n, h = x.shape
    for i in range(n):
        total = _F(0.0)
        for j in range(h):
            value = z[i, j] + bias[j]
            if dropping.threshold > _U(0):
                value = _dropped(value, (first + i) * h + j, dropping)
            value += x[i, j]
            normalised[i, j] = value
            total += value
        mean = total / _F(h)
        total = _F(0.0)
        for j in range(h):
            value = normalised[i, j] - mean
            total += value * value
        scale = _F(1.0) / np.sqrt(total / _F(h) + epsilon)
        scales[i] = scale
        for j in range(h):
            value = (normalised[i, j] - mean) * scale
            normalised[i, j] = value
            y[i, j] = value * gain[j] + offset[j]


@_compiled
def add_norm_backward(gradient, normalised, scales, gain, first, dropping, d_x, d_z, sums):
    """The gradients of ``add_norm``: of x, of z, and added to ``sums`` [3, h] of gain, offset and bias."""
    n, h = gradient.shape
    for i in range(n):
        total, along = _F(0.0), _F(0.0)
        for j in range(h):
            own = gradient[i, j] * gain[j]
            total += own
            along += own * normalised[i, j]
        total /= _F(h)
        along /= _F(h)
        scale = scales[i]
        for j in range(h):
            own = gradient[i, j]
            value = (own * gain[j] - total - normalised[i, j] * along) * scale
            d_x[i, j] = value
            if dropping.threshold > _U(0):
                value = _dropped(value, (first + i) * h + j, dropping)
            d_z[i, j] = value
            sums[0, j] += own * normalised[i, j]
            sums[1, j] += own
            sums[2, j] += value


@_compiled
def _softmax(scores, first, dropping, dropped):
    """Rows of scores [n, t] become their softmax; ``dropped``, if dropout is on, the same after it."""
    n, t = scores.shape
    for i in range(n):
        highest = np.int32(-(2**31))
        for j in range(t):
            highest = max(highest, ordered(_F(scores[i, j]).view(np.int32)))
        largest = np.int32(ordered(highest)).view(np.float32)
        total = _F(0.0)
        for j in range(t):
            value = exp(scores[i, j] - largest)
            scores[i, j] = value
            total += value
        total = _F(1.0) / total
        for j in range(t):
            scores[i, j] *= total
        if dropping.threshold > _U(0):
            for j in range(t):
                dropped[i, j] = _dropped(scores[i, j], (first + i) * t + j, dropping)


@_compiled
def _softmax_backward(weights, first, dropping, gradient):
    """``gradient`` [n, t] of the weights after dropout becomes that of the scores."""
    n, t = weights.shape
    for i in range(n):
        total = _F(0.0)
        for j in range(t):
            value = gradient[i, j]
            if dropping.threshold > _U(0):
                value = _dropped(value, (first + i) * t + j, dropping)
                gradient[i, j] = value
            total += value * weights[i, j]
        for j in range(t):
            gradient[i, j] = (gradient[i, j] - total) * weights[i, j]


@_inlined
def _take(rows, bias, scale, first, parts):
    """Some heads' columns of rows [t, any], the first of them ``first``, plus bias, times scale: [heads, t, width].

    Row by row: a head's own part of a row is too little for the processor to see what comes next.
    """
    for i in range(parts.shape[1]):
        for head in range(parts.shape[0]):
            column = first + head * parts.shape[2]
            for j in range(parts.shape[2]):
                parts[head, i, j] = (rows[i, column + j] + bias[column + j]) * scale


@_inlined
def _put(parts, scale, first, rows):
    """The reverse of ``_take``, without a bias."""
    for i in range(parts.shape[1]):
        for head in range(parts.shape[0]):
            column = first + head * parts.shape[2]
            for j in range(parts.shape[2]):
                rows[i, column + j] = parts[head, i, j] * scale


@_inlined
def _take_qkv(qkv, bias, scale, first, parts):
    """Queries, times scale, keys and values of some heads into the first three of ``parts``."""
    columns = qkv.shape[1] // 3
    _take(qkv, bias, scale, first, parts[0])
    _take(qkv, bias, _F(1.0), columns + first, parts[1])
    _take(qkv, bias, _F(1.0), 2 * columns + first, parts[2])


@_inlined
def _empty(t):
    return np.empty((t, t), np.float32)


@_compiled
def attention(qkv, bias, width, heads, dropping, result):
    """Attention within one text, for the heads from ``heads[0]`` to before ``heads[1]``.

    Args:
        qkv: [t, 3 * all heads * width], queries, keys and values beside each other.
        bias: [3 * all heads * width], added to every row.
        result: [t, all heads * width].
        dropping: of the weights.
    """
    t, n, first = len(qkv), heads[1] - heads[0], heads[0] * width
    parts, weights = np.empty((4, n, t, width), np.float32), _empty(t)
    dropped = _empty(t) if dropping.threshold > _U(0) else weights
    _take_qkv(qkv, bias, _F(1.0) / np.sqrt(_F(width)), first, parts)
    for i in range(n):
        np.dot(parts[0, i], parts[1, i].T, weights)
        _softmax(weights, (heads[0] + i) * t, dropping, dropped)
        np.dot(dropped, parts[2, i], parts[3, i])
    _put(parts[3], _F(1.0), first, result)


@_compiled
def attention_backward(qkv, bias, width, heads, dropping, gradient, d_qkv):
    """The gradient of ``attention``'s first argument, given that of its result."""
    (t, columns), n, first = gradient.shape, heads[1] - heads[0], heads[0] * width
    scale, one = _F(1.0) / np.sqrt(_F(width)), _F(1.0)
    parts, weights, d_weights = np.empty((7, n, t, width), np.float32), _empty(t), _empty(t)
    dropped = _empty(t) if dropping.threshold > _U(0) else weights
    _take_qkv(qkv, bias, scale, first, parts)
    _take(gradient, np.zeros(columns, np.float32), one, first, parts[3])
    for i in range(n):
        query, key, value, d_result = parts[0, i], parts[1, i], parts[2, i], parts[3, i]
        np.dot(query, key.T, weights)
        _softmax(weights, (heads[0] + i) * t, dropping, dropped)
        np.dot(d_result, value.T, d_weights)
        np.dot(dropped.T, d_result, parts[6, i])
        _softmax_backward(weights, (heads[0] + i) * t, dropping, d_weights)
        np.dot(d_weights, key, parts[4, i])
        np.dot(d_weights.T, query, parts[5, i])
    _put(parts[4], scale, first, d_qkv)
    _put(parts[5], one, columns + first, d_qkv)
    _put(parts[6], one, 2 * columns + first, d_qkv)
