"""A linear layer and dropout that suit a CPU.

Paddle sums a bias's gradient over rows so slowly on a CPU that it takes longer than a matrix product (32 ms
against 24 for 2048 x 384 x 1536 on one core); as a product with ones it takes 1 ms. And it draws a dropout
mask one number at a time; drawing it with NumPy and bringing it over takes half as long.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from paddle import Tensor


def linear(x: "Tensor", weight: "Tensor", bias: "Tensor") -> "Tensor":
    """x [..., in] times weight [in, out], plus bias [out]."""
    flat = x.reshape([-1, x.shape[-1]])
    return _linear_layer().apply(flat, weight, bias).reshape([*x.shape[:-1], weight.shape[-1]])


def dropout(x: "Tensor", share: float, generator: np.random.Generator) -> "Tensor":
    """x with a ``share`` of its values set to 0 and the others raised accordingly.

    The share is rounded to a multiple of 1/65536.
    """
    import paddle

    lowest_kept = round(share * 65536)
    bits = generator.integers(0, 65536, x.shape, np.uint16)
    raised = np.float32(65536 / (65536 - lowest_kept))
    return x * paddle.to_tensor(np.multiply(bits >= lowest_kept, raised, dtype=np.float32))


@functools.cache
def _linear_layer():
    import paddle
    from paddle.autograd import PyLayer

    class Linear(PyLayer):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight, bias)
            return paddle.matmul(x, weight).add_(bias)

        @staticmethod
        def backward(ctx, gradient):
            x, weight, bias = ctx.saved_tensor()
            ones = paddle.ones([1, len(gradient)], gradient.dtype)
            return (
                None if x.stop_gradient else paddle.matmul(gradient, weight, transpose_y=True),
                None if weight.stop_gradient else paddle.matmul(x, gradient, transpose_x=True),
                None if bias.stop_gradient else paddle.matmul(ones, gradient).squeeze(0),
            )

    return Linear
