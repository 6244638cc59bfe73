"""BERT's tokenizer made from its vocabulary, for folders that have a ``vocab.txt`` and no ``tokenizer.json``.

transformers and PaddleNLP read such a folder differently: PaddleNLP sets symbols (℃, →, ＋) apart as it does
punctuation, transformers leaves them in their words. A model wants what it was trained with.
"""

from pathlib import Path

from ...files import json_files

# What PaddleNLP counts as symbols: Unicode's, and some that it names.
_SYMBOLS = "[\\p{S}\u00ad\u00b2\u00b5\u00ba\u00d8\u014b\u01b1\u3007]"
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "mask_token": "[MASK]"}  # fmt: skip
_NEEDED = ("unk_token", "cls_token", "sep_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_PLAIN_SETTINGS = {"do_basic_tokenize": (True,), "never_split": (None, [])}


def build(folder: Path, symbols_apart: bool):
    """A ``tokenizers.Tokenizer`` as transformers makes it of a BERT folder; None if the folder is no such one.

    Args:
        symbols_apart: as PaddleNLP's, but for characters that only newer versions of Unicode know.

    Raises:
        OSError, ValueError: the files cannot be read.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    path = folder / "tokenizer_config.json"
    settings = json_files.read_object(path)
    kinds = ("BertTokenizer", "BertTokenizerFast") + (("ErnieTokenizer",) if symbols_apart else ())
    if not (folder / "vocab.txt").is_file() or settings.get("tokenizer_class", kinds[0]) not in kinds:
        return None
    if (folder / "added_tokens.json").is_file() or any(
        settings.get(name, allowed[0]) not in allowed for name, allowed in _PLAIN_SETTINGS.items()
    ):
        return None
    vocabulary = _read_vocabulary(folder / "vocab.txt")
    special = {name: content(settings.get(name, usual)) for name, usual in _SPECIAL.items()}
    if not {special[name] for name in _NEEDED} <= vocabulary.keys():
        return None
    added = added_tokens(settings, path)
    if symbols_apart and any(token.content not in special.values() for token in added.values()):
        return None  # PaddleNLP knows only some of them, and reads those in a way of its own
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", True, path),
        strip_accents=_flag(settings, "strip_accents", None, path),
        lowercase=_flag(settings, "do_lower_case", True, path),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if symbols_apart:
        apart = pre_tokenizers.Split(Regex(_SYMBOLS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, apart])
    first, last = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    tokenizer.add_special_tokens([token for token in special.values() if token in vocabulary])
    for number, token in added.items():
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if isinstance(number, int) and found != number:
            raise ValueError(
                f"{path}: added_tokens_decoder has {token.content!r} as {number}; expected {found}, its place in"
                " vocab.txt or the next after it"
            )
    return tokenizer


def _flag(settings: dict, name: str, usual: bool | None, path: Path) -> bool | None:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {name} is {value!r}; expected true or false")
    return usual if value is None else value


def added_tokens(settings: dict, path: Path) -> dict:
    """``AddedToken`` by number, then by name those that are only named as special: they are numbered in that order."""
    from tokenizers import AddedToken

    try:
        decoder = {int(number): token for number, token in (settings.get("added_tokens_decoder") or {}).items()}
        added = {
            number: AddedToken(decoder[number]["content"], **{f: decoder[number].get(f) is True for f in _TOKEN_FLAGS})
            for number in sorted(decoder)
        }
        known = {token.content for token in added.values()}
        extra = settings.get("extra_special_tokens") or []  # what transformers 5 calls them
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        names = [content(token) for token in [*(settings.get("additional_special_tokens") or []), *extra]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: its added tokens cannot be read; expected added_tokens_decoder as an object of tokens by number,"
            " and additional_special_tokens as a list"
        ) from None
    named = {name: AddedToken(name, normalized=False, special=True) for name in names if name not in known}
    return added | named


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no UTF-8 text; expected a token a line") from None
    return {token: number for number, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}


def content(token: str | dict | None) -> str:
    return token.get("content", "") if isinstance(token, dict) else str(token or "")
