"""Qwen3's decoder (Yang et al., 2025) in Paddle, under transformers' names: PaddleNLP has Qwen2 and no Qwen3."""

from typing import TYPE_CHECKING

import paddle
import paddle.nn.functional as functional
from paddle import nn
from paddle.distributed.fleet.utils import recompute

if TYPE_CHECKING:
    from paddle import Tensor

# What transformers' Qwen3Config takes for what a config.json leaves out.
DEFAULTS = {
    "head_dim": 128, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip


class Qwen3Model(nn.Layer):
    """Token ids to the last layer's states.

    Args:
        config: PaddleNLP's configuration object, of a Qwen3 ``config.json`` and ``DEFAULTS``; ``checkpoint`` has seen
            to it that attention is full.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.enable_recompute = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = _RMSNorm(config.hidden_size, config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Embedding:
        """As PaddleNLP's models have it."""
        return self.embed_tokens

    def torch_names(self) -> dict[str, tuple[str, bool]]:
        """See ``models.loading.torch_names``."""
        return {name: (name, name.endswith("_proj.weight")) for name in self.state_dict() if ".lora_" not in name}

    def forward(self, input_ids: "Tensor", attention_mask: "Tensor | None" = None) -> "Tensor":
        """States [b, t, hidden] of ids [b, t].

        ``attention_mask`` is not needed: padding is to the right, where a decoder's tokens do not look.
        """
        x = self.embed_tokens(input_ids)
        rotations = _rotations(input_ids.shape[1], self.layers[0].self_attn.width, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            # Paddle gives a recomputed layer no gradients if its input needs none (the first that is trained).
            again = self.enable_recompute and self.training and not x.stop_gradient
            x = recompute(layer, x, *rotations) if again else layer(x, *rotations)
        return self.norm(x)


class _Layer(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _GatedLinear(config)
        self.input_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Layer):
    """Grouped queries, with a norm over each head's queries and keys before they are rotated."""

    def __init__(self, config):
        super().__init__()
        hidden, bias = config.hidden_size, None if config.attention_bias else False
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width, self.dropout = config.head_dim, config.attention_dropout
        self.q_proj = nn.Linear(hidden, self.heads * self.width, bias_attr=bias)
        self.k_proj = nn.Linear(hidden, self.groups * self.width, bias_attr=bias)
        self.v_proj = nn.Linear(hidden, self.groups * self.width, bias_attr=bias)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias_attr=bias)
        self.q_norm, self.k_norm = (_RMSNorm(self.width, config.rms_norm_eps) for _ in range(2))

    def forward(self, x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
        b, t = x.shape[:2]
        query = _rotated(self.q_norm(self.q_proj(x).reshape([b, t, self.heads, self.width])), cos, sin)
        key = _rotated(self.k_norm(self.k_proj(x).reshape([b, t, self.groups, self.width])), cos, sin)
        value = self.v_proj(x).reshape([b, t, self.groups, self.width])
        key, value = (y.repeat_interleave(self.heads // self.groups, axis=2) for y in (key, value))
        context = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout, is_causal=True, training=self.training
        )
        return self.o_proj(context.reshape([b, t, self.heads * self.width]))


class _GatedLinear(nn.Layer):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias_attr=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias_attr=False)

    def forward(self, x: "Tensor") -> "Tensor":
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _RMSNorm(nn.Layer):
    """Over the last dimension, in float32 whatever the model's type (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, x: "Tensor") -> "Tensor":
        wide = x.astype("float32")
        scaled = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return scaled.astype(x.dtype) * self.weight


def _rotations(length: int, width: int, theta: float, dtype) -> tuple["Tensor", "Tensor"]:
    """Cosines and sines of rotary positions (Su et al., 2021), [1, length, 1, width] each."""
    speeds = theta ** (-paddle.arange(0, width, 2, dtype="float32") / width)
    angles = paddle.outer(paddle.arange(length, dtype="float32"), speeds)
    angles = paddle.concat([angles, angles], axis=-1)[None, :, None, :]
    return angles.cos().astype(dtype), angles.sin().astype(dtype)


def _rotated(x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
    """Pairs are a dimension of the first half and its like in the second."""
    first, second = x.chunk(2, axis=-1)
    return x * cos + paddle.concat([-second, first], axis=-1) * sin
