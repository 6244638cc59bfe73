"""The CPU engine for encoders: a lean encoder stack, exported once, run by Paddle Inference on oneDNN.

BERT, RoBERTa, XLM-RoBERTa and ERNIE are one architecture (post-layer-norm transformer encoders) under
different weight names. Only the stack of layers is exported; the embedding look-up, pooling and
normalisation stay outside, in float32, which is what lets the stack run in bfloat16. Measured against
PaddleNLP's own layers in the same predictor, this stack is 1.5 times as fast in bfloat16: separate
query, key and value products let oneDNN fold the transposes into their strides.
"""

import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from utils import bundled_model, runtime
from utils.checkpoint import Checkpoint
from utils.outputs import take_lock

logger = logging.getLogger(__name__)

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "ernie")
_ACTIVATIONS = ("gelu", "relu", "gelu_new", "gelu_pytorch_tanh")
# Part of the cache's name: raise it when what is exported changes.
_LAYOUT = 1
# Added to attention scores at padding.
_MASKED = -1e4
# Every shape that oneDNN remembers keeps its own copy of the packed weights.
_REMEMBERED_SHAPES = 8

# Our short names to Hugging Face's and to PaddleNLP's. Hugging Face stores linear weights [out, in].
_LAYER_PARTS = {
    "q": ("attention.self.query", "self_attn.q_proj"),
    "k": ("attention.self.key", "self_attn.k_proj"),
    "v": ("attention.self.value", "self_attn.v_proj"),
    "o": ("attention.output.dense", "self_attn.out_proj"),
    "norm1": ("attention.output.LayerNorm", "norm1"),
    "up": ("intermediate.dense", "linear1"),
    "down": ("output.dense", "linear2"),
    "norm2": ("output.LayerNorm", "norm2"),
}
_LINEAR = ("q", "k", "v", "o", "up", "down")
_FLOAT_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}

Parameters = dict[str, np.ndarray]


def supports(model: Checkpoint) -> bool:
    """True for the encoders that this engine can run."""
    config = model.config
    return (
        model.model_type in MODEL_TYPES
        and config.get("hidden_act", "gelu") in _ACTIVATIONS
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("use_task_id", False)
    )


def best_dtype() -> str:
    """bfloat16 where the processor multiplies it natively, else float32."""
    return "bfloat16" if runtime.cpu_has("avx512_bf16") or runtime.cpu_has("amx_bf16") else "float32"


class OneDNNEngine:
    """See ``engines.Engine``; the exported stack is built in the user's cache when it is not there yet."""

    def __init__(self, model: Checkpoint, dtype: str):
        runtime.import_paddle()
        from paddle import inference

        folder = _exported(model)
        self._epsilon = np.float32(json.loads((folder / "stack.json").read_text())["layer_norm_epsilon"])
        self._words = np.load(folder / "words.npy", mmap_mode="r")
        self._positions = np.load(folder / "positions.npy")
        self._gain, self._bias = np.load(folder / "norm.npy")
        config = inference.Config(str(folder / "encoder.json"), str(folder / "encoder.pdiparams"))
        config.disable_gpu()
        config.disable_glog_info()
        config.set_cpu_math_library_num_threads(runtime.cpu_threads())
        config.enable_mkldnn()
        config.set_mkldnn_cache_capacity(_REMEMBERED_SHAPES)
        if dtype == "bfloat16":
            config.enable_mkldnn_bfloat16()
        self._predictor = inference.create_predictor(config)
        self._x, self._mask = (self._predictor.get_input_handle(name) for name in ("x", "mask"))
        self._output = self._predictor.get_output_handle(self._predictor.get_output_names()[0])

    def forward(self, ids: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """See ``engines.Engine``."""
        masked = np.arange(ids.shape[1]) >= lengths[:, None]
        mask = np.where(masked, np.float32(_MASKED), np.float32(0))
        self._x.copy_from_cpu(self._embedded(ids))
        self._mask.copy_from_cpu(np.ascontiguousarray(mask[:, None, None, :]))
        self._predictor.run()
        hidden = self._output.copy_to_cpu()
        return np.matmul(weights[:, None, :], hidden)[:, 0]

    def _embedded(self, ids: np.ndarray) -> np.ndarray:
        """The embedding layer: sum of word, position and type embeddings, layer-normalised; float32 [b, t, h]."""
        x = self._words[ids]
        x += self._positions[: ids.shape[1]]
        x -= x.mean(axis=-1, keepdims=True)
        variance = np.einsum("bth,bth->bt", x, x)[..., None] / np.float32(x.shape[-1])
        x /= np.sqrt(variance + self._epsilon)
        x *= self._gain
        x += self._bias
        return x


def _exported(model: Checkpoint) -> Path:
    """The folder of the exported stack; built once per checkpoint, safe for several processes at once."""
    paddle_version = importlib.metadata.version("paddlepaddle")
    name = f"{model.digest[:32]}-v{_LAYOUT}-paddle{paddle_version}"
    target = bundled_model.cache_root() / "onednn" / name
    if target.is_dir():
        return target
    lock_folder = target.parent / f".{target.name}.lock"
    lock = take_lock(lock_folder, patience_s=float("inf"))
    try:
        if target.is_dir():
            return target
        for stale in target.parent.glob(f".{target.name}.build-*"):
            shutil.rmtree(stale)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.build-", dir=target.parent))
        try:
            _export(model, staging)
            os.rename(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        assert lock is not None
        (lock_folder / "lock").unlink()
        lock_folder.rmdir()
        lock.close()
    return target


def _export(model: Checkpoint, folder: Path) -> None:
    import paddle
    from paddle.static import InputSpec

    paddle.set_device("cpu")
    epsilon = float(model.config.get("layer_norm_eps", model.config.get("layer_norm_epsilon", 1e-12)))
    embeddings, layers = _sorted_out(read_weights(model), stores_torch_layout(model))
    stack = _stack(layers, model.config, epsilon)
    width = model.hidden_size
    static = paddle.jit.to_static(
        stack,
        full_graph=True,
        input_spec=[InputSpec([None, None, width], "float32", "x"), InputSpec([None, 1, 1, None], "float32", "mask")],
    )
    paddle.jit.save(static, str(folder / "encoder"))
    # All texts are of token type 0, so its embedding can be added to the positions' once and for all.
    positions = embeddings["positions"][model.position_offset :].copy()
    if "types" in embeddings:
        positions += embeddings["types"][0]
    np.save(folder / "words.npy", embeddings["words"])
    np.save(folder / "positions.npy", positions)
    np.save(folder / "norm.npy", np.stack([embeddings["gain"], embeddings["bias"]]))
    (folder / "stack.json").write_text(json.dumps({"layer_norm_epsilon": epsilon}))


def _stack(layers: list[dict[str, Parameters]], config: dict, epsilon: float):
    """The encoder layers as a Paddle layer: x float32 [b, t, h], additive mask float32 [b, 1, 1, t]."""
    import paddle
    from paddle import nn
    from paddle.nn import functional

    heads = config["num_attention_heads"]
    head_width = config["hidden_size"] // heads
    kind = config.get("hidden_act", "gelu")

    def activation(x):
        return functional.relu(x) if kind == "relu" else functional.gelu(x, approximate=kind != "gelu")

    class Layer(nn.Layer):
        def __init__(self, parts: dict[str, Parameters]):
            super().__init__()
            for name, part in parts.items():
                # The attention's 1/sqrt(head width) goes into the query projection.
                scale = np.float32(head_width**-0.5 if name == "q" else 1.0)
                shape = part["weight"].shape
                layer = nn.Linear(*shape) if name in _LINEAR else nn.LayerNorm(shape[0], epsilon=epsilon)
                layer.weight.set_value(part["weight"] * scale)
                layer.bias.set_value(part["bias"] * scale)
                setattr(self, name, layer)

        def forward(self, x, mask):
            q, k, v = (
                project(x).reshape([0, 0, heads, head_width]).transpose([0, 2, 1, 3])
                for project in (self.q, self.k, self.v)
            )
            attention = functional.softmax(paddle.matmul(q, k, transpose_y=True) + mask)
            context = paddle.matmul(attention, v).transpose([0, 2, 1, 3]).reshape([0, 0, heads * head_width])
            x = self.norm1(x + self.o(context))
            return self.norm2(x + self.down(activation(self.up(x))))

    class Stack(nn.Layer):
        def __init__(self):
            super().__init__()
            self.layers = nn.LayerList([Layer(parts) for parts in layers])

        def forward(self, x, mask):
            for layer in self.layers:
                x = layer(x, mask)
            return x

    stack = Stack()
    stack.eval()
    return stack


def read_weights(model: Checkpoint) -> Parameters:
    """All weights as float32, by name. Only safetensors are read here; PaddleNLP reads the rest."""
    files = model.weight_files()
    if files[0].suffix != ".safetensors":
        from utils.paddlenlp_models import load_model

        return {name: value.numpy() for name, value in load_model(model, "float32").state_dict().items()}
    import safetensors

    weights = {}
    for path in files:
        for name, entry in safetensors.deserialize(path.read_bytes()):
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] in _FLOAT_TYPES:
                values = np.frombuffer(entry["data"], _FLOAT_TYPES[entry["dtype"]]).astype(np.float32)
            else:
                continue  # position_ids and their like
            weights[name] = values.reshape(entry["shape"])
    return weights


def stores_torch_layout(model: Checkpoint) -> bool:
    """True if ``read_weights`` gives linear weights as PyTorch has them, [out, in], and not as Paddle, [in, out].

    Names do not tell: PaddleNLP names XLM-RoBERTa's weights as Hugging Face does, and transposes them.
    """
    return model.is_torch and model.weight_files()[0].suffix == ".safetensors"  # PaddleNLP reads the others


def _sorted_out(weights: Parameters, torch_layout: bool) -> tuple[Parameters, list[dict[str, Parameters]]]:
    """Embedding tables, and each layer's parts with linear weights [in, out], under our own names."""
    weights = {re.sub(r"^.*?(?=(embeddings|encoder)\.)", "", name, count=1): w for name, w in weights.items()}
    torch_names = any(name.startswith("encoder.layer.") for name in weights)
    root = "encoder.layer." if torch_names else "encoder.layers."

    def take(name: str) -> np.ndarray:
        if name not in weights:
            raise ValueError(f"the checkpoint lacks the weight {name}; expected a BERT-like encoder")
        return weights[name]

    def part(number: int, name: str) -> Parameters:
        full = f"{root}{number}.{_LAYER_PARTS[name][0 if torch_names else 1]}"
        weight = take(f"{full}.weight")
        transposed = torch_layout and name in _LINEAR
        return {"weight": weight.T if transposed else weight, "bias": take(f"{full}.bias")}

    numbers = {int(name[len(root) :].split(".")[0]) for name in weights if name.startswith(root)}
    layers = [{name: part(number, name) for name in _LAYER_PARTS} for number in range(len(numbers))]
    norm = "LayerNorm" if "embeddings.LayerNorm.weight" in weights else "layer_norm"
    embeddings = {
        "words": take("embeddings.word_embeddings.weight"),
        "positions": take("embeddings.position_embeddings.weight"),
        "gain": take(f"embeddings.{norm}.weight"),
        "bias": take(f"embeddings.{norm}.bias"),
    }
    if "embeddings.token_type_embeddings.weight" in weights:
        embeddings["types"] = weights["embeddings.token_type_embeddings.weight"]
    return embeddings, layers
