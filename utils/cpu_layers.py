"""The parts of an encoder layer that suit a CPU, over packed texts: no padding anywhere.

A batch's texts stand one after another in one array of tokens. Products and norms do not care where a
text ends; ``cpu_attention`` does.

Matrix products are Paddle's, which run at the machine's peak; by bfloat16, ``linear`` makes them. All that lies
between two products is one pass over memory on all cores (``cpu_kernels``); Paddle's own operators take several, on
one core.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.cpu_attention import Attention, RoundedAttention, can_round
from utils.cpu_blocks import Drop, Parts, in_blocks, product, product_over_rows

if TYPE_CHECKING:
    from paddle import Tensor


def linear(x: "Tensor", weight: "Tensor", n_parts: int) -> "Tensor":
    """x [n, in] times weight [in, out], both as sums of 1 or 2 bfloat16, as are the gradients that come back."""
    return _layers().Linear.apply(x, weight, n_parts)


def dropout(x: "Tensor", drop: Drop) -> "Tensor":
    """x [n, h] with a share of its values set to 0 and the others raised accordingly."""
    return _layers().Dropout.apply(x, drop) if drop.share else x


def gelu(x: "Tensor", bias: "Tensor | None" = None) -> "Tensor":
    """z = x [n, h] plus bias [h], times the normal distribution function of z (Hendrycks and Gimpel, 2016)."""
    return _layers().Gelu.apply(x, bias)


def add_norm(
    x: "Tensor", z: "Tensor", bias: "Tensor | None", gain: "Tensor", offset: "Tensor", epsilon: float, drop: Drop
) -> "Tensor":
    """The layer norm of x + dropout(z + bias), for x and z [n, h] and the others [h]: each row brought to mean 0
    and variance 1, times gain, plus offset (Ba et al., 2016).
    """
    return _layers().AddNorm.apply(x, z, bias, gain, offset, epsilon, drop)


def attention(
    qkv: "Tensor",
    bias: "Tensor | None",
    lengths: Sequence[int],
    heads: int,
    drop: Drop | None = None,
    bfloat16: bool = False,
) -> "Tensor":
    """Softmax attention of each text within itself (Vaswani et al., 2017).

    Args:
        qkv: queries, keys and values beside each other, float32 [tokens, 3 * heads * width], the texts one after
            another.
        bias: [3 * heads * width], still to be added to each token's, or None.
        lengths: tokens of each text.
        drop: of the attention weights.
        bfloat16: round what is multiplied, where the processor has AMX and nothing is dropped.

    Returns:
        float32 [tokens, heads * width].
    """
    return _layers().Attention.apply(qkv, bias, list(lengths), heads, drop or Drop(), bfloat16)


def _array(tensor: "Tensor") -> np.ndarray:
    """The tensor's own memory."""
    return np.from_dlpack(tensor.detach())


def _tensor(array: np.ndarray) -> "Tensor":
    """The array's own memory as a tensor."""
    from paddle.utils import dlpack

    return dlpack.from_dlpack(array)


def _gradients(arrays: Sequence[np.ndarray], needed: Sequence[bool | None]) -> tuple:
    """What a backward pass returns: of each tensor that was given its gradient, or None where none is needed."""
    pairs = zip(arrays, needed, strict=True)
    return tuple(_tensor(array) if is_needed else None for array, is_needed in pairs if is_needed is not None)


def _needed(*tensors: "Tensor | None") -> list[bool | None]:
    """Whether a tensor wants a gradient; None where none was given."""
    return [None if tensor is None else not tensor.stop_gradient for tensor in tensors]


@functools.cache
def _layers():
    from paddle.autograd import PyLayer

    from utils import cpu_kernels

    def bias_of(tensor: "Tensor | None", n_columns: int) -> np.ndarray:
        return np.zeros(n_columns, np.float32) if tensor is None else _array(tensor)

    def dropped(x: "Tensor", drop: Drop) -> "Tensor":
        own, dropping = _array(x), drop.settled()
        result = np.empty_like(own)
        in_blocks(len(own), lambda rows: cpu_kernels.dropout(own[rows], rows.start, dropping, result[rows]))
        return _tensor(result)

    class Layers:
        class Linear(PyLayer):
            @staticmethod
            def forward(ctx, x, weight, n_parts):
                ctx.needed, ctx.n, ctx.n_parts = _needed(x, weight), len(x), n_parts
                ctx.left, ctx.right = (Parts.of(_array(tensor), n_parts) for tensor in (x, weight))
                ctx.right = ctx.right[: len(weight)]
                return _tensor(product(ctx.left, ctx.right)[: ctx.n])

            @staticmethod
            def backward(ctx, gradient):
                own, (wants_x, wants_weight) = Parts.of(_array(gradient), ctx.n_parts), ctx.needed
                d_x = product(own, ctx.right.transposed)[: ctx.n] if wants_x else None
                d_weight = product_over_rows(ctx.left, own) if wants_weight else None
                return _gradients((d_x, d_weight), ctx.needed)

        class Dropout(PyLayer):
            @staticmethod
            def forward(ctx, x, drop):
                ctx.drop = drop
                return dropped(x, drop)

            @staticmethod
            def backward(ctx, gradient):
                return dropped(gradient, ctx.drop)

        class Gelu(PyLayer):
            @staticmethod
            def forward(ctx, x, bias):
                ctx.needed = _needed(x, bias)
                own, added = _array(x), bias_of(bias, x.shape[1])
                result, ctx.slope = np.empty_like(own), np.empty_like(own)
                in_blocks(
                    len(own), lambda rows: cpu_kernels.gelu(own[rows], added, result[rows], ctx.slope[rows])
                )  # fmt: skip
                return _tensor(result)

            @staticmethod
            def backward(ctx, gradient):
                own = _array(gradient)
                # The slope is needed no more: multiplied where it lies, it takes no memory beside it.
                d_x, ctx.slope = ctx.slope, None
                d_bias = np.zeros(own.shape[1], np.float32)

                def work(rows: slice, sums: np.ndarray) -> None:
                    cpu_kernels.scale(d_x[rows], own[rows], sums)

                in_blocks(len(own), work, d_bias)
                return _gradients((d_x, d_bias), ctx.needed)

        class AddNorm(PyLayer):
            @staticmethod
            def forward(ctx, x, z, bias, gain, offset, epsilon, drop):
                ctx.needed, ctx.dropping = _needed(x, z, bias, gain, offset), drop.settled()
                left, right, added, ctx.gain, shift = (
                    _array(x),
                    _array(z),
                    bias_of(bias, x.shape[1]),
                    *map(_array, (gain, offset)),
                )
                result, ctx.normalised = np.empty_like(left), np.empty_like(left)
                ctx.scales = np.empty(len(left), np.float32)

                def work(rows: slice) -> None:
                    cpu_kernels.add_norm(
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
                    cpu_kernels.add_norm_backward(
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
                rounds = bfloat16 and can_round(qkv.shape[1] // (3 * heads), drop)
                kind = RoundedAttention if rounds else Attention
                ctx.call = kind(_array(qkv), bias_of(bias, qkv.shape[1]), lengths, heads, drop)
                return _tensor(ctx.call.forward())

            @staticmethod
            def backward(ctx, gradient):
                d_qkv = ctx.call.backward(_array(gradient))
                d_bias = np.zeros(d_qkv.shape[1], np.float32)
                in_blocks(len(d_qkv), lambda rows, sums: cpu_kernels.add_columns(d_qkv[rows], sums), d_bias)
                return _gradients((d_qkv, d_bias), ctx.needed)

    return Layers
