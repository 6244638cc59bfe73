"""The layers of an encoder that suit a CPU, over packed texts: no padding anywhere.

A batch's texts stand one after another in one array of tokens. Products, norms and activations do not
care where a text ends; attention works text by text and head by head, so that a head's scores never leave
the core's cache, and it keeps none of them for the backward pass: it computes them again (FlashAttention,
Dao et al., 2022). Paddle's own, over a padded batch, writes all scores to memory several times.

The rest are layers whose backward pass Paddle computes one number at a time on a CPU. Milliseconds for 4,032
tokens of 384 values (GELU: 1,536) on two cores, Paddle's and ours: GELU 424 and 25, layer norm 27 and 4;
a bias's gradient takes longer than a matrix product, and as a product with ones a twentieth of one.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils import runtime
from utils.threads import in_threads

if TYPE_CHECKING:
    from paddle import Tensor

# Scores that one thread works on at a time: 1 MB of float32.
_SCORES = 1 << 18
# Rows that one thread works on at a time, elementwise and in products.
_ROWS, _PRODUCT_ROWS = 128, 512
# exp of anything up to this fits into float32 with room for a row's sum, and exp of its negative is no denormal.
_SAFE_EXPONENT = 60.0
# Dropout shares are rounded to multiples of 1 / _LEVELS, so that one byte, or two, draw a decision.
_LEVELS = 65536


def linear(x: "Tensor", weight: "Tensor", bias: "Tensor") -> "Tensor":
    """x [..., in] times weight [in, out], plus bias [out]."""
    flat = x.reshape([-1, x.shape[-1]])
    return _layers().Linear.apply(flat, weight, bias).reshape([*x.shape[:-1], weight.shape[-1]])


def gelu(x: "Tensor") -> "Tensor":
    """x times the normal distribution function of x (Hendrycks and Gimpel, 2016), in any shape."""
    return _layers().Gelu.apply(x)


def layer_norm(x: "Tensor", gain: "Tensor", bias: "Tensor", epsilon: float) -> "Tensor":
    """x [n, h] with each row brought to mean 0 and variance 1, times gain [h], plus bias [h]."""
    return _layers().LayerNorm.apply(x, gain, bias, epsilon)


def dropout(x: "Tensor", share: float, seed: Sequence[int]) -> "Tensor":
    """x with a ``share`` of its values set to 0 and the others raised accordingly; ``seed`` settles which."""
    import paddle

    return x * paddle.to_tensor(_mask(np.random.Generator(np.random.SFC64(list(seed))), x.shape, share))


def attention(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    lengths: Sequence[int],
    heads: int,
    share: float = 0.0,
    seed: Sequence[int] = (),
) -> "Tensor":
    """Softmax attention of each text within itself.

    Args:
        query, key, value: float32 [tokens, heads * width], the texts one after another; the scale is in ``query``.
        lengths: tokens of each text.
        share: of the attention weights that dropout sets to 0, as ``seed`` settles.

    Returns:
        float32 [tokens, heads * width].
    """
    return _layers().Attention.apply(query, key, value, list(lengths), heads, share, list(seed))


def _mask(generator: np.random.Generator, shape: Sequence[int], share: float) -> np.ndarray:
    """0 for a ``share`` of the places, the reciprocal of the rest's share elsewhere; float32."""
    lowest_kept = round(share * _LEVELS)
    bits = generator.integers(0, _LEVELS, shape, np.uint16)
    return np.multiply(bits >= lowest_kept, np.float32(_LEVELS / (_LEVELS - lowest_kept)), dtype=np.float32)


def _parts(lengths: Sequence[int], heads: int) -> list[tuple[int, slice, slice]]:
    """(text, its tokens, some of its heads): pieces of work whose scores fit into the cache."""
    parts, start = [], 0
    for text, length in enumerate(lengths):
        tokens = slice(start, start + length)
        step = max(1, min(heads, _SCORES // max(1, length * length)))
        parts += [(text, tokens, slice(head, min(head + step, heads))) for head in range(0, heads, step)]
        start += length
    return parts


def _weights(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Attention weights of [h, t, w] by [h, t, w] before each row is divided by its sum: [h, t, t]."""
    scores = np.matmul(query, key.transpose(0, 2, 1))
    # Subtracting each row's maximum keeps exp in range; where no score can leave it, the passes are spared.
    largest = _largest_square(query) * _largest_square(key)
    if not largest < _SAFE_EXPONENT**2:
        scores -= scores.max(axis=-1, keepdims=True)
    return np.exp(scores, out=scores)


def _largest_square(vectors: np.ndarray) -> float:
    return float(np.einsum("htw,htw->ht", vectors, vectors).max())


def _with_column(rows: np.ndarray, column: np.ndarray | float) -> np.ndarray:
    """[h, t, w] with one more value in each row."""
    result = np.empty((*rows.shape[:2], rows.shape[2] + 1), np.float32)
    result[..., :-1], result[..., -1] = rows, column
    return result


class _Texts:
    """Arrays [tokens, heads * width] cut into [h, t, w] for each piece of work."""

    def __init__(self, lengths: list[int], heads: int, share: float, seed: list[int]):
        self.parts = _parts(lengths, heads)
        self.heads, self.share, self.seed = heads, share, seed

    def cut(self, number: int, *arrays: np.ndarray) -> Iterator[np.ndarray]:
        _, tokens, heads = self.parts[number]
        for array in arrays:
            yield array.reshape(len(array), self.heads, -1)[tokens, heads].transpose(1, 0, 2)

    def dropped(self, number: int, shape: Sequence[int]) -> np.ndarray | None:
        """The dropout mask of a piece of work, the same whenever it is asked for."""
        if not self.share:
            return None
        text, _, heads = self.parts[number]
        return _mask(np.random.Generator(np.random.SFC64([*self.seed, text, heads.start])), shape, self.share)


def _gelu_backward(x: np.ndarray, erf: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient at rows x [n, h], given erf(x / sqrt 2): distribution function plus x times density."""
    result = np.empty_like(x)

    def work(start: int) -> None:
        rows = slice(start, start + _ROWS)
        own, slope = x[rows], result[rows]
        np.multiply(own, own, out=slope)
        slope *= np.float32(-0.5)
        np.exp(slope, out=slope)
        slope *= own
        slope *= np.float32((2 * math.pi) ** -0.5)
        slope += np.float32(0.5) * erf[rows]
        slope += np.float32(0.5)
        slope *= gradient[rows]

    in_threads(work, range(0, len(x), _ROWS))
    return result


def _layer_norm_backward(
    x: np.ndarray, gain: np.ndarray, epsilon: float, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of a layer norm at x [n, h]: of x, of the gain and of the bias."""
    d_x = np.empty_like(x)

    def work(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(start, start + _ROWS)
        d_y = gradient[rows]
        unit = x[rows] - x[rows].mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt(np.einsum("ij,ij->i", unit, unit)[:, None] / np.float32(x.shape[1]) + np.float32(epsilon))
        unit *= scale
        d_unit = d_y * gain
        along = np.einsum("ij,ij->i", d_unit, unit)[:, None] / np.float32(x.shape[1])
        d_unit -= d_unit.mean(axis=1, keepdims=True)
        d_unit -= unit * along
        np.multiply(d_unit, scale, out=d_x[rows])
        unit *= d_y
        return unit.sum(axis=0), d_y.sum(axis=0)

    d_gain, d_bias = zip(*in_threads(work, range(0, len(x), _ROWS)), strict=True)
    return d_x, np.sum(d_gain, axis=0), np.sum(d_bias, axis=0)


def _attend(texts: _Texts, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    output = np.empty_like(query)

    def work(number: int) -> None:
        q, k, v, out = texts.cut(number, query, key, value, output)
        weights = _weights(q, k)
        mask = texts.dropped(number, weights.shape)
        if mask is None:
            # A column of ones sums the weights in the same product.
            summed = np.matmul(weights, _with_column(v, 1.0))
            np.divide(summed[..., :-1], summed[..., -1:], out=out)
        else:
            sums = weights.sum(axis=-1, keepdims=True)
            weights *= mask
            np.divide(np.matmul(weights, v), sums, out=out)

    in_threads(work, range(len(texts.parts)))
    return output


def _attend_backward(
    texts: _Texts, query: np.ndarray, key: np.ndarray, value: np.ndarray, output: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With weights W = E / s, s the row sums of E: dV = E^T (dO / s), dS = E * ((dO V^T - rowsum(dO * O)) / s)."""
    gradients = np.empty_like(query), np.empty_like(key), np.empty_like(value)

    def work(number: int) -> None:
        q, k, v, out, d_out = texts.cut(number, query, key, value, output, gradient)
        d_q, d_k, d_v = texts.cut(number, *gradients)
        weights = _weights(q, k)
        sums = weights.sum(axis=-1, keepdims=True)
        d_out = d_out / sums
        along = np.einsum("htw,htw->ht", out, d_out)
        mask = texts.dropped(number, weights.shape)
        if mask is None:
            d_v[...] = np.matmul(weights.transpose(0, 2, 1), d_out)
            # A column more in each factor subtracts ``along`` in the same product.
            d_scores = np.matmul(_with_column(d_out, -along), _with_column(v, 1.0).transpose(0, 2, 1))
        else:
            d_v[...] = np.matmul((weights * mask).transpose(0, 2, 1), d_out)
            d_scores = np.matmul(d_out, v.transpose(0, 2, 1))
            d_scores *= mask
            d_scores -= along[..., None]
        d_scores *= weights
        d_q[...] = np.matmul(d_scores, k)
        d_k[...] = np.matmul(d_scores.transpose(0, 2, 1), q)

    in_threads(work, range(len(texts.parts)))
    return gradients


def _product(left: np.ndarray, right: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """left [n, a] times right [a, b], plus bias [b], block by block of rows on all threads."""
    result = np.empty((len(left), right.shape[1]), np.float32)
    size = max(1, min(_PRODUCT_ROWS, -(-len(left) // runtime.cpu_threads())))

    def work(start: int) -> None:
        rows = result[start : start + size]
        np.matmul(left[start : start + size], right, out=rows)
        if bias is not None:
            rows += bias

    in_threads(work, range(0, len(left), size))
    return result


def _array(tensor: "Tensor") -> np.ndarray:
    """The tensor's own memory, read-only."""
    return np.from_dlpack(tensor.detach())


def _tensor(array: np.ndarray) -> "Tensor":
    """The array's own memory as a tensor."""
    from paddle.utils import dlpack

    return dlpack.from_dlpack(array)


@functools.cache
def _layers():
    import paddle
    from paddle.autograd import PyLayer
    from paddle.nn import functional

    class Layers:
        class Linear(PyLayer):
            @staticmethod
            def forward(ctx, x, weight, bias):
                ctx.save_for_backward(x, weight, bias)
                return _tensor(_product(_array(x), _array(weight), _array(bias)))

            @staticmethod
            def backward(ctx, gradient):
                saved = ctx.saved_tensor()
                wanted = [not tensor.stop_gradient for tensor in saved]
                x, weight, own = map(_array, (*saved[:2], gradient))
                ones = np.ones((1, len(own)), np.float32)
                factors = (own, weight.T), (x.T, own), (ones, own)
                gradients = [
                    _product(*pair) if is_wanted else None for pair, is_wanted in zip(factors, wanted, strict=True)
                ]
                return tuple(
                    None if gradient is None else _tensor(gradient.reshape(tensor.shape))
                    for gradient, tensor in zip(gradients, saved, strict=True)
                )

        class Attention(PyLayer):
            @staticmethod
            def forward(ctx, query, key, value, lengths, heads, share, seed):
                ctx.texts = _Texts(lengths, heads, share, seed)
                output = _tensor(_attend(ctx.texts, *map(_array, (query, key, value))))
                ctx.save_for_backward(query, key, value, output)
                return output

            @staticmethod
            def backward(ctx, gradient):
                saved = map(_array, (*ctx.saved_tensor(), gradient))
                return tuple(map(_tensor, _attend_backward(ctx.texts, *saved)))

        class Gelu(PyLayer):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return functional.gelu(x)

            @staticmethod
            def backward(ctx, gradient):
                (x,) = ctx.saved_tensor()
                erf = paddle.erf(x * 0.5**0.5)
                flat = (_array(tensor).reshape(-1, x.shape[-1]) for tensor in (x, erf, gradient))
                return _tensor(_gelu_backward(*flat)).reshape(x.shape)

        class LayerNorm(PyLayer):
            @staticmethod
            def forward(ctx, x, gain, bias, epsilon):
                ctx.epsilon = epsilon
                ctx.save_for_backward(x, gain, bias)
                return functional.layer_norm(x, x.shape[-1:], gain, bias, epsilon)

            @staticmethod
            def backward(ctx, gradient):
                saved = ctx.saved_tensor()
                x, gain, own = map(_array, (*saved[:2], gradient))
                gradients = _layer_norm_backward(x, gain, ctx.epsilon, own)
                return tuple(
                    None if tensor.stop_gradient else _tensor(own) for tensor, own in zip(saved, gradients, strict=True)
                )

    return Layers
