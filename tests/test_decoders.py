"""Decoders that PaddleNLP has, with random weights."""

import json

import numpy as np
import pytest
from conftest import write_jsonl

from utils.arguments.fields import build
from utils.arguments.training import training_arguments
from utils.encoding.engines import PaddleEngine
from utils.models import checkpoint, loading, paddlenlp
from utils.training import job
from utils.training.encoder import TrainableEncoder

ARCHITECTURES = {
    "qwen2": "Qwen2Model", "qwen3": "Qwen3Model", "llama": "LlamaModel", "mistral": "MistralModel",
    "gemma": "GemmaModel", "gpt": "GPTModel", "opt": "OPTModel", "bloom": "BloomModel",
}  # fmt: skip
CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "head_dim": 8, "rope_theta": 10000.0,
}  # fmt: skip
OF_KIND = {
    "mistral": {"sliding_window": None},
    "opt": {"word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
}
IDS, LENGTHS = np.random.default_rng(0).integers(4, 60, (3, 9)), np.array([9, 5, 7])


@pytest.fixture
def decoder(tmp_path):
    """A function that writes a decoder's folder."""

    def make(kind: str) -> checkpoint.Checkpoint:
        import paddle

        config = CONFIG | {"model_type": kind, "architectures": [ARCHITECTURES[kind]]} | OF_KIND.get(kind, {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "vocab.txt").write_text("a\n")
        kept = tmp_path / "model_state.pdparams"
        kept.touch()
        rng, fresh = np.random.default_rng(0), paddlenlp.new_model(checkpoint.resolve(str(tmp_path)), "float32")
        # BLOOM's fresh weights are 0.
        state = {name: w.numpy() + 0.2 * rng.normal(size=w.shape) for name, w in fresh.state_dict().items()}
        paddle.save({name: paddle.to_tensor(w, "float32") for name, w in state.items()}, str(kept))
        return checkpoint.resolve(str(tmp_path))

    return make


@pytest.mark.parametrize("kind", ["gpt", "opt", "bloom"])
def test_a_decoders_text_is_its_last_tokens_state(decoder, kind):
    import paddle

    model = decoder(kind)
    assert model.pooling == "last"
    engine = PaddleEngine(model, "float32", "cpu")
    last = (np.arange(IDS.shape[1]) == LENGTHS[:, None] - 1).astype(np.float32)
    alone = loading.load_model(model)
    alone.eval()
    for row, own, length in zip(engine.forward(IDS, LENGTHS, last), IDS, LENGTHS, strict=True):
        output = alone(paddle.to_tensor(own[None, :length]))
        hidden = output[0] if isinstance(output, list | tuple) else output
        np.testing.assert_allclose(row, hidden.numpy()[0, -1], atol=2e-5)
    same_start = np.array([[5, 9, 11], [5, 20, 31]])
    one, other = engine.forward(same_start, np.array([3, 3]), np.array([[0, 0, 1], [0, 0, 1]], np.float32))
    assert np.abs(one - other).max() > 1e-2


def test_bloom_freezes_its_word_embeddings_whatever_its_layers_are_called(decoder, tmp_path):
    model = decoder("bloom")
    config = {name: value for name, value in model.config.items() if name != "num_hidden_layers"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = TrainableEncoder(checkpoint.resolve(str(tmp_path)), "last")
    encoder.freeze()
    frozen = [name for name, parameter in encoder.model.named_parameters() if parameter.stop_gradient]
    assert frozen == ["word_embeddings.weight"]


def drawn(encoder: TrainableEncoder) -> list[np.ndarray]:
    """The same tokens under two seeds of dropout."""
    encoder.model.train()
    found = []
    for step in (1, 2):
        encoder.seed_dropout(0, step, 0, 0)
        found.append(encoder.embed(IDS, LENGTHS).numpy())
    return found


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma", "gpt", "opt", "bloom"])
def test_a_decoder_drops_what_it_is_told_to(decoder, kind):
    model = decoder(kind)
    one, other = drawn(TrainableEncoder(model, "last", dropout=0.5))
    assert np.abs(one - other).max() > 1e-3
    one, other = drawn(TrainableEncoder(model, "last", dropout=0.0))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_dropout_where_there_is_none_is_refused_before_the_model_is_loaded(decoder, kind, tmp_path, monkeypatch):
    model = decoder(kind)
    one, other = drawn(TrainableEncoder(model, "last", dropout=0.0))
    np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(job, "TrainableEncoder", None)
    rows = [{"query": "a", "pos_passage": [f"b{i}"]} for i in range(8)]
    given = {
        "model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "out"), "dropout": 0.1,
        "dataset_name_or_path": write_jsonl(tmp_path / "rows.json", rows),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^dropout is 0.1; PaddleNLP has none in {kind} models"):
        job.train(build(training_arguments(), **given))
