"""The CPU engine against a transformer encoder spelt out in float64."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from utils.encoding import cpu_engine
from utils.kernels import onednn as matmul
from utils.models import checkpoint
from utils.models.weight_files import read_weights
from utils.process import runtime

HEADS, INNER, LAYERS, WORDS, POSITIONS = 3, 40, 2, 60, 150
# Two widths, since heads of 32 take another path where the processor has AMX.
NARROW, WIDE = HEADS * 8, HEADS * 32
EPSILON = 1e-5


def write_safetensors(path, weights: dict[str, np.ndarray]) -> None:
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in weights.items():
        blob = values.tobytes()
        offsets = [len(data), len(data) + len(blob)]
        header[name] = {"dtype": kinds[values.dtype.name], "shape": list(values.shape), "data_offsets": offsets}
        data += blob
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def random_weights(rng: np.random.Generator, hidden: int) -> dict[str, np.ndarray]:
    """A BERT under Hugging Face's names, with linear weights [out, in]."""
    shapes = {
        "embeddings.word_embeddings.weight": (WORDS, hidden),
        "embeddings.position_embeddings.weight": (POSITIONS, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        root = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{root}{name}.weight": (hidden, hidden), f"{root}{name}.bias": (hidden,)}
        shapes |= {f"{root}intermediate.dense.weight": (INNER, hidden), f"{root}intermediate.dense.bias": (INNER,)}
        shapes |= {f"{root}output.dense.weight": (hidden, INNER), f"{root}output.dense.bias": (hidden,)}
        norms += [f"{root}attention.output.LayerNorm", f"{root}output.LayerNorm"]
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) * (1.5 / hidden**0.5) for name, shape in shapes.items()
    }
    for norm in norms:
        weights[f"{norm}.weight"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        weights[f"{norm}.bias"] = rng.standard_normal(hidden).astype(np.float32) * 0.1
    return weights


def activation(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def encoded(weights: dict[str, np.ndarray], kind: str, ids: np.ndarray) -> np.ndarray:
    """The last layer's output for one text without padding, float64 [t, hidden]."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    hidden = w["embeddings.word_embeddings.weight"].shape[1]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    words, positions, types = (w[f"embeddings.{table}.weight"] for table in tables)
    x = norm(words[ids] + positions[: len(ids)] + types[0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        root = f"encoder.layer.{layer}."
        q, k, v = (
            linear(x, f"{root}attention.self.{part}").reshape(len(ids), HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(hidden // HEADS))
        context = (scores / scores.sum(-1, keepdims=True)) @ v
        context = context.swapaxes(0, 1).reshape(len(ids), hidden)
        x = norm(x + linear(context, f"{root}attention.output.dense"), f"{root}attention.output.LayerNorm")
        inner = activation(kind, linear(x, f"{root}intermediate.dense"))
        x = norm(x + linear(inner, f"{root}output.dense"), f"{root}output.LayerNorm")
    return x


@pytest.fixture
def model(tmp_path):
    """Writes a checkpoint with random weights; gives it and the weights."""

    def make(kind: str = "gelu", hidden: int = NARROW, **stored):
        weights = random_weights(np.random.default_rng(0), hidden)
        config = {
            "model_type": "bert", "hidden_size": hidden, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
            "intermediate_size": INNER, "vocab_size": WORDS, "max_position_embeddings": POSITIONS,
            "hidden_act": kind, "layer_norm_eps": EPSILON, "type_vocab_size": 2,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_text("{}")
        write_safetensors(tmp_path / "model.safetensors", {f"bert.{name}": w for name, w in weights.items()} | stored)
        return checkpoint.resolve(str(tmp_path), None), weights

    return make


def a_batch(lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Padded ids, lengths and mean pooling."""
    width = -(-max(lengths) // 8) * 8
    ids = np.random.default_rng(1).integers(1, WORDS, (len(lengths), width))
    inside = np.arange(width) < np.array(lengths)[:, None]
    return ids * inside, np.array(lengths), (inside / np.array(lengths)[:, None]).astype(np.float32)


needs_onednn = pytest.mark.skipif(not matmul.is_usable(), reason="oneDNN's C interface is not there")
dtypes = ["float32"] + ["bfloat16"] * matmul.bfloat16_is_fast()


@needs_onednn
@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("kind", ["gelu", "relu", "gelu_new"])
@pytest.mark.parametrize("hidden", [NARROW, WIDE])
def test_vectors_are_those_of_an_encoder_spelt_out(model, hidden, kind, dtype):
    given, weights = model(kind, hidden, **{"embeddings.position_ids": np.arange(4)})
    ids, lengths, pooling = a_batch([5, 1, 17, 64, 130, 90, 2] + [33] * 40)
    vectors = cpu_engine.OneDNNEngine(given, dtype).forward(ids, lengths, pooling)
    expected = np.stack([encoded(weights, kind, row[:n]).mean(0) for row, n in zip(ids, lengths, strict=True)])
    if dtype == "float32":
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    else:
        cosines = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() > 0.999


@needs_onednn
@pytest.mark.skipif(not runtime.cpu_has("avx512f"), reason="oneDNN's other products round by the number of rows")
@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("hidden", [NARROW, WIDE])
def test_a_text_has_the_same_bits_in_any_batch(model, hidden, dtype):
    engine = cpu_engine.OneDNNEngine(model(hidden=hidden)[0], dtype)
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 145, 60)
    ids, _, pooling = a_batch([*lengths, 144])
    together = engine.forward(ids[:-1], lengths, pooling[:-1])
    for size in (1, 1, 2, 3, 7, 20):
        rows = rng.permutation(len(lengths))[:size]
        width = -(-lengths[rows].max() // 8) * 8
        alone = engine.forward(ids[rows, :width], lengths[rows], pooling[rows, :width])
        np.testing.assert_array_equal(alone, together[rows])


@needs_onednn
@pytest.mark.parametrize("dtype", dtypes)
def test_calls_side_by_side_give_the_same_bits(model, dtype):
    engine = cpu_engine.OneDNNEngine(model(hidden=WIDE)[0], dtype)
    batch = a_batch([20] * 30 + [7])
    alone = engine.forward(*batch)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(lambda _: engine.forward(*batch), range(8)):
            np.testing.assert_array_equal(vectors, alone)


@needs_onednn
@pytest.mark.parametrize(
    ("config", "lost", "message"),
    [
        ({}, "layer.1.attention", "lacks the weight encoder.layer.1.attention"),
        ({"num_hidden_layers": LAYERS + 1}, None, f"lacks the weight encoder.layer.{LAYERS}."),
        ({"hidden_size": NARROW + HEADS}, None, "the embeddings of words are"),
        ({"vocab_size": WORDS + 1}, None, "the embeddings of words are"),
        ({"max_position_embeddings": POSITIONS + 1}, None, "the embeddings of positions are"),
        ({"intermediate_size": INNER + 1}, None, "layer 0, up: the weight is"),
        ({"num_attention_heads": NARROW + 1}, None, "heads do not divide"),
        ({"num_hidden_layers": 0}, None, "num_hidden_layers is 0"),
        ({"hidden_size": True}, None, "hidden_size is True"),
        ({"hidden_act": [1]}, None, "hidden_act is [1]"),
    ],
)
def test_weights_that_are_not_what_the_configuration_says_are_refused(model, config, lost, message):
    given, weights = model()
    path = given.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    kept = {name: w for name, w in weights.items() if lost is None or lost not in name}
    write_safetensors(given.folder / "model.safetensors", kept)
    with pytest.raises(ValueError) as caught:
        cpu_engine.OneDNNEngine(checkpoint.resolve(str(given.folder)), "float32")
    assert message in str(caught.value) and str(given.folder) in str(caught.value)


@needs_onednn
def test_sizes_that_the_configuration_leaves_out_are_the_weights(model):
    given, _ = model()
    path, batch = given.folder / "config.json", a_batch([5, 9])
    expected = cpu_engine.OneDNNEngine(given, "float32").forward(*batch)
    config = json.loads(path.read_text())
    del config["num_hidden_layers"], config["intermediate_size"]
    path.write_text(json.dumps(config))
    found = cpu_engine.OneDNNEngine(checkpoint.resolve(str(given.folder)), "float32").forward(*batch)
    np.testing.assert_array_equal(found, expected)


def test_a_lost_shard_is_named(model):
    given, _ = model()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (given.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: not there"):
        checkpoint.resolve(str(given.folder))


def test_weights_of_every_type_are_read(model):
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    brain = np.array([0x3F80, 0xC040, 0x0000], np.uint16)
    given, weights = model(half=half, brain=brain)
    read = read_weights(given)
    np.testing.assert_array_equal(read["half"], half.astype(np.float32))
    assert read["brain"].tolist() == [1.0, -3.0, 0.0]
    name = "embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(read[f"bert.{name}"], weights[name])


@pytest.mark.parametrize("damage", ["short", "empty", "header", "no header"])
def test_a_damaged_file_is_named(model, damage):
    given, _ = model()
    path = given.folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({
        "short": whole[:-100], "empty": b"", "header": whole[:8] + b"{" * 50 + whole[58:], "no header": whole[:100],
    }[damage])  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_weights(given)
