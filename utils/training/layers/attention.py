"""Attention of packed texts and its gradient, text by text and head by head, on all cores.

A head's scores do not leave the core's cache, and none are kept for the backward pass, which computes them again
(FlashAttention, Dao et al., 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...kernels import onednn
from ...process.threads import in_threads
from .blocks import Drop, in_blocks

# Scores that one piece of work may have: the heads of long texts are shared between threads.
_SCORES = 1 << 19


@dataclass
class Attention:
    """One call of ``attention``: its inputs as arrays, and the work on each piece."""

    qkv: np.ndarray
    bias: np.ndarray
    lengths: list[int]
    heads: int
    drop: Drop

    def forward(self) -> np.ndarray:
        """The attention's output."""
        from ...kernels import training_loops

        result = np.empty((len(self.qkv), self.qkv.shape[1] // 3), np.float32)
        self._in_pieces(lambda cut, *text: training_loops.attention(cut(self.qkv), *text, cut(result)))
        return result

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient of ``qkv``, given that of the output."""
        from ...kernels import training_loops

        result = np.empty_like(self.qkv)

        def work(cut: Callable, *text) -> None:
            training_loops.attention_backward(cut(self.qkv), *text, cut(gradient), cut(result))

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
class RoundedAttention(Attention):
    """The same by the processor's matrix instructions, without dropout."""

    def forward(self) -> np.ndarray:
        """The attention's output."""
        from ...kernels.amx import attention

        n, width = len(self.qkv), self.qkv.shape[1] // 3
        self._rounded, context = onednn.empty(self.qkv.shape, np.uint16), onednn.empty((n, width), np.uint16)
        result = onednn.empty((n, width), np.float32)
        # The kernel takes powers of 2.
        scale = np.float32((width // self.heads) ** -0.5 / np.log(2))

        def round_rows(rows: slice) -> None:
            own = self.qkv[rows] + self.bias
            own[:, :width] *= scale
            onednn.to_bfloat16(own, self._rounded[rows])

        def attend(tokens: slice) -> None:
            own = self._rounded[tokens]
            attention.attention(own[None], np.array([len(own)]), self.heads, context[tokens][None])
            result.view(np.uint32)[tokens] = context[tokens].astype(np.uint32) << 16

        in_blocks(n, round_rows)
        self._in_texts(attend)
        self.qkv = self.qkv[:0]  # the backward pass needs only what it was rounded to
        return result

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient of ``qkv``, given that of the output."""
        from ...kernels.amx import attention_gradients

        rounded, result = onednn.empty(gradient.shape, np.uint16), onednn.empty(self._rounded.shape, np.float32)

        def work(tokens: slice) -> None:
            own = self._rounded[tokens], rounded[tokens]
            attention_gradients.attention_backward(*own, self.heads, result[tokens])

        in_blocks(len(gradient), lambda rows: onednn.to_bfloat16(gradient[rows], rounded[rows]))
        self._in_texts(work)
        return result

    def _in_texts(self, work: Callable[[slice], None]) -> None:
        """``work`` of each text's tokens, the longest texts first."""
        ends = np.cumsum(self.lengths)
        order = np.argsort(self.lengths, kind="stable")[::-1].tolist()
        in_threads(lambda text: work(slice(ends[text] - self.lengths[text], ends[text])), order)


def can_round(width: int, drop: Drop) -> bool:
    """True if ``RoundedAttention`` is for heads of this width."""
    from ...kernels.amx import attention

    return not drop.share and attention.supports(width)
