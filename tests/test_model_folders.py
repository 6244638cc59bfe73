"""Every key of a model's folder that docs/model_folders.md lists is done as it says there.

Expected vectors are those of sentence-transformers 6.2 and transformers 5.24 for the same folder: the first numbers
for a query, and for a passage.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import ROOT, make_tiny_bert
from safetensors.numpy import save_file
from test_qwen3 import _weights as decoder_weights
from test_word_cache import _bert, bare_vocabulary, vocabulary
from tokenizers import models, pre_tokenizers

from utils.arguments.scripts import ModelArguments, build
from utils.encoding.embed import build_encoders
from utils.files import jsonl
from utils.files.run_ids import PASSAGE_IDS, QUERY_IDS
from utils.models.tokenizers import tokenizer as tokenizing

TEXT = "lost CARD Löst 信用 [MASK] <q> [SEP] card lost card phone lost"
BERT, DECODER = "bert", "decoder"
MASK = {"content": "phone", "special": True}
LEFT = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
RIGHT = LEFT | {"direction": "Right"}
ADDED = [
    {"id": number, "content": token, "special": True, "normalized": False}
    | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    for number, token in [*enumerate(vocabulary()[:5]), (len(vocabulary()), "phone")]
]
PADDING = {
    "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "[PAD]",
}  # fmt: skip
DENSE = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
]
OWN = [MODULES[0] | {"type": "custom_st.Transformer"}, *MODULES[1:]]
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")

# Of each file: a key, what it becomes in the folder, and what that does: "changes" (to what the libraries give),
# "same", or the line of a refusal. A key with dots is inside another one.
CASES: dict[str, list[tuple]] = {
    "config.json": [
        ("model_type", "t5", "model_type 't5' is not supported"),
        ("hidden_act", "relu", "changes"),
        ("layer_norm_eps", 0.3, "changes"),
        ("num_attention_heads", 2, "changes"),
        ("pad_token_id", 5, "same"),
        ("num_hidden_layers", 3, "are not there|says 3|lacks"),
        ("hidden_size", 64, "config.json says"),
        ("intermediate_size", 32, "config.json says"),
        ("vocab_size", 50, "knows only"),
        ("max_position_embeddings", 8, "changes", BERT, {}, {"sentence_bert_config.json": None}),
        ("type_vocab_size", 2, "same"),
        ("auto_map", {"AutoModel": "own.Model"}, "auto_map names code of the model's own"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("is_decoder", True, "is_decoder is True"),
        ("add_cross_attention", True, "add_cross_attention is True"),
        ("pruned_heads", {"0": [1]}, "pruned_heads is"),
        ("rms_norm_eps", 0.3, "changes", DECODER),
        ("rope_theta", 100.0, "changes", DECODER),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}, "changes", DECODER),
        ("rope_parameters.rope_type", "yarn", "rotated by 'yarn'", DECODER),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rotated by 'linear'", DECODER),
        ("head_dim", 8, "has shape", DECODER),
        ("num_key_value_heads", 1, "has shape", DECODER),
        ("attention_bias", True, "are not there", DECODER),
        ("is_causal", False, "is_causal is False", DECODER),
        ("use_sliding_window", True, "use_sliding_window is True", DECODER),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True", DECODER),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5", DECODER),
        ("layer_types", ["sliding_attention"], "layer_types has 'sliding_attention'", DECODER),
        *[(key, value, "same") for key, value in {
            "architectures": None, "hidden_dropout_prob": 0.9, "attention_probs_dropout_prob": 0.9,
            "torch_dtype": "float16", "dtype": "float16", "initializer_range": 1.0, "use_cache": False,
            "tie_word_embeddings": False, "id2label": {"0": "x"}, "bos_token_id": 7, "eos_token_id": 7,
            "transformers_version": "4.0", "_name_or_path": "x", "gradient_checkpointing": True,
        }.items()],
    ],
    "tokenizer.json": [
        ("normalizer.clean_text", False, "same"),
        ("pre_tokenizer", {"type": "WhitespaceSplit"}, "changes", BERT, {"tokenizer_class": "TokenizersBackend"}),
        ("post_processor", None, "changes", BERT, {"tokenizer_class": "TokenizersBackend"}),
        ("added_tokens", ADDED, "changes"),
        ("model.unk_token", "[MASK]", "changes", BERT, {"tokenizer_class": "TokenizersBackend"}),
        ("truncation", LEFT, "its truncation has the direction 'left'"),
        ("truncation.max_length", RIGHT, "same"),
        ("padding", PADDING, "same"),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "same"),
    ],
    "tokenizer_config.json": [
        ("tokenizer_class", "TokenizersBackend", "same"),
        ("do_lower_case", False, "changes"),
        ("strip_accents", False, "changes"),
        ("tokenize_chinese_chars", False, "changes"),
        ("model_max_length", 8, "changes", BERT, {}, {"sentence_bert_config.json": None}),
        ("added_tokens_decoder", {"5": {"content": "lost", "special": True, "lstrip": True}}, "same"),
        ("added_tokens_decoder", {"6": {"content": "CARD", "special": True}}, "changes"),
        ("additional_special_tokens", ["phone"], "changes"),
        ("extra_special_tokens", ["phone"], "changes"),
        ("mask_token", "phone", "changes"),
        ("split_special_tokens", True, "changes"),
        ("truncation_side", "left", "truncation_side is 'left'"),
        ("auto_map", {"AutoTokenizer": ["own.Tokenizer", None]}, "auto_map names code of the tokenizer's own"),
        *[(key, value, "same") for key, value in {
            "padding_side": "left", "pad_token": "[UNK]", "clean_up_tokenization_spaces": False, "chat_template": "x",
            "add_bos_token": True, "add_eos_token": True, "model_input_names": ["input_ids"], "name_or_path": "x",
            "max_length": 4, "stride": 2, "truncation_strategy": "only_first",
        }.items()],
    ],
    "special_tokens_map.json": [
        ("mask_token", MASK, "changes"),
        ("additional_special_tokens", ["phone"], "changes"),
    ],
    "added_tokens.json": [("phone", 95, "changes")],
    "modules.json": [
        ("type", [*MODULES[:2], *DENSE], "the module Dense is not supported"),
        ("type", OWN, "custom_st.Transformer is code of the model's own"),
        ("path", [MODULES[0], MODULES[1] | {"path": "cls"}, MODULES[2]], "changes"),
        ("idx", [module | {"idx": 7} for module in MODULES], "same"),
        ("name", [module | {"name": module["type"][-6:]} for module in MODULES], "same"),
    ],
    "1_Pooling/config.json": [
        ("pooling_mode", "cls", "changes"),
        ("pooling_mode", ["lasttoken"], "changes"),
        ("pooling_mode", ["cls", "mean"], "expected exactly one pooling mode"),
        ("pooling_mode_cls_token", True, "expected exactly one pooling mode"),
        ("pooling_mode_mean_tokens", False, "expected exactly one pooling mode"),
        ("pooling_mode_lasttoken", True, "expected exactly one pooling mode"),
        ("pooling_mode_max_tokens", True, "expected exactly one pooling mode"),
        ("pooling_mode_mean_sqrt_len_tokens", True, "expected exactly one pooling mode"),
        ("pooling_mode_weightedmean_tokens", True, "expected exactly one pooling mode"),
        ("include_prompt", False, "include_prompt is false"),
        ("word_embedding_dimension", 7, "same"),
        ("embedding_dimension", 7, "same"),
    ],
    "2_Normalize/config.json": [
        ("module_input_name", "token_embeddings", "module_input_name is 'token_embeddings'"),
        ("module_output_name", "other", "module_output_name is 'other'"),
    ],
    "sentence_bert_config.json": [
        ("max_seq_length", 8, "changes"),
        ("do_lower_case", True, "do_lower_case is True", BERT, {"do_lower_case": False}),
        ("transformer_task", "fill-mask", "transformer_task is 'fill-mask'"),
        ("module_output_name", "scores", "module_output_name is 'scores'"),
        ("modality_config", {"text": {"method": "forward", "method_output_name": "pooler_output"}}, "modality_config"),
        ("processing_kwargs", {"text": {"max_length": 4}}, "processing_kwargs is"),
        ("query_length", 4, "query_length is 4"),
        ("document_length", 4, "document_length is 4"),
        ("query_expansion", {"length": 4}, "query_expansion is"),
        ("tokenizer_name_or_path", "x", "tokenizer_name_or_path is 'x'"),
        *[(f"{kind}_{ending}", {"something": 1}, f"{kind}_{ending} has 'something', which is not passed on")
          for kind in ("model", "tokenizer", "processor", "config") for ending in ("args", "kwargs")],
        ("unpad_inputs", True, "same"),
    ],
    "config_sentence_transformers.json": [
        ("prompts", {"query": "card ", "document": "lost "}, "changes"),
        ("default_prompt_name", "x", "default_prompt_name is 'x'; expected a key of prompts"),
        ("similarity_fn_name", "dot", "same"),
        ("similarity_fn_name", "euclidean", "similarity_fn_name is 'euclidean'; expected cosine or dot"),
        ("model_type", "SparseEncoder", "model_type is 'SparseEncoder'"),
        ("__version__", {"sentence_transformers": "2.0.0"}, "same"),
        ("requirements", {}, "same"),
    ],
}  # fmt: skip
ALL = [(file, *case) for file, cases in CASES.items() for case in cases]
# What the libraries give, where they take the folder: they refuse fewer positions than the weights have.
EXPECTED = json.loads((Path(__file__).parent / "model_folders.json").read_text())


def _write(path: Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _base(folder: Path, kind: str) -> Path:
    """A folder as sentence-transformers writes it, its texts cut to 40 tokens."""
    folder = Path(make_tiny_bert(folder / "model"))
    bare_vocabulary(folder, "bert")
    make_config = {"vocab_size": 133, "model_type": "bert"}
    _bert(folder)
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
        "pad_token_id": 0,
    }  # fmt: skip
    if kind == DECODER:
        words = 133
        save_file(decoder_weights(np.random.default_rng(3), words, bias=False), folder / "model.safetensors")
        make_config = {"vocab_size": words, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12}
        config |= {"intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"}
    _write(folder / "config.json", config | make_config)
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"})
    _write(folder / "modules.json", MODULES)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    _write(folder / "cls" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True})
    _write(folder / "2_Normalize" / "config.json", {})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 40})
    _write(folder / "config_sentence_transformers.json", {"prompts": {"query": "lost ", "document": "card "}})
    return folder


def changed(folder: Path, file: str, key: str, value, _, kind=BERT, tokenizer=None, others=None) -> Path:
    """The base folder with one key changed, and what a case needs beside it."""
    folder = _base(folder, kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", settings | (tokenizer or {}))
    for name, content in (others or {}).items():
        (folder / name).unlink() if content is None else _write(folder / name, content)
    path = folder / file
    whole = json.loads(path.read_text()) if path.is_file() else {}
    if file == "modules.json":
        whole = value
    elif file == "tokenizer.json" and key.startswith("truncation"):
        whole["truncation"] = value
    else:
        *outer, last = key.split(".")
        inner = whole
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    _write(path, whole)
    return folder


def _vectors(folder: Path) -> np.ndarray:
    sides = build_encoders(build(ModelArguments, model_path=str(folder), dtype="float32"))
    return np.array([encoder.encode([TEXT])[0] for encoder in sides])


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> dict[str, np.ndarray]:
    return {kind: _vectors(_base(tmp_path_factory.mktemp(kind), kind)) for kind in (BERT, DECODER)}


def _named(case: tuple) -> str:
    return f"{case[0]} {case[1]}={json.dumps(case[2]):.40}"


@pytest.mark.parametrize("place", range(len(ALL)), ids=[f"{n}-{_named(case)}" for n, case in enumerate(ALL)])
def test_a_key_does_what_the_page_says(tmp_path, unchanged, place):
    case = ALL[place]
    outcome, kind = case[3], case[4] if len(case) > 4 else BERT
    folder = changed(tmp_path, *case)
    if outcome not in ("same", "changes"):
        with pytest.raises(ValueError, match=outcome):
            _vectors(folder)
        return
    found = _vectors(folder)
    assert (np.abs(found - unchanged[kind]).max() < 1e-5) == (outcome == "same")
    if case[1] != "max_position_embeddings":
        np.testing.assert_allclose(found[:, :6], EXPECTED[_named(case)], atol=2e-4)


def _listed() -> dict[str, dict[str, str]]:
    """Of each file that the page has a table for: its keys, and the word beside each."""
    found, file = {}, ""
    for line in (ROOT / "docs" / "model_folders.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"## `(.+)`", line):
            file = match[1]
        elif match := re.match(r"\| (`.+?) \| (honoured|refused|no effect)", line):
            found.setdefault(file, {}).update(dict.fromkeys(re.findall(r"`([^`]+)`", match[1]), match[2]))
    return found


def test_the_page_lists_the_keys_that_are_tried():
    listed = _listed()
    assert listed.keys() == CASES.keys()
    for file, cases in CASES.items():
        outcomes = {}
        for key, _, outcome, *_ in cases:
            outcomes.setdefault(key, set()).add(outcome)
        if file == "added_tokens.json":  # whose keys are tokens
            continue
        assert listed[file].keys() - {*SPECIAL, "add_prefix_space", "model.dropout"} <= outcomes.keys(), file
        assert outcomes.keys() <= listed[file].keys(), file
        for key, word in listed[file].items():
            if word == "honoured" and key != "tokenizer_class":
                assert outcomes.get(key, {"changes"}) - {"same"}, (file, key)
            if word == "no effect":
                assert outcomes.get(key, {"same"}) == {"same"}, (file, key)


def test_the_page_lists_the_keys_of_a_row():
    page = (ROOT / "docs" / "model_folders.md").read_text(encoding="utf-8").split("## Rows")[1]
    listed = set()
    for line in page.splitlines():
        if line.startswith("| `"):
            listed |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    known = {"query", "prompt", "type", "pos_scores", "neg_scores", "text", "title"}
    assert listed == known | {*jsonl._ALIASES, *jsonl._ALIASES.values()} | {*QUERY_IDS, *PASSAGE_IDS}


@pytest.mark.parametrize(
    ("kind", "prefix", "says", "refused"),
    [
        ("RobertaTokenizer", True, {}, True),
        ("GPT2Tokenizer", False, {"add_prefix_space": True}, True),
        ("RobertaTokenizerFast", True, {"add_prefix_space": True}, False),
        ("Qwen2Tokenizer", False, {}, False),
        ("LlamaTokenizer", True, {}, False),
    ],
)
def test_a_prefix_space_is_as_both_files_say(tmp_path, kind, prefix, says, refused):
    built = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    built.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path / "tokenizer_config.json", {"tokenizer_class": kind} | says)
    if refused:
        with pytest.raises(ValueError, match=r"add_prefix_space is .*; expected the same in both"):
            tokenizing.load(tmp_path, 8, True)
    else:
        assert list(tokenizing.load(tmp_path, 8, True)(["a"])[0]) == [1, 0][not prefix :]


def test_ids_are_not_drawn_at_random(tmp_path):
    tokenizers.Tokenizer(models.BPE({"a": 0}, [], dropout=0.1)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"its model has dropout 0\.1; expected none"):
        tokenizing.load(tmp_path, 8, True)


@pytest.mark.parametrize(("config", "lower"), [({"model_type": "bert"}, True), ({"model_type": "electra"}, False)])
def test_a_folder_that_names_no_tokenizer_has_its_models(tmp_path, config, lower):
    _bert(tmp_path, lowercase=False)
    _write(tmp_path / "config.json", config)
    ids = tokenizing.load(tmp_path, 8, True)(["CARD"])[0]
    assert (list(ids) == [2, vocabulary().index("card"), 3]) is lower
