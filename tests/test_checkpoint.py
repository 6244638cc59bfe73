"""What a model's folder says about itself, in the layouts of several writers."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from utils.models import checkpoint, families, paddlenlp
from utils.models.tokenizers import tokenizer
from utils.models.weight_files import read_weights

DECODER = {
    "model_type": "qwen2", "architectures": ["Qwen2Model"], "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder with some configuration, and no real weights."""

    def make(**config):
        (tmp_path / "config.json").write_text(json.dumps(DECODER | config))
        (tmp_path / "tokenizer.json").write_text("{}")
        save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_a_decoder_rotates_its_positions_as_it_was_trained_to(folder, config):
    found = checkpoint.resolve(str(folder(**config)))
    assert found.config["rope_theta"] == 5e5
    assert paddlenlp.new_model(found, "float32").config.rope_theta == 5e5


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ],
)
def test_rotations_that_would_be_passed_over_are_refused(folder, config):
    with pytest.raises(ValueError, match="rotated by 'yarn'; expected the default"):
        checkpoint.resolve(str(folder(**config)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_position_embeddings": 2}, "max_position_embeddings is 2; expected 3 at least"),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 3}, "max_position_embeddings is 3; expected 5"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12'; expected a small number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"pad_token_id": "0"}, "pad_token_id is '0'; expected a whole number"),
    ],
)
def test_values_that_no_encoder_has_are_refused_with_their_file(folder, config, message):
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        checkpoint.resolve(str(folder(**config)))


def test_a_pooling_that_is_not_known_can_be_replaced(folder):
    path = folder()
    (path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "pool"}]))
    (path / "pool").mkdir()
    (path / "pool" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="give pooling="):
        checkpoint.resolve(str(path))
    assert checkpoint.resolve(str(path), pooling="mean").pooling == "mean"


@pytest.mark.parametrize(
    ("modules", "config", "expected"),
    [
        (None, None, True),
        (["Transformer", "Pooling", "Normalize"], {"similarity_fn_name": "cosine"}, True),
        (["Transformer", "Pooling", "Normalize"], {"similarity_fn_name": "dot"}, True),
        (["Transformer", "Pooling"], {"similarity_fn_name": "cosine"}, True),
        (["Transformer", "Pooling"], {"similarity_fn_name": None}, True),
        (["Transformer", "Pooling"], None, True),
        (["Transformer", "Pooling"], {"similarity_fn_name": "dot"}, False),
    ],
)
def test_only_a_model_of_dot_products_is_not_normalised(folder, modules, config, expected):
    path = folder()
    if modules is not None:
        kinds = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in modules]
        (path / "modules.json").write_text(json.dumps(kinds))
        (path / "Pooling").mkdir()
        (path / "Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    if config is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps(config))
    assert checkpoint.resolve(str(path)).normalize is expected


def test_another_formats_index_does_not_count(folder):
    path = folder()
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert [file.name for file in checkpoint.resolve(str(path)).weight_files()] == ["model.safetensors"]


def test_a_mistyped_folder_is_not_looked_for_on_a_hub(folder, monkeypatch):
    path = folder()
    monkeypatch.chdir(path.parent)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        checkpoint.resolve(f"{path.name}/modle")


@pytest.mark.parametrize("kind", ["Dense", "LayerNorm", "LSTM", "SomethingNew"])
def test_a_module_that_is_not_computed_here_is_refused_wherever_it_stands(folder, kind):
    path = folder()
    kinds = ["Transformer", "Pooling", kind, "Normalize"]
    (path / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds])
    )
    (path / "Pooling").mkdir()
    (path / "Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    for pooling in (None, "mean"):
        with pytest.raises(ValueError, match=rf"modules\.json: the module {kind} is not supported; expected Transf"):
            checkpoint.resolve(str(path), pooling=pooling)
    kinds[2] = "Dropout"
    (path / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds])
    )
    assert checkpoint.resolve(str(path)).pooling == "mean"


def test_prompts_that_are_not_pooled_are_refused(folder):
    path = folder()
    (path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "pool"}]))
    (path / "pool").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    (path / "pool" / "config.json").write_text(json.dumps(pooling))
    assert checkpoint.resolve(str(path)).query_template == "{text}"  # without prompts there is nothing to leave out
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
    with pytest.raises(ValueError, match="include_prompt is false"):
        checkpoint.resolve(str(path))


@pytest.mark.parametrize(
    ("old", "new", "expected"), [(None, None, 64), (None, 40, 40), (24, 40, 24), (None, 10**30, 64), (None, "x", 64)]
)
def test_the_length_limit_is_read_where_either_kind_of_folder_keeps_it(folder, old, new, expected):
    path = folder()
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": new} if new else {}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": old} if old else {}))
    assert checkpoint.resolve(str(path)).default_length == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_causal": False}, "is_causal is False; expected True"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'",
        ),
        ({"model_type": "xlm-roberta", "position_embedding_type": "relative_key_query"}, "expected 'absolute'"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder is True; expected False"),
        ({"use_sliding_window": True}, "use_sliding_window is True; expected False"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map names code of the model's own"),
        (
            {"model_type": "distilbert", "hidden_size": None, "dim": 64},
            "config.json: model_type 'distilbert' is not supported with PyTorch's weights; expected one of bert, rob",
        ),
        ({"model_type": "new"}, "model_type 'new' is not supported with PyTorch's weights; expected one of bert, "),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; expected False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "by 'partial_rotary_factor'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'; expected "),
        ({"head_dim": 16}, "head_dim is 16; expected 8, the only width"),
        ({"model_type": "bert", "pruned_heads": {"0": [1]}}, "pruned_heads is {'0': .1.}; expected {}"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True; expected False"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True; expected False"),
        ({"model_type": "qwen3", "hidden_act": "relu"}, "hidden_act is 'relu'; expected 'silu'"),
        ({"model_type": "gemma", "hidden_activation": "silu"}, "hidden_activation is 'silu'; expected 'gelu_py"),
        ({"model_type": "opt", "word_embed_proj_dim": 8}, "word_embed_proj_dim is 8; expected 16"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before is False; expected True"),
        ({"model_type": "albert", "inner_group_num": 2}, "inner_group_num is 2; expected 1"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(folder, config, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.resolve(str(folder(**config)))


# Those that PaddleNLP's or transformers' tables name, and that gave shape errors, tracebacks, or other vectors.
@pytest.mark.parametrize(
    ("kind", "with_torch", "with_paddle"),
    [(kind, False, False) for kind in (
        "deberta", "deberta-v2", "chinesebert", "fnet", "rembert", "big_bird", "ernie_doc", "convbert",
        "megatron-bert", "megatronbert", "mobilebert", "nystromformer", "mixtral", "qwen2_moe", "chatglm", "new", "t5",
    )]
    + [(kind, False, True) for kind in ("mistral", "gpt", "roformer", "mpnet", "distilbert", "ernie_m", "skep")]
    + [(kind, True, False) for kind in ("camembert",)]
    + [(kind, True, True) for kind in ("bert", "xlm_roberta", "electra", "llama", "gemma", "opt")],
)  # fmt: skip
def test_what_a_refusal_lists_as_supported_is_what_runs(folder, kind, with_torch, with_paddle):
    path = folder(model_type=kind)
    for runs, whose in ((with_torch, "PyTorch's"), (with_paddle, "Paddle's")):
        if runs:
            assert checkpoint.resolve(str(path)).model_type == kind.replace("_", "-")
        else:
            with pytest.raises(ValueError, match=f"model_type '.*' is not supported with {whose} weights; expected"):
                checkpoint.resolve(str(path))
        (path / "model.safetensors").unlink(missing_ok=True)
        (path / "model_state.pdparams").touch()


def test_the_readme_lists_the_families_that_run():
    for name in ("README.md", "README.zh-CN.md"):
        text = re.sub(r"[^a-z0-9]+", " ", (ROOT / name).read_text(encoding="utf-8").lower().replace("-", ""))
        for kind in (*families.TORCH, *families.PADDLE):
            assert re.search(rf"\b{kind.replace('-', '')}\b", text), (name, kind)


def test_an_old_layout_is_told_from_a_folder_without_a_model(folder, tmp_path):
    path = folder()
    inner = path / "0_Transformer"
    inner.mkdir()
    (path / "config.json").rename(inner / "config.json")
    (path / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}])
    )
    with pytest.raises(ValueError, match=r"the model lies in .*0_Transformer: give that, and pooling="):
        checkpoint.resolve(str(path))


@pytest.mark.parametrize("header", [b"[" * 5000, b'{"a":' * 5000, b"[1]", b"null", b'{"w": 3}'])
def test_hostile_headers_get_one_line(folder, header):
    path = folder(model_type="bert")
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors: (is )?no safetensors file"):
        read_weights(checkpoint.resolve(str(path)))


def test_a_folder_that_wants_its_texts_treated_otherwise_is_refused(folder):
    path = folder(model_type="bert")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": true}')
    with pytest.raises(ValueError, match="do_lower_case is True; expected false, or a tokenizer that does so"):
        checkpoint.resolve(str(path))
    (path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert checkpoint.resolve(str(path)).default_length == 32


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({}, [2, 5, 7, 9, 10, 3]),
        ({"do_lower_case": False}, [2, 6, 1, 9, 10, 3]),
        ({"tokenize_chinese_chars": False}, [2, 5, 7, 11, 3]),
    ],
)
@pytest.mark.parametrize("lowercase", [True, False])
def test_the_configuration_has_the_last_word_on_case(tmp_path, says, expected, lowercase):
    """Expected are the ids that transformers 5.24 gives."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "cafe", "café", "中", "文", "中文"]
    built = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    built.normalizer, built.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=lowercase),
        pre_tokenizers.BertPreTokenizer(),
    )
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | says))
    (found,) = tokenizer.load(tmp_path, 32, True)(["Hello Café 中文"])
    assert list(found) == expected
    (tmp_path / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    with pytest.raises(ValueError, match="truncation_side is 'left'; expected 'right'"):
        tokenizer.load(tmp_path, 32, True)


@pytest.mark.parametrize("name", ["adapter_config.json", "lora_config.json"])
@pytest.mark.parametrize("has_base", [True, False])
def test_adapters_are_refused(folder, name, has_base):
    path = folder()
    (path / name).write_text('{"peft_type": "LORA"}')
    if not has_base:
        (path / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{name} says that the model has an adapter, which is not merged here"):
        checkpoint.resolve(str(path))


def test_heads_that_are_not_used_are_named_once(folder, caplog):
    caplog.set_level("INFO")
    path = folder(model_type="xlm-roberta", architectures=["XLMRobertaForMaskedLM"])
    (path / "sparse_linear.pt").touch()
    for _ in range(2):
        checkpoint.resolve(str(path))
    assert caplog.text.count("sparse_linear.pt and masked-language-model head not used; texts become dense") == 1
