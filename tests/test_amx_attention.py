"""Attention by AMX against attention spelt out in float64."""

import numpy as np
import pytest

from utils import amx, amx_attention, matmul

pytestmark = pytest.mark.skipif(not amx.is_usable(), reason="the processor has no AMX")

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
@pytest.mark.parametrize("lengths", [[1], [16, 15], [31, 32, 33], [64, 1, 40], [200, 130], [8, 3, 520]])
def test_equals_attention_spelt_out(width, lengths):
    heads, t = 2, -(-max(lengths) // 8) * 8
    rng = np.random.default_rng(sum(lengths) + width)
    values = rng.standard_normal((len(lengths), t, 3 * heads * width)).astype(np.float32)
    values[..., : heads * width] *= rng.uniform(0.01, 2)  # from nearly equal weights to a few that count
    qkv = matmul.to_bfloat16(values)
    for text, length in zip(qkv, lengths, strict=True):
        text[length:] = NAN  # what is padding must not be looked at
    context = np.full((len(lengths), t, heads * width), UNTOUCHED, np.uint16)
    amx_attention.attention(qkv, np.array(lengths), heads, context)
    for text, own, length in zip(qkv, context, lengths, strict=True):
        sums, bounds = expected(text[:length], heads)
        assert (np.abs(as_float(own[:length]) - sums) <= bounds).all()
        assert (own[length:] == UNTOUCHED).all()


def test_a_text_that_is_not_a_number_stays_so():
    qkv = matmul.to_bfloat16(np.random.default_rng(0).standard_normal((2, 8, 96)).astype(np.float32))
    qkv[0, 3] = NAN
    context = np.zeros((2, 8, 32), np.uint16)
    amx_attention.attention(qkv, np.array([8, 8]), 1, context)
    assert np.isnan(as_float(context[0])).all()
    assert np.isfinite(as_float(context[1])).all()
