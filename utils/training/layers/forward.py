"""The forward pass of BERT-like encoders over PaddleNLP's sublayers, lean: with gradients, on a GPU or a CPU."""

from typing import TYPE_CHECKING

import numpy as np

from ...models.bert_names import LAYER_PARTS
from ...models.checkpoint import Checkpoint
from . import cpu
from .blocks import Drop

if TYPE_CHECKING:
    from paddle import Tensor, nn

    # What a linear layer makes of its input, and its bias if that is still to be added.
    Product = tuple[Tensor, Tensor | None]

# Added to attention scores at padding.
_MASKED = -1e4


class PaddedBatch:
    """A batch as a GPU likes it: texts padded to one length, ids [b, t]."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray):
        import paddle

        self.ids, self.positions = ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        # Adding a mask to every score takes as long as their softmax, so it is left out where nothing is padded.
        self._additive = None
        if not mask.all():
            self._additive = paddle.to_tensor(np.where(mask, np.float32(0), np.float32(_MASKED))[:, None, None, :])

    def product(self, layer: "nn.Layer", x: "Tensor") -> "Product":
        """The layer of x, and its bias if that is still to be added."""
        return layer(x), None

    def attention(self, projections: list["nn.Layer"], x: "Tensor", heads: int, drop: Drop) -> "Tensor":
        """Attention within each text, of the queries, keys and values that three layers make of x."""
        import paddle
        import paddle.nn.functional as functional

        products = [self.product(layer, x) for layer in projections]
        b, t, width = products[0][0].shape
        query, key, value = (
            y.reshape([b, t, heads, width // heads]).transpose([0, 2, 1, 3]) for y, _ in products
        )  # fmt: skip
        scores = paddle.matmul(query * (width // heads) ** -0.5, key, transpose_y=True)
        if self._additive is not None:
            scores = scores + self._additive.astype(scores.dtype)
        weights = functional.dropout(functional.softmax(scores), drop.share)
        return paddle.matmul(weights, value).transpose([0, 2, 1, 3]).reshape([b, t, width])

    def add_norm(self, norm: "nn.Layer", x: "Tensor", product: "Product", drop: Drop) -> "Tensor":
        """The norm of x plus dropout of the product."""
        y, bias = product
        return norm(x + self.dropout(y if bias is None else y + bias, drop))

    def gelu(self, product: "Product") -> "Tensor":
        """The exact GELU."""
        import paddle.nn.functional as functional

        return functional.gelu(product[0])

    def dropout(self, x: "Tensor", drop: Drop) -> "Tensor":
        """As Paddle draws it; ``seed_dropout`` has seeded it."""
        import paddle.nn.functional as functional

        return functional.dropout(x, drop.share)


class PackedBatch:
    """A batch as a CPU likes it: texts one after another, ids [tokens]. The same operations by ``cpu``."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, bfloat16: bool):
        self.ids, self.positions, self._bfloat16 = ids[mask], np.nonzero(mask)[1], bfloat16
        self._lengths = mask.sum(axis=1).tolist()

    def product(self, layer: "nn.Layer", x: "Tensor") -> "Product":
        """A layer with adapters adds its own bias."""
        import paddle

        if type(layer) is paddle.nn.Linear:
            return self._multiply(x, layer.weight), layer.bias
        return layer(x), None

    def _multiply(self, x: "Tensor", weight: "Tensor") -> "Tensor":
        import paddle

        return (cpu.linear if self._bfloat16 else paddle.matmul)(x, weight)

    def attention(self, projections: list["nn.Layer"], x: "Tensor", heads: int, drop: Drop) -> "Tensor":
        import paddle

        if all(type(layer) is paddle.nn.Linear and layer.bias is not None for layer in projections):
            # One product, and one of its gradients, take less time than three of a third, and their sum.
            weight = paddle.concat([layer.weight for layer in projections], axis=1)
            qkv, bias = self._multiply(x, weight), paddle.concat([layer.bias for layer in projections])
        else:
            qkv, bias = paddle.concat([layer(x) for layer in projections], axis=1), None
        return cpu.attention(qkv, bias, self._lengths, heads, drop, self._bfloat16)

    def add_norm(self, norm: "nn.Layer", x: "Tensor", product: "Product", drop: Drop) -> "Tensor":
        return cpu.add_norm(x, *product, norm.weight, norm.bias, norm._epsilon, drop)

    def gelu(self, product: "Product") -> "Tensor":
        return cpu.gelu(*product)

    def dropout(self, x: "Tensor", drop: Drop) -> "Tensor":
        return cpu.dropout(x, drop)


class LeanForward:
    """The forward pass of a post-layer-norm encoder over the sublayers of PaddleNLP's model.

    No casts, no masks of masks, and the operations as the device likes them: the same numbers in less time.
    """

    def __init__(self, model: "nn.Layer", checkpoint: Checkpoint):
        config = checkpoint.config
        self.model, self.heads = model, config["num_attention_heads"]
        self.offset, self.task = checkpoint.position_offset, checkpoint.task
        self.activation = config.get("hidden_act", "gelu")
        self.hidden_dropout = config.get("hidden_dropout_prob", 0.1)
        self.attention_dropout = config.get("attention_probs_dropout_prob", 0.1)
        layers = getattr(model.encoder, "layers", None) or model.encoder.layer
        families = zip(*LAYER_PARTS.values(), strict=True)
        family = next(names for names in families if sublayer(layers[0], names[0]) is not None)
        self.layers = [[sublayer(layer, name) for name in family] for layer in layers]
        self.norm = getattr(model.embeddings, "layer_norm", None) or model.embeddings.LayerNorm
        # With a place in the model, settles what dropout draws there (packed batches).
        self.seed: list[int] = [0]

    def __call__(self, batch: PaddedBatch | PackedBatch, recompute: bool) -> "Tensor":
        from paddle.distributed.fleet.utils import recompute as recomputed

        x = self._embedded(batch)
        for number, parts in enumerate(self.layers):
            # Drawn here and not in the layer: when it is recomputed, another pass may have set another seed.
            shares = self.attention_dropout, self.hidden_dropout, self.hidden_dropout
            drops = [self._drop(share, number, place) for place, share in enumerate(shares)]

            def layer(x: "Tensor", drops: list[Drop] = drops, parts: list = parts) -> "Tensor":
                return self._layer(x, batch, drops, parts)

            # Paddle gives a recomputed layer no gradients if its input needs none (the first that is trained).
            again = recompute and self.model.training and not x.stop_gradient
            x = recomputed(layer, x) if again else layer(x)
        return x

    def _embedded(self, batch: PaddedBatch | PackedBatch) -> "Tensor":
        import paddle

        embeddings = self.model.embeddings
        positions = paddle.to_tensor(batch.positions + self.offset)
        # The same for all tokens.
        types = getattr(embeddings, "token_type_embeddings", None)
        shared = None if types is None else types.weight[0]
        if self.task is not None:
            task = embeddings.task_type_embeddings.weight[self.task]
            shared = task if shared is None else shared + task
        added = embeddings.position_embeddings(positions), shared
        x = batch.add_norm(self.norm, embeddings.word_embeddings(paddle.to_tensor(batch.ids)), added, Drop())
        return batch.dropout(x, self._drop(self.hidden_dropout, len(self.layers), 0))

    def _layer(self, x: "Tensor", batch: PaddedBatch | PackedBatch, drops: list[Drop], parts: list) -> "Tensor":
        *projections, out, norm1, up, down, norm2 = parts
        context = batch.attention(projections, x, self.heads, drops[0])
        x = batch.add_norm(norm1, x, batch.product(out, context), drops[1])
        return batch.add_norm(norm2, x, batch.product(down, self._activated(batch, up, x)), drops[2])

    def _drop(self, share: float, layer: int, place: int) -> Drop:
        return Drop(share, [*self.seed, layer, place]) if self.model.training else Drop()

    def _activated(self, batch: PaddedBatch | PackedBatch, up: "nn.Layer", x: "Tensor") -> "Tensor":
        import paddle.nn.functional as functional

        if self.activation == "gelu":
            return batch.gelu(batch.product(up, x))
        return functional.relu(up(x)) if self.activation == "relu" else functional.gelu(up(x), approximate=True)


def sublayer(layer: "nn.Layer", path: str) -> "nn.Layer | None":
    """What a dotted path leads to, numbers being places in lists; None if it leads nowhere."""
    for name in path.split("."):
        layer = layer[int(name)] if name.isdigit() else getattr(layer, name, None)
        if layer is None:
            return None
    return layer
