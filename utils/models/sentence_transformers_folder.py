"""The files by which sentence-transformers describes a model: pooling, normalisation, prompts, longest text.

They are read and written here only, so that what one program of this toolkit writes the others read alike.
"""

from pathlib import Path

from ..files import json_files

# Where ``write`` puts them.
FILES = ("modules.json", "1_Pooling", "2_Normalize", "sentence_bert_config.json", "config_sentence_transformers.json")

# What a folder may consist of; dropout does nothing outside training.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"
}  # fmt: skip
# Later versions name the pooling instead.
_POOLING_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last", "last": "last"}
_PASSAGE_PROMPTS = ("passage", "document", "corpus")
_SIMILARITIES = ("cosine", "dot")
_KIND = "SentenceTransformer"
# What else the library reads of a Transformer module, and what is done here alone. None says nothing anywhere.
_PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
_PLAIN_TRANSFORMER = {
    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings", "processing_kwargs": {},
    "query_length": None, "document_length": None, "query_expansion": None, "tokenizer_name_or_path": None,
}  # fmt: skip
# Arguments for transformers, with those that change no vector, or that are chosen here.
_ARGUMENTS = {
    "model": ("torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors"),
    "tokenizer": ("use_fast", "padding_side", "padding"), "processor": ("use_fast", "padding_side", "padding"),
    "config": (),
}  # fmt: skip
# How the file of a Transformer module can be called, the first that is there.
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)


def read_modules(folder: Path) -> dict[str, Path]:
    """The folder's modules, by their kind: where each has its files. Empty for folders of other programs.

    Raises:
        ValueError: there is one that is not computed here, such as a Dense layer after the pooling.
    """
    path = folder / "modules.json"
    found = {}
    for module in json_files.read(path) or []:
        name = module.get("type", "")
        kind = name.rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise ValueError(f"{path}: the module {kind} is not supported; expected {', '.join(_MODULES)}")
        if not name.startswith("sentence_transformers."):
            raise ValueError(f"{path}: {name} is code of the model's own, which is not run here; expected {kind}'s own")
        found[kind] = folder / module.get("path", "")
    if "Normalize" in found:
        _check_normalize(found["Normalize"] / "config.json")
    return found


def _check_normalize(path: Path) -> None:
    """It can be told to take something else than the text's vector."""
    config = json_files.read_object(path)
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ValueError(f"{path}: {name} is {config[name]!r}; expected 'sentence_embedding', a text's vector")


def read_pooling(modules: dict[str, Path]) -> str | None:
    """``cls``, ``mean`` or ``last``; None if the folder names no pooling.

    Raises:
        ValueError: it names another one, or several.
    """
    if "Pooling" not in modules:
        return None
    path = modules["Pooling"] / "config.json"
    config = json_files.read_object(path)
    modes = [mode for mode, flag in _POOLING_FLAGS.items() if config.get(flag)]
    unknown = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    unknown = [key for key in unknown if key not in _POOLING_FLAGS.values()]
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = [_POOLING_NAMES.get(str(name), "") for name in (named if isinstance(named, list) else [named])]
        unknown = []  # the older flags beside it are passed over
    if len(modes) != 1 or unknown or not modes[0]:
        raise ValueError(f"{path}: expected exactly one pooling mode of cls, mean, last; give pooling=...")
    return modes[0]


def read_normalize(folder: Path, modules: dict[str, Path]) -> bool:
    """False only for a folder that names dot products and has no module that normalises.

    Most folders without that module are compared by cosines all the same, which need no module for that.

    Raises:
        ValueError: it names another comparison, or is no model of dense vectors.
    """
    path = folder / "config_sentence_transformers.json"
    config = json_files.read_object(path)
    named = config.get("similarity_fn_name")
    if named not in (None, *_SIMILARITIES):
        raise ValueError(f"{path}: similarity_fn_name is {named!r}; expected {' or '.join(_SIMILARITIES)}, as is done")
    if config.get("model_type", _KIND) != _KIND:
        raise ValueError(f"{path}: model_type is {config['model_type']!r}; expected {_KIND!r}, one dense vector a text")
    return named != "dot" or "Normalize" in modules


def read_prompts(folder: Path, modules: dict[str, Path]) -> tuple[str, str]:
    """The prompts for queries and passages, empty where the folder has none.

    Raises:
        ValueError: there are some, which the pooling is to leave out; or the default one is not among them.
    """
    path = folder / "config_sentence_transformers.json"
    config = json_files.read_object(path)
    prompts = config.get("prompts") or {}
    if config.get("default_prompt_name") not in (None, *prompts):
        raise ValueError(f"{path}: default_prompt_name is {config['default_prompt_name']!r}; expected a key of prompts")
    default = prompts.get(config.get("default_prompt_name") or "", "")
    passage = next((prompts[name] for name in _PASSAGE_PROMPTS if name in prompts), default)
    found = prompts.get("query", default) or "", passage or ""
    if any(found) and "Pooling" in modules:
        path = modules["Pooling"] / "config.json"
        if json_files.read_object(path).get("include_prompt") is False:
            raise ValueError(f"{path}: include_prompt is false; expected prompts to be pooled, as is done here")
    return found


def read_max_length(folder: Path) -> int | None:
    """The longest text in tokens that the model was made for; None if the folder does not say.

    Raises:
        ValueError: it says what is no length, or asks for what is not done here.
    """
    path = next((folder / name for name in _TRANSFORMER_FILES if (folder / name).is_file()), folder / "none")
    config = json_files.read_object(path)
    _check_transformer(path, config)
    if config.get("do_lower_case"):
        tokenizer = json_files.read_object(folder / "tokenizer_config.json")
        if not tokenizer.get("do_lower_case"):
            reason = "expected false, or a tokenizer that does so (do_lower_case in tokenizer_config.json)"
            raise ValueError(f"{path}: do_lower_case is {config['do_lower_case']!r}; {reason}")
    length = config.get("max_seq_length")
    if length is not None and (type(length) is not int or not 0 < length < 1 << 31):
        raise ValueError(f"{path}: max_seq_length is {length!r}; expected a positive whole number")
    return length


def _check_transformer(path: Path, config: dict) -> None:
    for name, plain in _PLAIN_TRANSFORMER.items():
        if config.get(name) not in (plain, None):
            raise ValueError(f"{path}: {name} is {config[name]!r}; expected {plain!r}, the only kind supported")
    text = config.get("modality_config", {"text": _PLAIN_TEXT}).get("text")
    if text != _PLAIN_TEXT:
        raise ValueError(f"{path}: modality_config has {text!r} for text; expected {_PLAIN_TEXT!r}")
    for kind, harmless in _ARGUMENTS.items():
        for key in (f"{kind}_args", f"{kind}_kwargs"):
            other = set(config.get(key) or {}) - {*harmless, "trust_remote_code"}
            if other:
                raise ValueError(f"{path}: {key} has {min(other)!r}, which is not passed on; expected none")


def is_prompt(template: str) -> bool:
    """Whether a template is what this folder can hold, a prefix, with nothing behind its ``{text}``."""
    return template.endswith("{text}")


def write(
    folder: Path, hidden_size: int, pooling: str, normalize: bool, templates: tuple[str, str], max_length: int
) -> None:
    """Describe the model in the folder. What a template has behind the text has no place there: see ``is_prompt``.

    Args:
        pooling: ``cls``, ``mean`` or ``last``.
        templates: for queries and passages, with ``{text}``.
        max_length: the longest text in tokens.

    Raises:
        OSError: a file cannot be written.
    """
    kind = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
    json_files.write(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind + name} for i, (path, name) in enumerate(modules)],
    )
    for path, _ in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    flags = {flag: mode == pooling for mode, flag in _POOLING_FLAGS.items()}
    json_files.write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden_size, **flags})
    json_files.write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    prompts = {}
    for name, template in zip(("query", "passage"), templates, strict=True):
        prompts[name], _, _ = template.partition("{text}")
    # Where sentence-transformers' encode_document looks first: it would find an empty one of its own.
    prompts["document"] = prompts["passage"]
    json_files.write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine" if normalize else "dot"},
    )
