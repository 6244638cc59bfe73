"""The parts of an encoder layer that suit a CPU, over packed texts: no padding anywhere.

A batch's texts stand one after another in one array of tokens. Products and norms do not care where a
text ends; ``attention`` does.

Matrix products are Paddle's, which run at the machine's peak; by bfloat16, ``linear`` makes them. All that lies
between two products is one pass over memory on all cores (``training_loops``); Paddle's own operators take several, on
one core.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .blocks import Drop

if TYPE_CHECKING:
    from paddle import Tensor


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


def _layers():
    from . import pylayers  # for Paddle and numba

    return pylayers
