"""Attention by AMX against attention spelt out in float64."""

import numpy as np
import pytest

from utils.kernels import onednn
from utils.kernels.amx import attention, attention_gradients, tiles

pytestmark = pytest.mark.skipif(not tiles.is_usable(), reason="the processor has no AMX")

NAN = 0x7FC0
UNTOUCHED = 12345


def as_float(rounded: np.ndarray) -> np.ndarray:
    return (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def expected(qkv: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The attention of one text without padding, [t, width], and how far two roundings to bfloat16 may take it."""
    t = len(qkv)
    query, key, value = as_float(qkv).reshape(t, 3, heads, -1).transpose(1, 2, 0, 3)
    scores = query @ key.swapaxes(1, 2)
    weights = 2 ** (scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    sums, sizes = ((weights @ v).swapaxes(0, 1).reshape(t, -1) for v in (value, np.abs(value)))
    return sums, sizes * 2.0**-7 * 1.05  # and that is 5 % for the powers


@pytest.mark.parametrize("width", [32, 64, 96])
@pytest.mark.parametrize(
    "lengths", [[1], [16, 15], [31, 32, 33], [64, 1, 40], [200, 130], [8, 3, 520], [0, 40, 0, 0, 33]]
)
def test_equals_attention_spelt_out(width, lengths):
    heads, t = 2, -(-max(lengths) // 8) * 8
    rng = np.random.default_rng(sum(lengths) + width)
    values = rng.standard_normal((len(lengths), t, 3 * heads * width)).astype(np.float32)
    values[..., : heads * width] *= rng.uniform(0.01, 2)  # from nearly equal weights to a few that count
    qkv = onednn.to_bfloat16(values)
    for text, length in zip(qkv, lengths, strict=True):
        text[length:] = NAN  # what is padding must not be looked at
    context = np.full((len(lengths), t, heads * width), UNTOUCHED, np.uint16)
    attention.attention(qkv, np.array(lengths), heads, context)
    for text, own, length in zip(qkv, context, lengths, strict=True):
        if length:
            sums, bounds = expected(text[:length], heads)
            assert (np.abs(as_float(own[:length]) - sums) <= bounds).all()
        assert (own[length:] == UNTOUCHED).all()


@pytest.mark.parametrize("shift", [-400, -150, -90, 90, 150, 400])
def test_scores_far_from_zero_make_the_same_weights(shift):
    """Their powers of 2 are beyond float32, or would add up to next to nothing; rows that are neither stay between."""
    heads, t = 2, 75
    rng = np.random.default_rng(0)
    values = rng.standard_normal((t, 3, heads, 32)).astype(np.float32)
    values[:, 0, :, 0], values[:, 1, :, 0] = np.where(np.arange(t) % 5, shift, 0)[:, None] / 16, 16
    qkv = onednn.to_bfloat16(values.reshape(1, t, -1))
    context = np.zeros((1, t, heads * 32), np.uint16)
    attention.attention(qkv, np.array([t]), heads, context)
    sums, bounds = expected(qkv[0], heads)
    assert (np.abs(as_float(context[0]) - sums) <= bounds).all()


def test_a_text_that_is_not_a_number_stays_so():
    qkv = onednn.to_bfloat16(np.random.default_rng(0).standard_normal((2, 8, 96)).astype(np.float32))
    qkv[0, 3] = NAN
    context = np.zeros((2, 8, 32), np.uint16)
    attention.attention(qkv, np.array([8, 8]), 1, context)
    assert np.isnan(as_float(context[0])).all()
    assert np.isfinite(as_float(context[1])).all()


def expected_gradients(qkv: np.ndarray, outer: np.ndarray, heads: int) -> list[np.ndarray]:
    """Of one text: queries before they were scaled, keys and values, float64 [t, heads * width] each."""
    t, width = outer.shape
    query, key, value = as_float(qkv).reshape(t, 3, heads, -1).transpose(1, 2, 0, 3)
    outer = as_float(outer).reshape(t, heads, -1).transpose(1, 0, 2)
    scores = query @ key.swapaxes(1, 2)
    weights = 2 ** (scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = outer @ value.swapaxes(1, 2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    by_head = (
        d_scores @ key * (width // heads) ** -0.5,
        d_scores.swapaxes(1, 2) @ query * np.log(2),
        weights.swapaxes(1, 2) @ outer,
    )
    return [part.swapaxes(0, 1).reshape(t, width) for part in by_head]


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("t", [1, 5, 32, 33, 100, 260])
def test_gradients_equal_those_spelt_out(width, t):
    heads, rng = 2, np.random.default_rng(t + width)
    values = rng.standard_normal((t, 3 * heads * width)).astype(np.float32)
    values[:, : heads * width] *= (width**-0.5) / np.log(2)
    qkv = onednn.to_bfloat16(values)
    outer = onednn.to_bfloat16(rng.standard_normal((t, heads * width)).astype(np.float32))
    result = np.full(qkv.shape, np.nan, np.float32)
    attention_gradients.attention_backward(qkv, outer, heads, result)
    for found, gradient in zip(np.split(result, 3, axis=1), expected_gradients(qkv, outer, heads), strict=True):
        # Two roundings to bfloat16, of 2**-9 of a value each at most, and what the powers add.
        scale = np.sqrt((gradient**2).mean()) if t > 1 else 1.0
        assert np.sqrt(((found - gradient) ** 2).mean()) <= 0.004 * scale
        assert np.abs(found - gradient).max() <= 0.05 * scale


def test_gradients_of_what_is_no_number_are_none():
    qkv = onednn.to_bfloat16(np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32))
    outer = onednn.to_bfloat16(np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32))
    outer[3, 2] = NAN
    result = np.zeros((8, 96), np.float32)
    attention_gradients.attention_backward(qkv, outer, 1, result)
    assert all(np.isnan(part).any() for part in np.split(result, 3, axis=1))
