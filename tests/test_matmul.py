"""oneDNN's product against NumPy's in float64, and the rounding to bfloat16 against its definition."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from utils.kernels import onednn

needs_bfloat16 = pytest.mark.skipif(not onednn.bfloat16_is_fast(), reason="no bfloat16 products here")


def as_float(rounded: np.ndarray) -> np.ndarray:
    return (rounded.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.skipif(not onednn.is_usable(), reason="oneDNN's C interface is not there")
@pytest.mark.parametrize("dtype", ["float32"] + ["bfloat16"] * onednn.bfloat16_is_fast())
def test_products_of_all_shapes(dtype):
    """Shapes that could be taken for one another: equal sides, sides of one, batches a multiple of a side."""
    rng = np.random.default_rng(3)

    def random(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        """An array to multiply, and its values."""
        values = rng.standard_normal(shape).astype(np.float32)
        if dtype == "float32":
            return values, values
        return onednn.to_bfloat16(values), as_float(onednn.to_bfloat16(values))

    for _ in range(150):
        b, m, n, k = (int(rng.choice([1, 2, 3, 8, 16, 17, 24, 48, 64])) for _ in range(4))
        left, left_values = random(b, m, k)
        for shape, axes in (((b, n, k), (0, 2, 1)), ((b, k, n), (0, 1, 2))):
            right, right_values = random(*shape)
            result = np.full((b, m, n), np.nan, np.float32)
            onednn.matmul(left, right.transpose(axes), result)
            np.testing.assert_allclose(result, left_values @ right_values.transpose(axes), rtol=0, atol=1e-4)
        single, bias = np.full((m, n), np.nan, np.float32), rng.standard_normal(n).astype(np.float32)
        onednn.matmul(left[0], onednn.Packed(right[0]), single, bias, "relu")
        np.testing.assert_allclose(single, np.maximum(left_values[0] @ right_values[0] + bias, 0), rtol=0, atol=1e-4)


def test_gaps_between_rows_are_refused():
    with pytest.raises(AssertionError, match="gaps"):
        onednn.matmul(np.zeros((4, 8), np.float32)[:, :3], np.zeros((3, 2), np.float32), np.zeros((4, 2), np.float32))


def test_rounding_takes_the_nearest_bfloat16_and_of_two_the_even_one():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((200, 33)) * 10.0 ** rng.integers(-30, 30, (200, 33))).astype(np.float32)
    near = as_float(onednn.to_bfloat16(values))
    step = 2.0 ** (np.floor(np.log2(np.abs(values.astype(np.float64)))) - 7)
    assert (np.abs(near.astype(np.float64) - values) <= step / 2).all()
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0.0, -0.0]], np.float32)
    assert as_float(onednn.to_bfloat16(ties)).tolist() == [[1.0, 1 + 2**-6, -1.0, 0.0, 0.0]]


def test_what_is_too_small_for_a_normal_number_becomes_zero():
    tiny = np.array([[1e-39, -1e-40, 2.0**-126]], np.float32)
    assert as_float(onednn.to_bfloat16(tiny)).tolist() == [[0.0, 0.0, 2.0**-126]]


def test_infinity_and_nan_stay_what_they_are():
    bits = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)
    near = as_float(onednn.to_bfloat16(bits.view(np.float32)))
    assert near[:2].tolist() == [np.inf, -np.inf] and np.isnan(near[2:]).all()


@needs_bfloat16
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (130, 70, 384), (64, 1, 33)])
def test_products_in_any_number_of_threads(m, n, k):
    rng = np.random.default_rng(m)
    left, right = (onednn.to_bfloat16(rng.standard_normal(shape).astype(np.float32)) for shape in ((m, k), (n, k)))
    bias = rng.standard_normal(n).astype(np.float32)
    expected = as_float(left).astype(np.float64) @ as_float(right).T.astype(np.float64) + bias

    def product(_: int) -> np.ndarray:
        result = np.empty((m, n), np.float32)
        onednn.matmul(left, right.T, result, bias)
        return result

    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(product, range(9)):
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * k)
