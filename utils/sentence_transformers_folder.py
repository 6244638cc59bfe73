"""The files by which sentence-transformers describes a model: pooling, normalisation, prompts, longest text.

They are read and written here only, so that what one program of this toolkit writes the others read alike.
"""

from pathlib import Path

from utils import json_files

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


def read_modules(folder: Path) -> dict[str, Path]:
    """The folder's modules, by their kind: where each has its files. Empty for folders of other programs.

    Raises:
        ValueError: there is one that is not computed here, such as a Dense layer after the pooling.
    """
    path = folder / "modules.json"
    found = {}
    for module in json_files.read(path) or []:
        kind = module.get("type", "").rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise ValueError(f"{path}: the module {kind} is not supported; expected {', '.join(_MODULES)}")
        found[kind] = folder / module.get("path", "")
    return found


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
        modes = [_POOLING_NAMES.get(config["pooling_mode"], "")]
    if len(modes) != 1 or unknown or not modes[0]:
        raise ValueError(f"{path}: expected exactly one pooling mode of cls, mean, last; give pooling=...")
    return modes[0]


def read_normalize(folder: Path, modules: dict[str, Path]) -> bool:
    """False only for a folder that names dot products and has no module that normalises.

    Most folders without that module are compared by cosines all the same, which need no module for that.
    """
    named = json_files.read_object(folder / "config_sentence_transformers.json").get("similarity_fn_name")
    return named != "dot" or "Normalize" in modules


def read_prompts(folder: Path, modules: dict[str, Path]) -> tuple[str, str]:
    """The prompts for queries and passages, empty where the folder has none.

    Raises:
        ValueError: there are some, which the pooling is to leave out.
    """
    config = json_files.read_object(folder / "config_sentence_transformers.json")
    prompts = config.get("prompts") or {}
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
        ValueError: it says what is no length.
    """
    path = folder / "sentence_bert_config.json"
    config = json_files.read_object(path)
    if config.get("do_lower_case"):
        tokenizer = json_files.read_object(folder / "tokenizer_config.json")
        if not tokenizer.get("do_lower_case"):
            reason = "expected false, or a tokenizer that does so (do_lower_case in tokenizer_config.json)"
            raise ValueError(f"{path}: do_lower_case is {config['do_lower_case']!r}; {reason}")
    length = config.get("max_seq_length")
    if length is not None and (type(length) is not int or not 0 < length < 1 << 31):
        raise ValueError(f"{path}: max_seq_length is {length!r}; expected a positive whole number")
    return length


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
