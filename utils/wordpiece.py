"""BERT's tokenizer made from its vocabulary, for folders that have a ``vocab.txt`` and no ``tokenizer.json``.

transformers and PaddleNLP read such a folder differently: PaddleNLP sets symbols (℃, →, ＋) apart as it does
punctuation, transformers leaves them in their words. A model wants what it was trained with.
"""

from pathlib import Path

from utils import json_files

# What PaddleNLP counts as symbols: Unicode's, and some that it names.
_SYMBOLS = "[\\p{S}\u00ad\u00b2\u00b5\u00ba\u00d8\u014b\u01b1\u3007]"
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "mask_token": "[MASK]"}  # fmt: skip
_NEEDED = ("unk_token", "cls_token", "sep_token")
_PLAIN_SETTINGS = {"do_basic_tokenize": (True,), "never_split": (None, [])}


def build(folder: Path, symbols_apart: bool):
    """A ``tokenizers.Tokenizer`` as transformers makes it of a BERT folder; None if the folder is no such one.

    Args:
        symbols_apart: as PaddleNLP's, but for characters that only newer versions of Unicode know.

    Raises:
        OSError, ValueError: the files cannot be read.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    settings = json_files.read_object(folder / "tokenizer_config.json")
    kinds = ("BertTokenizer", "BertTokenizerFast") + (("ErnieTokenizer",) if symbols_apart else ())
    if not (folder / "vocab.txt").is_file() or settings.get("tokenizer_class", kinds[0]) not in kinds:
        return None
    if (folder / "added_tokens.json").is_file() or any(
        settings.get(name, allowed[0]) not in allowed for name, allowed in _PLAIN_SETTINGS.items()
    ):
        return None
    vocabulary = _read_vocabulary(folder / "vocab.txt")
    special = {name: _content(settings.get(name, usual)) for name, usual in _SPECIAL.items()}
    if not {special[name] for name in _NEEDED} <= vocabulary.keys():
        return None
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
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
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no UTF-8 text; expected a token a line") from None
    return {token: number for number, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}


def _content(token: str | dict) -> str:
    return token.get("content", "") if isinstance(token, dict) else str(token)
