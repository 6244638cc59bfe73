"""Products by AMX against products in float64."""

import math

import numpy as np
import pytest

from utils.kernels import onednn
from utils.kernels.amx import matmul as amx_matmul
from utils.kernels.amx import tiles

pytestmark = pytest.mark.skipif(not tiles.is_usable(), reason="the processor has no AMX")


def as_float(rounded: np.ndarray) -> np.ndarray:
    return (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def random(seed: int, *shape: int) -> np.ndarray:
    return onednn.to_bfloat16(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("kept", [1, 70_000, 1 << 20])
@pytest.mark.parametrize(("m", "k", "n"), [(32, 32, 32), (96, 64, 160), (64, 384, 96), (32, 1600, 64)])
def test_equals_a_product_spelt_out(m, k, n, kept, monkeypatch):
    monkeypatch.setattr(amx_matmul, "_KEPT_BYTES", kept)
    left, right = random(1, m, k), random(2, k, n)
    bias = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    packed = amx_matmul.Packed(right)
    exact = as_float(left) @ as_float(right) + bias
    summed = (np.abs(as_float(left)) @ np.abs(as_float(right)) + abs(bias)) * (k + 1) * 2.0**-24
    plain = np.full((m, n), np.nan, np.float32)
    packed.multiply(left, plain, bias)
    assert (np.abs(plain - exact) <= summed).all()
    rounded = np.zeros((m, n), np.uint16)
    packed.multiply(left, rounded, bias)
    assert (np.abs(as_float(rounded) - exact) <= summed + np.abs(exact) * 2.0**-8).all()
    packed.multiply(left, rounded, bias, "gelu")
    assert (np.abs(as_float(rounded) - gelu(exact)) <= 2 * summed + 7e-5 + np.abs(gelu(exact)) * 2.0**-8).all()


def test_gelu_far_from_0_and_of_what_is_no_number():
    bias = np.linspace(-40, 40, 32).astype(np.float32)
    bias[5] = np.nan
    result = np.zeros((32, 32), np.uint16)
    amx_matmul.Packed(np.zeros((32, 32), np.uint16)).multiply(random(1, 32, 32), result, bias, "gelu")
    expected = np.tile(gelu(bias.astype(np.float64)), (32, 1))
    np.testing.assert_allclose(as_float(result), expected, atol=7e-5, rtol=2.0**-8)


def test_no_rows_write_nothing():
    beside = np.full((64, 32), 7, np.float32)
    amx_matmul.Packed(random(1, 32, 32)).multiply(random(1, 0, 32), beside[:0], np.zeros(32, np.float32))
    assert (beside == 7).all()


def test_what_is_not_supported():
    assert amx_matmul.supports((64, 96), "gelu")
    assert not amx_matmul.supports((48, 96))
    assert not amx_matmul.supports((64, 40))
    assert not amx_matmul.supports((64, 96), "relu")


@pytest.mark.parametrize("kept", [1, 1 << 20])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 32, 5), (32, 32, 32), (100, 64, 70), (75, 1600, 33)])
def test_finds_what_reaches_its_cut(m, k, n, kept, monkeypatch):
    monkeypatch.setattr(amx_matmul, "_KEPT_BYTES", kept)
    left, right = random(1, m, k), random(2, n, k)
    more = np.random.default_rng(3).standard_normal(m).astype(np.float32)
    sums = as_float(left) @ as_float(right).T + more[:, None]
    packed = amx_matmul.Packed.of_rows(right)
    cuts = np.full(16 * len(packed.tiles), np.inf, np.float32)
    cuts[:n] = np.random.default_rng(4).standard_normal(n) * k**0.5
    cuts[0] = -np.inf  # everything reaches it
    scratch = amx_matmul.Scratch.of(m, packed)
    for first in (0, 1000):
        found = packed.reaching(left, more, cuts, first, scratch)
        expected = np.nonzero(cuts[:n, None] <= sums.T)
        assert sorted(zip(found.columns, found.rows - first, strict=True)) == list(zip(*expected, strict=True))
        np.testing.assert_allclose(found.sums, sums[found.rows - first, found.columns], atol=1e-3)


def test_what_is_no_number_reaches_nothing():
    left, right = random(1, 32, 32), random(2, 32, 32)
    left[3] = 0x7FC0
    packed = amx_matmul.Packed.of_rows(right)
    scratch = amx_matmul.Scratch.of(32, packed)
    found = packed.reaching(left, np.zeros(32, np.float32), np.full(32, -1e9, np.float32), 0, scratch)
    assert set(found.rows.tolist()) == set(range(32)) - {3}
