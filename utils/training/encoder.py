"""A checkpoint in memory as a trainable encoder: token ids to pooled vectors, with gradients.

The parameters live in PaddleNLP's model, so that it saves and loads them. BERT-like encoders are computed
by a lean forward pass over those same parameters; every other model by PaddleNLP's own.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..encoding import cpu_engine, engines
from ..encoding.encoder import pooling_weights
from ..kernels import onednn as matmul
from ..models import loading as weights
from ..models.checkpoint import Checkpoint
from ..models.paddlenlp import first_output
from ..process import runtime
from .layers.forward import LeanForward, PackedBatch, PaddedBatch, sublayer

if TYPE_CHECKING:
    from paddle import Tensor, nn

# What PaddleNLP's configurations call the shares of dropout: of encoders, GPT and OPT, and of others. In some models
# PaddleNLP drops nothing, whatever their configuration says.
_USUAL_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_DROPOUT = {
    "qwen2": ("attention_dropout",), "qwen3": ("attention_dropout",), "gemma": ("attention_dropout",),
    "bloom": ("hidden_dropout", "attention_dropout"), "llama": (), "mistral": (),
}  # fmt: skip

# The linear sublayers that adapters go into, by the ends of their names in PaddleNLP's models.
_ADAPTED = (
    r".*q_proj", r".*k_proj", r".*v_proj", r".*out_proj", r".*o_proj", r"linear1", r"linear2",
    r".*self\.(query|key|value)", r".*dense", r"mlp\.(gate|up|down)_proj",
)  # fmt: skip


def multiplies_bfloat16(checkpoint: Checkpoint) -> bool:
    """True if ``TrainableEncoder(bfloat16=True)`` is for this checkpoint, and faster on this processor."""
    return engines.device() == "cpu" and cpu_engine.supports(checkpoint) and matmul.bfloat16_is_fast()


def shares_of_dropout(checkpoint: Checkpoint, dropout: float | None) -> dict[str, float]:
    """What the checkpoint's configuration must say for that share of dropout; nothing for None.

    Raises:
        ValueError: there is no dropout in such a model.
    """
    names = _DROPOUT.get(checkpoint.model_type, _USUAL_DROPOUT)
    if dropout and not names:
        raise ValueError(f"dropout is {dropout}; PaddleNLP has none in {checkpoint.model_type} models, so leave it out")
    return {} if dropout is None else dict.fromkeys(names, dropout)


class TrainableEncoder:
    """PaddleNLP's model of a checkpoint, in float32, and how to embed with it.

    Args:
        pooling: ``cls``, ``mean`` or ``last``.
        recompute: recompute activations in the backward pass.
        lora: rank and alpha of low-rank adapters, which then are all that is trained.
        dropout: instead of the checkpoint's own shares.
        bfloat16: on a CPU, round what linear layers multiply, and attention too where nothing is dropped; see
            ``multiplies_bfloat16``.
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
        shares = shares_of_dropout(checkpoint, dropout)
        extra, checkpoint = extra | shares, replace(checkpoint, config=checkpoint.config | shares)
        self.model = weights.load_model(checkpoint, **extra)
        if lora is not None:
            self.model = _with_adapters(self.model, checkpoint, *lora)
        self._lean = LeanForward(self.model, checkpoint) if cpu_engine.supports(checkpoint) else None

    def freeze(self, layers: int = 0) -> None:
        """Train neither the word embeddings nor, if ``layers`` is not 0, any embeddings and that many lowest layers,
        of which the model must have more.
        """
        from paddle import nn

        frozen = [self.model.get_input_embeddings()]
        if layers:
            n_layers = self.checkpoint.config["num_hidden_layers"]
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

        Raises:
            ValueError: an id that the model does not know.
        """
        import paddle

        self.checkpoint.check_ids(int(ids.max()))
        shares = pooling_weights(lengths, ids.shape[1], self.pooling)
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        if self._lean is not None and engines.device() == "cpu":
            packed = np.zeros((len(ids), int(mask.sum())), np.float32)
            packed[np.nonzero(mask)[0], np.arange(packed.shape[1])] = shares[mask]
            return paddle.matmul(
                paddle.to_tensor(packed), self._lean(PackedBatch(ids, mask, self.bfloat16), self.recompute)
            )
        if self._lean is not None:
            hidden = self._lean(PaddedBatch(ids, mask), self.recompute)
        else:
            if self.recompute:
                self.model.apply(_turn_recompute_on)
            output = self.model(paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask.astype(np.int64)))
            hidden = first_output(output)
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
                scaling = sublayer(model, path.removesuffix(".")).scaling
                value = value + state[path + "lora_A"].matmul(state[path + "lora_B"]) * scaling
            merged[name] = value
    return merged


class TrainableEngine:
    """A trainable encoder behind ``engines.Engine`` and its lazy form, so that ``encoder.Encoder`` runs on it."""

    name = "training"

    threads = 1

    def __init__(self, encoder: TrainableEncoder):
        self._encoder = encoder
        self.batch_tokens = engines.batch_tokens()

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
