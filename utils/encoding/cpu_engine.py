"""The CPU engine for encoders: token ids to pooled vectors, by oneDNN's products and compiled loops between them.

BERT, RoBERTa, XLM-RoBERTa and ERNIE are one architecture (post-layer-norm transformer encoders) under
different weight names. In bfloat16, what is multiplied is rounded, and weights of attention too; sums, layer
norms, scores of attention and the stream between the layers stay float32. Where the processor has AMX, attention and
products in bfloat16 are ours too.

One call runs on one thread, and calls may run side by side.
"""

import logging
import math
import re
from typing import NamedTuple

import numpy as np

from ..kernels import onednn
from ..models import weight_files
from ..models.bert_names import LAYER_PARTS, LINEAR
from ..models.checkpoint import Checkpoint
from ..models.weight_files import Parameters
from ..process import runtime

logger = logging.getLogger(__name__)

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "ernie")
# Tokens that go through the layers together, which bounds memory; and the bytes of attention scores that are made at
# once, where they are made of many heads: those should stay in a core's cache.
_TOKENS, _SCORE_BYTES = 2048, 4 << 20
# Rows that oneDNN multiplies at once, and what a last, smaller part is filled up to a multiple of: preparing a
# product takes longer than running it, so there should be few sizes.
_ROWS, _FEWEST_ROWS = 768, 64


def supports(model: Checkpoint) -> bool:
    """True for the encoders that this engine can run, where ``matmul.is_usable()``."""
    config = model.config
    return (
        model.model_type in MODEL_TYPES
        and config.get("hidden_act", "gelu") in onednn.ACTIVATIONS
        and config.get("position_embedding_type", "absolute") == "absolute"
    )


def best_dtype() -> str:
    """bfloat16 where the processor multiplies it natively, else float32."""
    return "bfloat16" if onednn.bfloat16_is_fast() else "float32"


class _Layer(NamedTuple):
    """One layer's parameters: weights [in, out], and float32 for the rest.

    Queries, keys and values are one product; the queries' part holds attention's 1 / sqrt(head width).
    """

    qkv: "_Weight"
    qkv_bias: np.ndarray
    o: "_Weight"
    o_bias: np.ndarray
    norm1: tuple[np.ndarray, np.ndarray]
    up: "_Weight"
    up_bias: np.ndarray
    down: "_Weight"
    down_bias: np.ndarray
    norm2: tuple[np.ndarray, np.ndarray]


class _Weight:
    """A weight in the order that its product takes it in: our own where the processor has AMX, else oneDNN's.

    Args:
        values: float32 [in, out].
        dtype: what is multiplied: float32, or uint16 for bfloat16.
        activation: of the product's result.
    """

    def __init__(self, values: np.ndarray, dtype: type, activation: str = "none"):
        from ..kernels.amx import matmul as amx_matmul

        values, self._activation = _plain(values), activation
        values = onednn.to_bfloat16(values) if dtype is np.uint16 else values
        by_amx = dtype is np.uint16 and amx_matmul.supports(values.shape, activation)
        self._packed: amx_matmul.Packed | onednn.Packed = (amx_matmul if by_amx else onednn).Packed(values)

    def multiply(self, left: np.ndarray, result: np.ndarray, bias: np.ndarray) -> None:
        """``result`` becomes the activation of left [m, in] times this plus bias; m is a multiple of _FEWEST_ROWS."""
        if not isinstance(self._packed, onednn.Packed):
            self._packed.multiply(left, result, bias, self._activation)
            return
        for start in range(0, len(left), _ROWS):
            part = slice(start, start + _ROWS)
            onednn.matmul(left[part], self._packed, result[part], bias, self._activation)


class OneDNNEngine:
    """See ``engines.Engine``.

    Args:
        dtype: ``"bfloat16"`` or ``"float32"``.
    """

    def __init__(self, model: Checkpoint, dtype: str):
        self.threads = runtime.cpu_threads()
        config = model.config
        self._heads = config["num_attention_heads"]
        self._activation = config.get("hidden_act", "gelu")
        self._epsilon = np.float32(config.get("layer_norm_eps", config.get("layer_norm_epsilon", 1e-12)))
        # What is multiplied is held in this type.
        self._type = np.uint16 if dtype == "bfloat16" else np.float32
        parameters, torch_layout = weight_files.read_weights(model), model.is_torch
        try:
            embeddings, layers = _sorted_out(parameters, torch_layout, config.get("num_hidden_layers"))
            if model.task is not None and model.task >= len(embeddings.get("tasks", ())):
                raise ValueError(f"config.json wants the embedding of task {model.task}, which the checkpoint lacks")
            _check_shapes(model, embeddings, layers)
        except ValueError as error:
            raise ValueError(f"{model.folder}: {error}") from None
        self._words = embeddings["words"]
        # All texts are of one token type and task, whose embeddings can be added to the positions' once and for all.
        self._positions = np.array(embeddings["positions"][model.position_offset :])
        if "types" in embeddings:
            self._positions += embeddings["types"][0]
        if model.task is not None:
            self._positions += embeddings["tasks"][model.task]
        self._norm = _plain(embeddings["gain"]), _plain(embeddings["bias"])
        self._layers = [self._prepared(parts) for parts in layers]

    def _prepared(self, parts: dict[str, Parameters]) -> _Layer:
        scale = (len(parts["q"]["bias"]) // self._heads) ** -0.5
        if self._type is np.uint16:
            scale /= math.log(2)  # what takes the softmax's powers in lower precision takes them of 2
        scales = (np.float32(scale), np.float32(1), np.float32(1))

        def joined(which: str) -> np.ndarray:
            columns = [parts[name][which] * own for name, own in zip("qkv", scales, strict=True)]
            return np.concatenate(columns, axis=-1)

        def norm(name: str) -> tuple[np.ndarray, np.ndarray]:
            return _plain(parts[name]["weight"]), _plain(parts[name]["bias"])

        after = {"o": "none", "up": self._activation, "down": "none"}
        linear = {
            name: (_Weight(parts[name]["weight"], self._type, activation), _plain(parts[name]["bias"]))
            for name, activation in after.items()
        }
        return _Layer(
            _Weight(joined("weight"), self._type), joined("bias"), *linear["o"], norm("norm1"), *linear["up"],
            *linear["down"], norm("norm2"),
        )  # fmt: skip

    def forward(self, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """See ``engines.Engine``."""
        size = max(1, _TOKENS // ids.shape[1])
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        return np.concatenate([self._pooled(ids[part], lengths[part], weights[part]) for part in parts])

    def _pooled(self, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Texts few enough to go through the layers together."""
        b, t = ids.shape
        n, width, inner = b * t, self._words.shape[1], len(self._layers[0].up_bias)
        rows = -(-n // _FEWEST_ROWS) * _FEWEST_ROWS
        x, z = onednn.empty((2, rows, width), np.float32)
        # In float32 the stream between the layers is multiplied itself.
        low = onednn.empty((rows if self._type is np.uint16 else 0, width), np.uint16)
        taken = low if len(low) else x
        qkv, context = onednn.empty((rows, 3 * width), self._type), onednn.empty((rows, width), self._type)
        up = onednn.empty((rows, inner), self._type)
        x[n:], z[n:], context[:] = 0, 0, 0
        x[:n] = self._words[ids.reshape(-1)]
        z[:n].reshape(b, t, width)[:] = self._positions[:t]
        self._add_and_norm(x, z, self._norm, low)
        for layer in self._layers:
            layer.qkv.multiply(taken, qkv, layer.qkv_bias)
            self._attend(qkv[:n].reshape(b, t, -1), lengths, context[:n].reshape(b, t, -1))
            layer.o.multiply(context, z, layer.o_bias)
            self._add_and_norm(x, z, layer.norm1, low)
            layer.up.multiply(taken, up, layer.up_bias)
            layer.down.multiply(up, z, layer.down_bias)
            self._add_and_norm(x, z, layer.norm2, low)
        # Padding adds nothing, but as a part of the sum it would change how that rounds.
        x = x[:n].reshape(b, t, width)
        return np.stack([own[:length] @ text[:length] for own, text, length in zip(weights, x, lengths, strict=True)])

    def _add_and_norm(self, x: np.ndarray, z: np.ndarray, norm: tuple[np.ndarray, np.ndarray], low: np.ndarray) -> None:
        from ..kernels import encoder_loops

        encoder_loops.add_and_norm(x, z, *norm, self._epsilon, low)

    def _attend(self, qkv: np.ndarray, lengths: np.ndarray, context: np.ndarray) -> None:
        """Attention of texts, [b, t, 3 * width], into ``context`` [b, t, width]."""
        from ..kernels.amx import attention

        head_width = context.shape[2] // self._heads
        if self._type is np.uint16 and attention.supports(head_width):
            attention.attention(qkv, lengths, self._heads, context)
        else:
            self._attend_by_onednn(qkv, lengths, context)

    def _attend_by_onednn(self, qkv: np.ndarray, lengths: np.ndarray, context: np.ndarray) -> None:
        """The same, of many heads at a time and in three passes over their scores."""
        from ..kernels import encoder_loops

        b, t, width = context.shape
        batch, head_width = b * self._heads, width // self._heads
        query, key, value = parts = onednn.empty((3, batch, t, head_width), self._type)
        result = onednn.empty((batch, t, head_width), self._type)
        encoder_loops.split_heads(qkv, parts)
        at_once = min(batch, max(1, _SCORE_BYTES // (4 * t * t)))
        scores = onednn.empty((at_once, t, t), np.float32)
        rounded = onednn.empty(scores.shape if self._type is np.uint16 else (0, t, t), np.uint16)
        for start in range(0, batch, at_once):
            some = slice(start, min(start + at_once, batch))
            own = lengths[np.arange(some.start, some.stop) // self._heads]
            weights = scores[: len(own)]
            onednn.matmul(query[some], key[some].swapaxes(1, 2), weights)
            if len(rounded):
                encoder_loops.masked_softmax_to_bfloat16(weights, own, rounded)
                weights = rounded[: len(own)]
            else:
                encoder_loops.masked_softmax(weights, own)
            onednn.matmul(weights, value[some], result[some])
        encoder_loops.join_heads(result, context)


def _plain(values: np.ndarray) -> np.ndarray:
    return np.array(values, np.float32, order="C")


def _sorted_out(
    weights: Parameters, torch_layout: bool, n_layers: int | None
) -> tuple[Parameters, list[dict[str, Parameters]]]:
    """Embedding tables, and each layer's parts with linear weights [in, out], under our own names.

    Args:
        n_layers: default: as many as there are.
    """
    weights = {re.sub(r"^.*?(?=(embeddings|encoder)\.)", "", name, count=1): w for name, w in weights.items()}
    torch_names = any(name.startswith("encoder.layer.") for name in weights)
    root = "encoder.layer." if torch_names else "encoder.layers."

    def take(name: str) -> np.ndarray:
        if name not in weights:
            raise ValueError(f"the checkpoint lacks the weight {name}; expected a BERT-like encoder")
        return weights[name]

    def part(number: int, name: str) -> Parameters:
        full = f"{root}{number}.{LAYER_PARTS[name][0 if torch_names else 1]}"
        weight = take(f"{full}.weight")
        transposed = torch_layout and name in LINEAR
        return {"weight": weight.T if transposed else weight, "bias": take(f"{full}.bias")}

    if n_layers is None:
        n_layers = len({name[len(root) :].split(".")[0] for name in weights if name.startswith(root)})
    layers = [{name: part(number, name) for name in LAYER_PARTS} for number in range(n_layers)]
    norm = "LayerNorm" if "embeddings.LayerNorm.weight" in weights else "layer_norm"
    embeddings = {
        "words": take("embeddings.word_embeddings.weight"),
        "positions": take("embeddings.position_embeddings.weight"),
        "gain": take(f"embeddings.{norm}.weight"),
        "bias": take(f"embeddings.{norm}.bias"),
    }
    for short, name in (("types", "token_type_embeddings"), ("tasks", "task_type_embeddings")):
        if f"embeddings.{name}.weight" in weights:
            embeddings[short] = weights[f"embeddings.{name}.weight"]
    return embeddings, layers


def _check_shapes(model: Checkpoint, embeddings: Parameters, layers: list[dict[str, Parameters]]) -> None:
    """Weights of other shapes than the configuration's would be multiplied without complaint, or not at all.

    Raises:
        ValueError: names the first such weight.
    """
    width = model.hidden_size
    inner = model.config.get("intermediate_size") or layers[0]["up"]["bias"].size
    positions = (model.max_length or 0) + model.position_offset
    for name, rows in (("words", model.vocabulary), ("positions", positions)):
        table = embeddings[name]
        if table.ndim != 2 or len(table) < rows or table.shape[1] != width:
            raise ValueError(f"the embeddings of {name} are {list(table.shape)}; config.json says [{rows}, {width}]")
    expected = dict.fromkeys(LAYER_PARTS, (width, width)) | {"up": (width, inner), "down": (inner, width)}
    for number, parts in enumerate(layers):
        for name, values in parts.items():
            shape = expected[name] if name in LINEAR else (width,)
            if values["weight"].shape != shape or values["bias"].shape != shape[-1:]:
                raise ValueError(
                    f"layer {number}, {name}: the weight is {list(values['weight'].shape)} and the bias "
                    f"{list(values['bias'].shape)}; config.json says {list(shape)} and {list(shape[-1:])}"
                )
