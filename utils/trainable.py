"""A checkpoint in memory as a trainable encoder: token ids to pooled vectors, with gradients.

The parameters live in PaddleNLP's model, so that it saves and loads them. BERT-like encoders are computed
by a lean forward pass over those same parameters; every other model by PaddleNLP's own.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from utils import cpu_layers, engines, matmul, onednn, runtime, weights
from utils.bert_names import LAYER_PARTS
from utils.checkpoint import Checkpoint
from utils.cpu_layers import Drop
from utils.encoder import pooling_weights

if TYPE_CHECKING:
    from paddle import Tensor, nn

    # What a linear layer makes of its input, and its bias if that is still to be added.
    Product = tuple[Tensor, Tensor | None]

logger = logging.getLogger(__name__)

# Added to attention scores at padding.
_MASKED = -1e4
# What configurations call the shares of dropout in an encoder and in a decoder.
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob"), ("attention_dropout",)

# The linear sublayers that adapters go into, by the ends of their names in PaddleNLP's models.
_ADAPTED = (
    r".*q_proj", r".*k_proj", r".*v_proj", r".*out_proj", r".*o_proj", r"linear1", r"linear2",
    r".*self\.(query|key|value)", r".*dense", r"mlp\.(gate|up|down)_proj",
)  # fmt: skip


def can_multiply_in_bfloat16(checkpoint: Checkpoint) -> bool:
    """True if ``TrainableEncoder(bfloat16=True)`` is for this checkpoint, and faster on this processor."""
    return engines.device() == "cpu" and onednn.supports(checkpoint) and matmul.bfloat16_is_fast()


class TrainableEncoder:
    """PaddleNLP's model of a checkpoint, in float32, and how to embed with it.

    Args:
        pooling: ``cls``, ``mean`` or ``last``.
        recompute: recompute activations in the backward pass.
        lora: rank and alpha of low-rank adapters, which then are all that is trained.
        dropout: instead of the checkpoint's own shares.
        bfloat16: multiply in bfloat16 on the CPU; see ``can_multiply_in_bfloat16``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pooling: str,
        recompute: bool = False,
        flash_attention: bool = False,
        lora: tuple[int, int] | None = None,
        dropout: float | None = None,
        bfloat16: bool = False,
    ):
        self.checkpoint, self.pooling, self.recompute = checkpoint, pooling, recompute
        self.bfloat16 = bfloat16
        paddle = runtime.import_paddle()
        paddle.set_device(engines.device())
        if engines.device() == "cpu":
            # Transposes as views are copied element by element when they are used: five times as slow.
            paddle.set_flags({"FLAGS_use_stride_kernel": False})
        extra = {"use_flash_attention": True} if flash_attention and checkpoint.is_decoder else {}
        if dropout is not None:
            shares = dict.fromkeys(_DROPOUT[checkpoint.is_decoder], dropout)
            extra, checkpoint = extra | shares, replace(checkpoint, config=checkpoint.config | shares)
        self.model = weights.load_model(checkpoint, **extra)
        if lora is not None:
            self.model = _with_adapters(self.model, checkpoint, *lora)
        self._lean = _LeanForward(self.model, checkpoint) if onednn.supports(checkpoint) else None

    def freeze(self, layers: int = 0) -> None:
        """Train neither the word embeddings nor, if ``layers`` is not 0, any embeddings and that many lowest layers.

        Raises:
            ValueError: the model has no more layers than that.
        """
        from paddle import nn

        n_layers = self.checkpoint.config["num_hidden_layers"]
        if layers >= n_layers:
            raise ValueError(f"freeze_layers is {layers}; {self.checkpoint.folder} has only {n_layers} layers to train")
        frozen = [self.model.get_input_embeddings()]
        if layers:
            stacks = (s for s in self.model.sublayers() if isinstance(s, nn.LayerList) and len(s) == n_layers)
            frozen += [*next(stacks)[:layers], getattr(self.model, "embeddings", frozen[0])]
        for layer in frozen:
            for parameter in layer.parameters():
                parameter.stop_gradient = True

    def seed_dropout(self, seed: int, step: int, position: int, side: int) -> None:
        """Settle what the next forward pass draws.

        The seed is a function of where in the training the pass stands, and not of what ran before it. So a
        pass can be replayed (gradient cache), and a resumed run draws what an unbroken one would have drawn.
        """
        import paddle

        words = np.random.SeedSequence([seed, step, position, side]).generate_state(2)
        paddle.seed(int(words[0]) << 20 ^ int(words[1]))
        if self._lean is not None:
            self._lean.seed = words.tolist()

    def embed(self, ids: np.ndarray, lengths: np.ndarray) -> "Tensor":
        """Pooled vectors, not normalised, float32 [b, hidden].

        Args:
            ids: int64 [b, t], padded to the right.
            lengths: int64 [b], the tokens that are no padding.
        """
        import paddle

        shares = pooling_weights(lengths, ids.shape[1], self.pooling)
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        if self._lean is not None and engines.device() == "cpu":
            packed = np.zeros((len(ids), int(mask.sum())), np.float32)
            packed[np.nonzero(mask)[0], np.arange(packed.shape[1])] = shares[mask]
            return paddle.matmul(
                paddle.to_tensor(packed), self._lean(_Packed(ids, mask, self.bfloat16), self.recompute)
            )
        if self._lean is not None:
            hidden = self._lean(_Padded(ids, mask), self.recompute)
        else:
            if self.recompute:
                self.model.apply(_turn_recompute_on)
            output = self.model(paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask.astype(np.int64)))
            hidden = output[0] if isinstance(output, list | tuple) else output
        return paddle.bmm(paddle.to_tensor(shares).unsqueeze(1), hidden.astype("float32")).squeeze(1)


def _turn_recompute_on(layer: "nn.Layer") -> None:
    """PaddleNLP's own switch."""
    if hasattr(layer, "enable_recompute"):
        layer.enable_recompute = True


def _with_adapters(model: "nn.Layer", checkpoint: Checkpoint, rank: int, alpha: int) -> "nn.Layer":
    """The model with low-rank adapters (Hu et al., 2021) in the linear sublayers of its layers; all else is frozen."""
    from paddlenlp.peft import LoRAConfig, LoRAModel

    paths = r".*layers?\.\d+\."
    config = LoRAConfig(
        target_modules=[paths + name for name in _ADAPTED], r=rank, lora_alpha=alpha, merge_weights=False
    )
    adapted = LoRAModel(model, config)
    adapted.mark_only_lora_as_trainable()
    if not any("lora_" in name for name, _ in adapted.named_parameters()):
        raise ValueError(f"{checkpoint.folder}: no layers that adapters go into were found in {type(model).__name__}")
    return model


def merged_state(model: "nn.Layer") -> dict[str, "Tensor"]:
    """The model's weights, adapters merged in, under the names that the model has without them."""
    import paddle

    state = model.state_dict()
    merged = {}
    with paddle.no_grad():
        for name, value in state.items():
            path = name.removesuffix("weight")
            if ".lora_" in name:
                continue
            if path + "lora_A" in state:
                scaling = _sublayer(model, path.removesuffix(".")).scaling
                value = value + state[path + "lora_A"].matmul(state[path + "lora_B"]) * scaling
            merged[name] = value
    return merged


def padded(tokens: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as ids int64 [b, t], padded to the right, and lengths int64 [b]."""
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    ids = np.full((len(tokens), int(lengths.max())), pad_id, np.int64)
    for row, own in zip(ids, tokens, strict=True):
        row[: len(own)] = own
    return ids, lengths


class TrainableEngine:
    """A trainable encoder behind ``engines.Engine`` and its lazy form, so that ``encoder.Encoder`` runs on it."""

    name = "training"

    threads = 1

    def __init__(self, encoder: TrainableEncoder):
        self._encoder = encoder
        self.batch_tokens = 65536 if engines.device() == "gpu" else 2048

    def description(self) -> dict:
        """What of the engine the vectors depend on."""
        return {
            "engine": self.name,
            "device": engines.device(),
            "dtype": "bfloat16" if self._encoder.bfloat16 else "float32",
        }

    def loaded(self) -> "TrainableEngine":
        """The engine itself."""
        return self

    def forward(self, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """See ``engines.Engine``; ``weights`` are the encoder's own pooling."""
        import paddle

        model = self._encoder.model
        was_training = model.training
        model.eval()
        try:
            with paddle.no_grad():
                return self._encoder.embed(ids, lengths).numpy()
        finally:
            if was_training:
                model.train()


class _Padded:
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


class _Packed:
    """A batch as a CPU likes it: texts one after another, ids [tokens]. The same operations by ``cpu_layers``."""

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

        return (cpu_layers.linear if self._bfloat16 else paddle.matmul)(x, weight)

    def attention(self, projections: list["nn.Layer"], x: "Tensor", heads: int, drop: Drop) -> "Tensor":
        import paddle

        if all(type(layer) is paddle.nn.Linear and layer.bias is not None for layer in projections):
            # One product, and one of its gradients, take less time than three of a third, and their sum.
            weight = paddle.concat([layer.weight for layer in projections], axis=1)
            qkv, bias = self._multiply(x, weight), paddle.concat([layer.bias for layer in projections])
        else:
            qkv, bias = paddle.concat([layer(x) for layer in projections], axis=1), None
        return cpu_layers.attention(qkv, bias, self._lengths, heads, drop, self._bfloat16)

    def add_norm(self, norm: "nn.Layer", x: "Tensor", product: "Product", drop: Drop) -> "Tensor":
        return cpu_layers.add_norm(x, *product, norm.weight, norm.bias, norm._epsilon, drop)

    def gelu(self, product: "Product") -> "Tensor":
        return cpu_layers.gelu(*product)

    def dropout(self, x: "Tensor", drop: Drop) -> "Tensor":
        return cpu_layers.dropout(x, drop)


class _LeanForward:
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
        family = next(names for names in families if _sublayer(layers[0], names[0]) is not None)
        self.layers = [[_sublayer(layer, name) for name in family] for layer in layers]
        self.norm = getattr(model.embeddings, "layer_norm", None) or model.embeddings.LayerNorm
        # With a place in the model, settles what dropout draws there (packed batches).
        self.seed: list[int] = [0]

    def __call__(self, batch: _Padded | _Packed, recompute: bool) -> "Tensor":
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

    def _embedded(self, batch: _Padded | _Packed) -> "Tensor":
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

    def _layer(self, x: "Tensor", batch: _Padded | _Packed, drops: list[Drop], parts: list) -> "Tensor":
        *projections, out, norm1, up, down, norm2 = parts
        context = batch.attention(projections, x, self.heads, drops[0])
        x = batch.add_norm(norm1, x, batch.product(out, context), drops[1])
        return batch.add_norm(norm2, x, batch.product(down, self._activated(batch, up, x)), drops[2])

    def _drop(self, share: float, layer: int, place: int) -> Drop:
        return Drop(share, [*self.seed, layer, place]) if self.model.training else Drop()

    def _activated(self, batch: _Padded | _Packed, up: "nn.Layer", x: "Tensor") -> "Tensor":
        import paddle.nn.functional as functional

        if self.activation == "gelu":
            return batch.gelu(batch.product(up, x))
        return functional.relu(up(x)) if self.activation == "relu" else functional.gelu(up(x), approximate=True)


def _sublayer(layer: "nn.Layer", path: str) -> "nn.Layer | None":
    for name in path.split("."):
        layer = layer[int(name)] if name.isdigit() else getattr(layer, name, None)
        if layer is None:
            return None
    return layer
