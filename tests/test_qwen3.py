"""Our Qwen3 against a decoder spelt out in float64, and through training, export and adapters."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, make_tiny_bert, write_jsonl
from safetensors.numpy import load_file, save_file

from utils.arguments.scripts import ModelArguments, build
from utils.arguments.training import training_arguments
from utils.encoding.embed import build_encoders
from utils.encoding.engines import PaddleEngine
from utils.models import checkpoint
from utils.training import job

HIDDEN, INNER, LAYERS, HEADS, GROUPS, WIDTH, THETA, EPSILON = 32, 48, 2, 4, 2, 12, 1e6, 1e-6
TEXTS = ["my old card is lost", "how do i open the list", "train"]


def _weights(rng: np.random.Generator, n_words: int, bias: bool) -> dict[str, np.ndarray]:
    """Under transformers' names, linear weights [out, in]."""
    shapes = {"embed_tokens.weight": (n_words, HIDDEN), "norm.weight": (HIDDEN,)}
    linear = {
        "self_attn.q_proj": (HEADS * WIDTH, HIDDEN), "self_attn.k_proj": (GROUPS * WIDTH, HIDDEN),
        "self_attn.v_proj": (GROUPS * WIDTH, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN} | dict.fromkeys(
        ("self_attn.q_norm", "self_attn.k_norm"), WIDTH
    )
    for layer in range(LAYERS):
        for name, shape in linear.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            if bias and "self_attn" in name:
                shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        shapes |= {f"layers.{layer}.{name}.weight": (width,) for name, width in norms.items()}
    weights = {name: rng.normal(0, 0.25, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: w + 1 if "norm" in name else w for name, w in weights.items()}


def _decoded(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """States of one text, float64 [t, hidden]."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    t = len(ids)
    angles = np.outer(np.arange(t), THETA ** (-np.arange(0, WIDTH, 2) / WIDTH))
    turn = np.exp(1j * angles)[None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(t, -1, WIDTH).swapaxes(0, 1)

    def rotated(x: np.ndarray) -> np.ndarray:
        turned = (x[..., : WIDTH // 2] + 1j * x[..., WIDTH // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = w["embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        root = f"layers.{layer}."
        y = norm(x, root + "input_layernorm")
        q, k = (rotated(norm(heads(linear(y, f"{root}self_attn.{n}_proj")), f"{root}self_attn.{n}_norm")) for n in "qk")
        v = heads(linear(y, f"{root}self_attn.v_proj"))
        k, v = (np.repeat(z, HEADS // GROUPS, axis=0) for z in (k, v))
        scores = np.where(np.tri(t, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(WIDTH), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        context = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + linear(context.swapaxes(0, 1).reshape(t, -1), f"{root}self_attn.o_proj")
        y = norm(x, f"{root}post_attention_layernorm")
        gate = linear(y, f"{root}mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{root}mlp.up_proj"), f"{root}mlp.down_proj")
    return norm(x, "norm")


@pytest.fixture
def qwen3(tmp_path):
    """Writes a checkpoint with random weights; gives its folder."""

    def make(bias: bool = False, prefix: str = "", **changes) -> str:
        folder = Path(make_tiny_bert(tmp_path / "qwen3"))
        n_words = len((folder / "vocab.txt").read_text().splitlines())
        config = {
            "model_type": "qwen3", "architectures": ["Qwen3Model"], "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
            "head_dim": WIDTH, "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
            "rms_norm_eps": EPSILON, "attention_bias": bias, "vocab_size": n_words, "hidden_act": "silu",
            "max_position_embeddings": 128,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | changes))
        weights = _weights(np.random.default_rng(0), n_words, bias)
        save_file({prefix + name: w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return make


@pytest.mark.parametrize(("bias", "prefix"), [(False, ""), (True, "model.")])
def test_states_are_those_of_a_decoder_spelt_out(qwen3, bias, prefix):
    folder = qwen3(bias, prefix)
    model = checkpoint.resolve(folder)
    assert model.pooling == "last"
    weights = {name.removeprefix(prefix): w for name, w in load_file(Path(folder) / "model.safetensors").items()}
    ids, lengths = np.random.default_rng(1).integers(4, 40, (3, 11)), np.array([11, 4, 7])
    last = (np.arange(11) == lengths[:, None] - 1).astype(np.float32)
    found = PaddleEngine(model, "float32", "cpu").forward(ids, lengths, last)
    for row, own, length in zip(found, ids, lengths, strict=True):
        np.testing.assert_allclose(row, _decoded(weights, own[:length])[-1], atol=2e-5)


def _vectors(folder) -> np.ndarray:
    query, passage = build_encoders(build(ModelArguments, model_path=str(folder), dtype="float32"))
    return np.concatenate([query.encode(TEXTS), passage.encode(TEXTS)])


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"recompute": True, "freeze_layers": 1}])
def test_it_is_trained_and_exported(qwen3, tmp_path, options):
    base, rows = qwen3(), make_rows(24)
    write_jsonl(tmp_path / "train.json", rows)
    given = {
        "model_name_or_path": base, "dataset_name_or_path": str(tmp_path / "train.json"), "max_steps": 4,
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "evaluation_strategy": "no", "save_strategy": "no", "report_to": "none", "export_format": "huggingface",
    }  # fmt: skip
    job.train(build(training_arguments(), **given | options))
    trained = _vectors(tmp_path / "out")
    assert np.abs(trained - _vectors(base)).max() > 1e-3
    np.testing.assert_allclose(_vectors(tmp_path / "out" / "huggingface"), trained, atol=1e-6)
    exported = load_file(tmp_path / "out" / "huggingface" / "model.safetensors")
    before = load_file(Path(base) / "model.safetensors")
    assert {name: w.shape for name, w in exported.items()} == {name: w.shape for name, w in before.items()}
    frozen = "layers.0.self_attn.q_proj.weight"
    assert np.array_equal(exported[frozen], before[frozen]) == ("freeze_layers" in options)


def test_recomputing_changes_no_gradient(qwen3):
    from utils.training.encoder import TrainableEncoder

    ids, lengths = np.random.default_rng(1).integers(4, 40, (3, 11)), np.array([11, 4, 7])
    model, gradients = checkpoint.resolve(qwen3()), []
    for recompute in (False, True):
        encoder = TrainableEncoder(model, "last", recompute)
        encoder.model.train()
        encoder.embed(ids, lengths).square().sum().backward()
        gradients.append({name: p.grad.numpy() for name, p in encoder.model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and len(plain) == len(dict(encoder.model.named_parameters()))
    for name, gradient in plain.items():
        np.testing.assert_allclose(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_what_a_configuration_leaves_out_is_as_transformers_has_it(qwen3):
    """Its Qwen3Config of version 5: positions are rotated by 10,000, and a head is 128 wide whatever hidden_size is."""
    path = Path(
        qwen3(rope_parameters=None, rope_theta=10000.0, rms_norm_eps=1e-6, attention_dropout=0.0), "config.json"
    )
    explicit, config = _vectors(path.parent), json.loads(path.read_text())
    for name in ("rope_theta", "rms_norm_eps", "attention_bias", "attention_dropout"):
        del config[name]
    path.write_text(json.dumps(config))
    np.testing.assert_array_equal(_vectors(path.parent), explicit)
    path.write_text(json.dumps(config | {"head_dim": None}))
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \[32, 48\]; expected \[32, 512\]"):
        _vectors(path.parent)
