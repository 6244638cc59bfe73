"""The parts of an encoder layer that suit a CPU, over packed texts: no padding anywhere.

A batch's texts stand one after another in one array of tokens. Products and norms do not care where a
text ends; attention works text by text and head by head, so that a head's scores do not leave the core's
cache, and it keeps none of them for the backward pass: it computes them again (FlashAttention, Dao et
al., 2022).

Matrix products are Paddle's, which run at the machine's peak; in bfloat16, ``linear`` makes them. All that lies
between two products is one pass over memory on all cores (``cpu_kernels``); Paddle's own operators take several, on
one core.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils import matmul, runtime
from utils.threads import in_threads

if TYPE_CHECKING:
    from paddle import Tensor

    from utils.cpu_kernels import Dropping

# Rows that one thread works on at a time. Sums over rows are made block by block, so this is part of their last bits.
_ROWS = 256
# Rows that are multiplied in bfloat16 at a time; what the last ones are filled up to a multiple of, since preparing a
# product takes longer than running it; and the fewest whose part of a weight's gradient is worth a sum of its own.
_BFLOAT16_ROWS, _FILLED_ROWS, _SUMMED_ROWS = 512, 128, 1024
# Scores that one piece of work may have: the heads of long texts are shared between threads.
_SCORES = 1 << 19


@dataclass(frozen=True)
class Drop:
    """Dropout: the share of values to drop, and the seed words that settle which."""

    share: float = 0.0
    seed: Sequence[int] = ()

    def settled(self, *place: int) -> "Dropping":
        """As ``cpu_kernels`` take it; the key is of the seed and a place."""
        from utils.cpu_kernels import Dropping

        key = np.random.SeedSequence([*self.seed, *place]).generate_state(1)[0] if self.share else 0
        threshold = min(round(self.share * 2**32), 2**32 - 1)
        return Dropping(np.uint32(key), np.uint32(threshold), np.float32(1 / (1 - self.share)))


def linear(x: "Tensor", weight: "Tensor") -> "Tensor":
    """x [n, in] times weight [in, out], both rounded to bfloat16, as are the gradients that come back."""
    return _layers().Linear.apply(x, weight)


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


def _in_blocks(n: int, work: Callable[..., None], sums: np.ndarray | None = None) -> None:
    """``work`` of every block of rows; if ``sums`` are given, also of an array like them, to be added to them."""

    def block(start: int) -> np.ndarray | None:
        rows = slice(start, start + _ROWS)
        if sums is None:
            return work(rows)
        own = np.zeros_like(sums)
        work(rows, own)
        return own

    for own in in_threads(block, range(0, n, _ROWS)):
        if sums is not None:
            sums += own


def _rounded(values: np.ndarray) -> np.ndarray:
    """Float32 rows [n, h] in bfloat16, filled up with zeros to a multiple of ``_FILLED_ROWS``."""
    n = len(values)
    result = matmul.empty((-(-n // _FILLED_ROWS) * _FILLED_ROWS, values.shape[1]), np.uint16)
    _in_blocks(n, lambda rows: matmul.to_bfloat16(values[rows], result[rows]))
    result[n:] = 0
    return result


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float32 [n, b] of bfloat16 [n, a] and [a, b]."""
    result = matmul.empty((len(left), right.shape[1]), np.float32)

    def work(start: int) -> None:
        rows = slice(start, start + _BFLOAT16_ROWS)
        matmul.matmul(left[rows], right, result[rows])

    in_threads(work, range(0, len(left), _BFLOAT16_ROWS))
    return result


def _product_over_rows(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float32 [a, b] of bfloat16 [n, a], transposed, and [n, b]."""
    n_parts = max(1, min(runtime.cpu_threads(), len(left) // _SUMMED_ROWS))
    size = -(-len(left) // (n_parts * _FILLED_ROWS)) * _FILLED_ROWS

    def work(start: int) -> np.ndarray:
        rows, result = slice(start, start + size), matmul.empty((left.shape[1], right.shape[1]), np.float32)
        matmul.matmul(left[rows].T, right[rows], result)
        return result

    total, *others = in_threads(work, range(0, len(left), size))
    for other in others:
        total += other
    return total


@dataclass
class _Attention:
    """One call of ``attention``: its inputs as arrays, and the work on each piece."""

    qkv: np.ndarray
    bias: np.ndarray
    lengths: list[int]
    heads: int
    drop: Drop

    def forward(self) -> np.ndarray:
        """The attention's output."""
        from utils import cpu_kernels

        result = np.empty((len(self.qkv), self.qkv.shape[1] // 3), np.float32)
        self._in_pieces(lambda cut, *text: cpu_kernels.attention(cut(self.qkv), *text, cut(result)))
        return result

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient of ``qkv``, given that of the output."""
        from utils import cpu_kernels

        result = np.empty_like(self.qkv)

        def work(cut: Callable, *text) -> None:
            cpu_kernels.attention_backward(cut(self.qkv), *text, cut(gradient), cut(result))

        self._in_pieces(work)
        return result

    def _in_pieces(self, work: Callable[..., None]) -> None:
        """``work`` of each text and some heads, the longest texts first: what cuts arrays down to the text, and
        the kernels' arguments.
        """
        starts = np.cumsum([0, *self.lengths])
        width = self.qkv.shape[1] // (3 * self.heads)
        pieces = []
        for text in np.argsort(self.lengths, kind="stable")[::-1].tolist():
            step = max(1, min(self.heads, _SCORES // self.lengths[text] ** 2))
            pieces += [(text, (head, min(head + step, self.heads))) for head in range(0, self.heads, step)]

        def piece(number: int) -> None:
            text, heads = pieces[number]
            tokens = slice(starts[text], starts[text + 1])
            work(lambda array: array[tokens], self.bias, width, heads, self.drop.settled(text))

        in_threads(piece, range(len(pieces)))


@dataclass
class _RoundedAttention(_Attention):
    """The same by the processor's matrix instructions, without dropout."""

    def forward(self) -> np.ndarray:
        """The attention's output."""
        from utils import amx_attention

        n, width = len(self.qkv), self.qkv.shape[1] // 3
        self._rounded, context = matmul.empty(self.qkv.shape, np.uint16), matmul.empty((n, width), np.uint16)
        result = matmul.empty((n, width), np.float32)
        # The kernel takes powers of 2.
        scale = np.float32((width // self.heads) ** -0.5 / np.log(2))

        def round_rows(rows: slice) -> None:
            own = self.qkv[rows] + self.bias
            own[:, :width] *= scale
            matmul.to_bfloat16(own, self._rounded[rows])

        def attend(tokens: slice) -> None:
            own = self._rounded[tokens]
            amx_attention.attention(own[None], np.array([len(own)]), self.heads, context[tokens][None])
            result.view(np.uint32)[tokens] = context[tokens].astype(np.uint32) << 16

        _in_blocks(n, round_rows)
        self._in_texts(attend)
        self.qkv = self.qkv[:0]  # the backward pass needs only what it was rounded to
        return result

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient of ``qkv``, given that of the output."""
        from utils import amx_attention_gradients

        rounded, result = matmul.empty(gradient.shape, np.uint16), matmul.empty(self._rounded.shape, np.float32)

        def work(tokens: slice) -> None:
            own = self._rounded[tokens], rounded[tokens]
            amx_attention_gradients.attention_backward(*own, self.heads, result[tokens])

        _in_blocks(len(gradient), lambda rows: matmul.to_bfloat16(gradient[rows], rounded[rows]))
        self._in_texts(work)
        return result

    def _in_texts(self, work: Callable[[slice], None]) -> None:
        """``work`` of each text's tokens, the longest texts first."""
        ends = np.cumsum(self.lengths)
        order = np.argsort(self.lengths, kind="stable")[::-1].tolist()
        in_threads(lambda text: work(slice(ends[text] - self.lengths[text], ends[text])), order)


def _can_round(width: int, drop: Drop) -> bool:
    """True if ``_RoundedAttention`` is for heads of this width."""
    from utils import amx_attention

    return not drop.share and amx_attention.supports(width)


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
        _in_blocks(len(own), lambda rows: cpu_kernels.dropout(own[rows], rows.start, dropping, result[rows]))
        return _tensor(result)

    class Layers:
        class Linear(PyLayer):
            @staticmethod
            def forward(ctx, x, weight):
                ctx.needed, ctx.n = _needed(x, weight), len(x)
                ctx.left, ctx.right = _rounded(_array(x)), matmul.to_bfloat16(_array(weight))
                return _tensor(_product(ctx.left, ctx.right)[: ctx.n])

            @staticmethod
            def backward(ctx, gradient):
                own, (wants_x, wants_weight) = _rounded(_array(gradient)), ctx.needed
                d_x = _product(own, ctx.right.T)[: ctx.n] if wants_x else None
                d_weight = _product_over_rows(ctx.left, own) if wants_weight else None
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
                _in_blocks(
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

                _in_blocks(len(own), work, d_bias)
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

                _in_blocks(len(left), work)
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

                _in_blocks(len(own), work, sums)
                d_gain, d_offset, d_bias = sums
                return _gradients((d_x, d_z, d_bias, d_gain, d_offset), ctx.needed)

        class Attention(PyLayer):
            @staticmethod
            def forward(ctx, qkv, bias, lengths, heads, drop, bfloat16):
                ctx.needed = _needed(qkv, bias)
                rounds = bfloat16 and _can_round(qkv.shape[1] // (3 * heads), drop)
                kind = _RoundedAttention if rounds else _Attention
                ctx.call = kind(_array(qkv), bias_of(bias, qkv.shape[1]), lengths, heads, drop)
                return _tensor(ctx.call.forward())

            @staticmethod
            def backward(ctx, gradient):
                d_qkv = ctx.call.backward(_array(gradient))
                d_bias = np.zeros(d_qkv.shape[1], np.float32)
                _in_blocks(len(d_qkv), lambda rows, sums: cpu_kernels.add_columns(d_qkv[rows], sums), d_bias)
                return _gradients((d_qkv, d_bias), ctx.needed)

    return Layers
