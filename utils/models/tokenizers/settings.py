"""What a folder says about its tokenizer beside ``tokenizer.json``, done as transformers does it, or refused."""

import json
from pathlib import Path

from ...files import json_files
from . import wordpiece

# Their classes set this up anew from tokenizer_config.json, whatever tokenizer.json says.
_BERT = ("BertTokenizer", "BertTokenizerFast")
_BYTE_LEVEL = ("RobertaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def check(folder: Path) -> None:
    """Refuse what no tokenizer here does.

    Raises:
        OSError, ValueError: ``tokenizer_config.json`` asks for it, or cannot be read.
    """
    path = folder / "tokenizer_config.json"
    config = json_files.read_object(path)
    if config.get("truncation_side") not in (None, "right"):
        raise ValueError(
            f"{path}: truncation_side is {config['truncation_side']!r}; expected 'right', as texts are cut"
        )
    code = config.get("auto_map") or {}
    if not isinstance(code, dict) or "AutoTokenizer" in code:
        raise ValueError(
            f"{path}: auto_map names code of the tokenizer's own, which is not run here; expected a plain tokenizer"
            " (take auto_map out if it is one)"
        )


def apply(tokenizer, folder: Path):
    """The ``tokenizers.Tokenizer`` of a folder's ``tokenizer.json`` with what the other files say about it.

    Raises:
        OSError, ValueError: they ask for what is not done here, or cannot be read.
    """
    path = folder / "tokenizer_config.json"
    config = json_files.read_object(path)
    _check_file(tokenizer, folder / "tokenizer.json", config)
    kind = _kind(folder, config)
    _check_prefix_space(tokenizer, path, config, kind)
    if kind in _BERT:
        _set_case(tokenizer, config)
    _add_tokens(tokenizer, folder, config)
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    return tokenizer


def _kind(folder: Path, config: dict) -> str:
    """The tokenizer's class, which a folder may leave to its model's type."""
    model = json_files.read_object(folder / "config.json")
    usual = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}.get(model.get("model_type"), "")
    return config.get("tokenizer_class") or model.get("tokenizer_class") or usual


def _check_file(tokenizer, path: Path, config: dict) -> None:
    """``tokenizer.json`` can say which side of a text is cut, too, and draw tokens at random."""
    side = (tokenizer.truncation or {}).get("direction", "right").lower()
    if side != "right" and config.get("truncation_side") is None:
        raise ValueError(f"{path}: its truncation has the direction {side!r}; expected 'right', as texts are cut")
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        raise ValueError(
            f"{path}: its model has dropout {dropout:g}; expected none, or a text has new tokens each time"
        )


def _check_prefix_space(tokenizer, path: Path, config: dict, kind: str) -> None:
    steps = [] if tokenizer.pre_tokenizer is None else json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = steps.get("pretokenizers", [steps]) if steps else []
    found = [step["add_prefix_space"] for step in steps if step["type"] == "ByteLevel"]
    wanted = config.get("add_prefix_space") is True
    if kind.removesuffix("Fast") in _BYTE_LEVEL and found and any(found) != wanted:
        raise ValueError(
            f"{path}: add_prefix_space is {wanted}, and {any(found)} in tokenizer.json; expected the same in both"
        )


def _set_case(tokenizer, config: dict) -> None:
    """Case, accents and Chinese characters of BERT's tokenizer, with transformers' defaults."""
    from tokenizers import normalizers

    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=tokenizer.normalizer.clean_text,
            handle_chinese_chars=config.get("tokenize_chinese_chars") in (None, True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case") in (None, True),
        )


def _add_tokens(tokenizer, folder: Path, config: dict) -> None:
    """Tokens that are looked for in a text before its words, in transformers' order.

    Of older folders, which have no ``added_tokens_decoder``, two more files are read.
    """
    from tokenizers import AddedToken

    settings, path = config, folder / "tokenizer_config.json"
    if config.get("added_tokens_decoder") is None:
        older = {k: v for k, v in json_files.read_object(folder / "added_tokens.json").items() if type(v) is int}
        decoder = {number: {"content": text, "normalized": True} for text, number in older.items()}
        settings = config | json_files.read_object(folder / "special_tokens_map.json")
        settings |= {"added_tokens_decoder": decoder}
    found = wordpiece.added_tokens(settings, path)
    known = [repr(token) for token in tokenizer.get_added_tokens_decoder().values()]
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    numbered = [token for number, token in found.items() if isinstance(number, int) and repr(token) not in known]
    if config.get("added_tokens_decoder") is None:  # tokenizer.json knows better
        numbered = [token for token in numbered if token.content not in names]
    names |= {token.content for token in numbered}
    special = [wordpiece.content(settings.get(name)) for name in _SPECIAL]
    named = [AddedToken(text, normalized=False, special=True) for text in special if text and text not in names]
    names |= {token.content for token in named}
    named += [t for number, t in found.items() if not isinstance(number, int) and t.content not in names]
    tokenizer.add_tokens([*numbered, *named])
