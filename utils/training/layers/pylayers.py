"""The layers of ``cpu`` as Paddle's: forward and backward passes over tensors' own memory.

Imports Paddle and numba: import it where it is needed.
"""

from collections.abc import Sequence

import numpy as np
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.utils import dlpack

from ...kernels import training_loops
from . import attention
from .blocks import Drop, in_bfloat16, in_blocks, product, product_over_rows


class Linear(PyLayer):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.needed, ctx.n = _needed(x, weight), len(x)
        ctx.left, ctx.right = in_bfloat16(_array(x)), in_bfloat16(_array(weight))[: len(weight)]
        return _tensor(product(ctx.left, ctx.right)[: ctx.n])

    @staticmethod
    def backward(ctx, gradient):
        own, (wants_x, wants_weight) = in_bfloat16(_array(gradient)), ctx.needed
        d_x = product(own, ctx.right.T)[: ctx.n] if wants_x else None
        d_weight = product_over_rows(ctx.left, own) if wants_weight else None
        return _gradients((d_x, d_weight), ctx.needed)


class Dropout(PyLayer):
    @staticmethod
    def forward(ctx, x, drop):
        ctx.drop = drop
        return _dropped(x, drop)

    @staticmethod
    def backward(ctx, gradient):
        return _dropped(gradient, ctx.drop)


class Gelu(PyLayer):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.needed = _needed(x, bias)
        own, added = _array(x), _bias_of(bias, x.shape[1])
        result, ctx.slope = np.empty_like(own), np.empty_like(own)
        in_blocks(
            len(own), lambda rows: training_loops.gelu(own[rows], added, result[rows], ctx.slope[rows])
        )  # fmt: skip
        return _tensor(result)

    @staticmethod
    def backward(ctx, gradient):
        own = _array(gradient)
        # The slope is needed no more: multiplied where it lies, it takes no memory beside it.
        d_x, ctx.slope = ctx.slope, None
        d_bias = np.zeros(own.shape[1], np.float32)

        def work(rows: slice, sums: np.ndarray) -> None:
            training_loops.scale(d_x[rows], own[rows], sums)

        in_blocks(len(own), work, d_bias)
        return _gradients((d_x, d_bias), ctx.needed)


class AddNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, z, bias, gain, offset, epsilon, drop):
        ctx.needed, ctx.dropping = _needed(x, z, bias, gain, offset), drop.settled()
        left, right, added, ctx.gain, shift = (
            _array(x),
            _array(z),
            _bias_of(bias, x.shape[1]),
            *map(_array, (gain, offset)),
        )
        result, ctx.normalised = np.empty_like(left), np.empty_like(left)
        ctx.scales = np.empty(len(left), np.float32)

        def work(rows: slice) -> None:
            training_loops.add_norm(
                left[rows], right[rows], added, ctx.gain, shift, np.float32(epsilon), rows.start, ctx.dropping,
                result[rows], ctx.normalised[rows], ctx.scales[rows],
            )  # fmt: skip

        in_blocks(len(left), work)
        return _tensor(result)

    @staticmethod
    def backward(ctx, gradient):
        own = _array(gradient)
        d_x, d_z, sums = np.empty_like(own), np.empty_like(own), np.zeros((3, own.shape[1]), np.float32)

        def work(rows: slice, sums: np.ndarray) -> None:
            training_loops.add_norm_backward(
                own[rows], ctx.normalised[rows], ctx.scales[rows], ctx.gain, rows.start, ctx.dropping,
                d_x[rows], d_z[rows], sums,
            )  # fmt: skip

        in_blocks(len(own), work, sums)
        d_gain, d_offset, d_bias = sums
        return _gradients((d_x, d_z, d_bias, d_gain, d_offset), ctx.needed)


class Attention(PyLayer):
    @staticmethod
    def forward(ctx, qkv, bias, lengths, heads, drop, bfloat16):
        ctx.needed = _needed(qkv, bias)
        rounds = bfloat16 and attention.can_round(qkv.shape[1] // (3 * heads), drop)
        kind = attention.RoundedAttention if rounds else attention.Attention
        ctx.call = kind(_array(qkv), _bias_of(bias, qkv.shape[1]), lengths, heads, drop)
        return _tensor(ctx.call.forward())

    @staticmethod
    def backward(ctx, gradient):
        d_qkv = ctx.call.backward(_array(gradient))
        d_bias = np.zeros(d_qkv.shape[1], np.float32)
        in_blocks(len(d_qkv), lambda rows, sums: training_loops.add_columns(d_qkv[rows], sums), d_bias)
        return _gradients((d_qkv, d_bias), ctx.needed)


def _bias_of(tensor: Tensor | None, n_columns: int) -> np.ndarray:
    return np.zeros(n_columns, np.float32) if tensor is None else _array(tensor)


def _dropped(x: Tensor, drop: Drop) -> Tensor:
    own, dropping = _array(x), drop.settled()
    result = np.empty_like(own)
    in_blocks(len(own), lambda rows: training_loops.dropout(own[rows], rows.start, dropping, result[rows]))
    return _tensor(result)


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory."""
    return np.from_dlpack(tensor.detach())


def _tensor(array: np.ndarray) -> Tensor:
    """The array's own memory as a tensor."""
    return dlpack.from_dlpack(array)


def _gradients(arrays: Sequence[np.ndarray], needed: Sequence[bool | None]) -> tuple:
    """What a backward pass returns: of each tensor that was given its gradient, or None where none is needed."""
    pairs = zip(arrays, needed, strict=True)
    return tuple(_tensor(array) if is_needed else None for array, is_needed in pairs if is_needed is not None)


def _needed(*tensors: Tensor | None) -> list[bool | None]:
    """Whether a tensor wants a gradient; None where none was given."""
    return [None if tensor is None else not tensor.stop_gradient for tensor in tensors]
