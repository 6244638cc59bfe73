"""Loops in vector instructions against NumPy."""

import numba
import numpy as np
import pytest

from utils.kernels.amx import tiles, vectors

pytestmark = pytest.mark.skipif(not tiles.is_usable(), reason="the processor has no AMX, and may lack AVX-512")

SIZES = [32, 64, 96, 512]


def row(n: int, seed: int = 0) -> np.ndarray:
    """Float32 that do not begin with a line of the cache."""
    values = np.random.default_rng(seed).standard_normal(n + 1).astype(np.float32) * 20
    return values[1:]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def as_float(rounded: np.ndarray) -> np.ndarray:
    return (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@numba.njit
def _largest(at, n):
    return vectors.largest(at, n)


@numba.njit
def _powers_of_2(at, n, less, to):
    return vectors.powers_of_2(at, n, less, to)


@numba.njit
def _scaled(at, n, factor, to):
    vectors.scaled(at, n, factor, to)


@numba.njit
def _paired(at, other, n, to, step):
    vectors.paired(at, other, n, to, step)


@pytest.mark.parametrize("n", SIZES)
def test_largest(n):
    for place in (0, n // 2, n - 1):
        values = row(n)
        values[place] = 1000
        assert _largest(address(values), n) == 1000
        values[place] = np.nan
        assert _largest(address(values), n) == np.nanmax(values)
    assert _largest(address(-abs(values)), n) == np.nanmax(-abs(values))


@pytest.mark.parametrize("n", SIZES)
def test_powers_of_2(n):
    values, rounded = row(n, 1), np.zeros(n + 1, np.uint16)
    values[:3] = -200, 40, np.float32(-3e38)
    less = np.float32(40.0)
    total = _powers_of_2(address(values), n, less, address(rounded))
    expected = 2.0 ** np.maximum(values.astype(np.float64) - 40, -100)
    np.testing.assert_allclose(as_float(rounded[:n]), expected, rtol=2.0**-8 + 1e-4)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)
    assert rounded[n] == 0
    values[5] = np.nan
    assert np.isnan(_powers_of_2(address(values), n, less, address(rounded)))
    assert np.flatnonzero(np.isnan(as_float(rounded))).tolist() == [5]


@pytest.mark.parametrize("n", SIZES)
def test_scaled(n):
    values, rounded = row(n, 2), np.zeros(n + 1, np.uint16)
    _scaled(address(values), n, np.float32(0.37), address(rounded))
    np.testing.assert_allclose(as_float(rounded[:n]), values * 0.37, rtol=2.0**-8 + 1e-6)
    assert rounded[n] == 0


@pytest.mark.parametrize("n", SIZES)
def test_paired(n):
    rows = np.random.default_rng(3).integers(0, 1 << 16, (2, n)).astype(np.uint16)
    pairs = np.zeros((n // 16, 3, 16), np.uint32)
    _paired(address(rows[0]), address(rows[1]), n, address(pairs[0, 1]), pairs.strides[0])
    np.testing.assert_array_equal(pairs[:, 1].reshape(-1), rows[0].astype(np.uint32) | rows[1].astype(np.uint32) << 16)
    assert not pairs[:, ::2].any()
