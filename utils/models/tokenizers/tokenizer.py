"""Texts to token ids: the Rust tokenizer where the checkpoint has one or is BERT's, else PaddleNLP's."""

import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ...files import json_files
from . import settings, word_cache, wordpiece

# Words and what stands between them. A tokenizer's rules look no further than the next of these.
_RUNS = re.compile(r"\s+|\d+|[^\W\d_]+|(?:[^\w\s]|_)+")
# So many at the end of a cut text may be tokenised otherwise than in the whole text.
_UNSETTLED_RUNS = 3


class Tokenizer(Protocol):
    """pad_id fills up a batch."""

    pad_id: int

    def __call__(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Token ids of each text, special tokens included, cut to the length limit."""


def load(folder: Path, max_length: int, for_torch: bool) -> Tokenizer:
    """The tokenizer in a checkpoint's folder, cutting texts to ``max_length`` tokens.

    Args:
        for_torch: whether a vocabulary without ``tokenizer.json`` is read as transformers does, not PaddleNLP.

    Raises:
        OSError, ValueError: its files cannot be read.
    """
    settings.check(folder)
    built = read(folder) if (folder / "tokenizer.json").is_file() else None
    if built is None and for_torch:
        built = wordpiece.build(folder, symbols_apart=False)
    return _PaddleTokenizer(folder, max_length) if built is None else _RustTokenizer(built, folder, max_length)


def read(folder: Path):
    """The ``tokenizers.Tokenizer`` that a folder's ``tokenizer.json`` describes."""
    import tokenizers

    try:
        return settings.apply(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), folder)
    except (OSError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'}: cannot be read ({error})") from None


def padded(tokens: Sequence[Sequence[int]], pad_id: int, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as ids int64 [b, width], padded to the right, and lengths int64 [b].

    Args:
        width: at least the longest list's length, which it is by default.
    """
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    ids = np.full((len(tokens), width or int(lengths.max())), pad_id, np.int64)
    for row, own in zip(ids, tokens, strict=True):
        row[: len(own)] = own
    return ids, lengths


class _RustTokenizer:
    def __init__(self, tokenizer, folder: Path, max_length: int):
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._max_length = max_length
        added = [len(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        self._longest_added = max(added, default=0)
        self.pad_id = _pad_id(self._tokenizer, folder)
        self._encode = word_cache.of_rust(self._tokenizer, self.uncached, max_length) or self.uncached

    def __call__(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return self._encode(texts)

    def uncached(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids as of the whole texts. Of long ones a part is tokenised, and more of those that it does not settle."""
        ids = {}
        for end in word_cache.parts(self._max_length):
            long = [row for row, text in enumerate(texts) if len(text) > end and row not in ids]
            parts = [texts[row][:end] for row in long]
            for row, part, encoding in zip(long, parts, self._tokenizer.encode_batch(parts), strict=True):
                if _is_settled(encoding, _settled_length(part[: len(part) - self._longest_added])):
                    ids[row] = encoding.ids
        left = [row for row in range(len(texts)) if row not in ids]
        whole = self._tokenizer.encode_batch_fast([texts[row] for row in left])
        ids |= {row: encoding.ids for row, encoding in zip(left, whole, strict=True)}
        return [ids[row] for row in range(len(texts))]


def _settled_length(part: str) -> int:
    """How many characters at the beginning of a text have the same tokens however the text goes on."""
    runs = deque(_RUNS.finditer(part), maxlen=_UNSETTLED_RUNS)
    return runs[0].start() if len(runs) == _UNSETTLED_RUNS else 0


def _is_settled(encoding, length: int) -> bool:
    """Whether another word begins within the first ``length`` characters, after the last word of the tokens kept."""
    last = max((word for word in encoding.word_ids if word is not None), default=-1)
    return any(
        word is not None and word > last and start < length
        for beyond in encoding.overflowing
        for word, (start, _) in zip(beyond.word_ids, beyond.offsets, strict=True)
    )


def _pad_id(tokenizer, folder: Path) -> int:
    """Padding is masked, so any valid id will do where the checkpoint names none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json_files.read_object(folder / name).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is not None:
            return number
    for token in ("<pad>", "[PAD]", "<|endoftext|>"):
        number = tokenizer.token_to_id(token)
        if number is not None:
            return number
    return 0


class _PaddleTokenizer:
    def __init__(self, folder: Path, max_length: int):
        from ..paddlenlp import load_tokenizer

        self._tokenizer = load_tokenizer(folder)
        self._max_length = max_length
        self.pad_id = self._tokenizer.pad_token_id or 0
        self._encode = word_cache.of_paddlenlp(self._tokenizer, self.uncached, max_length) or self.uncached

    def __call__(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return self._encode(texts)

    def uncached(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [self._tokenizer(text, max_length=self._max_length, truncation=True)["input_ids"] for text in texts]
