"""Each word tokenised once: a text's token ids put together from those of its words.

Tokenizers of BERT's and XLM-RoBERTa's kind take a text apart into words first and look at each by itself, and most
words of a text have been seen before. Looking them up is several times faster than the library's work on each text
(normalising, cutting, searching the vocabulary), and gives the same ids. Where a text cannot be taken apart safely,
the library gets it whole.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

# Words that are kept: some 40 MB. Text in any language soon repeats itself.
_MOST_WORDS = 1 << 17
# Longer ones, such as a sentence in a script without spaces, hardly come twice.
_LONGEST_WORD = 48
# After so many words, a cache that had to encode more than this part of them is given up: it takes longer.
_TRIED_WORDS = 50_000
_MOST_NEW = 0.25

# Of a long text, so many characters a wanted token are looked at, then so many, then all. No vocabulary has many
# pieces longer than the first, so that a text of megabytes is hardly ever tokenised whole to keep its first 512 tokens.
_CHARACTERS_PER_TOKEN = (64, 512)

# Categories of Unicode in which no character joins what stands beside it; other letters need a look at their script.
_PLAIN = {"Lu", "Ll", "Nd", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sc", "Sm"}

# What every kind of BERT tokenizer sets apart or leaves out, whatever stands beside it: white space, and the Chinese
# characters that were there before the tokenizers' tables were made (they drop later ones as unassigned). Words may
# hold more that is taken apart, such as punctuation.
_HAN = r"\u3400-\u4db5\u4e00-\u9fa5"
_BERT_WORDS = re.compile(rf"[{_HAN}]|[^ \t\n\r{_HAN}]+")

Ids = Sequence[int]


class WordCache:
    """Token ids of texts, special tokens included and cut to a limit, as ``whole`` gives them.

    Args:
        whole: the ids of each text, special tokens included, cut to ``max_length``.
        encode: the ids of one text, without special tokens and uncut.
        split: a text's words, so that its ids are those of its words in turn, or None if it must stay whole.
        special: what the tokenizer looks for in a text before it looks for words.
        stands_alone: whether a word has the same ids whatever words stand beside it.
    """

    def __init__(
        self,
        whole: Callable[[Sequence[str]], list[Ids]],
        encode: Callable[[str], Ids],
        split: Callable[[str], Sequence[str] | None],
        special: Iterable[str],
        max_length: int,
        stands_alone: Callable[[str], bool] = lambda word: True,
    ):
        self._whole, self._split, self._special = whole, split, tuple(special)
        self._words = _Words(encode, stands_alone)
        self._before, self._after = _frame(whole(["a"])[0], encode("a"))
        self._room = max_length - len(self._before) - len(self._after)
        self._parts = parts(max_length)
        self._longest_special = max(map(len, self._special), default=0)
        self._looked_up = 0

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        if self._looked_up > _TRIED_WORDS and self._words.encoded > _MOST_NEW * self._looked_up:
            return self._whole(texts)
        ids = [self._joined(text) for text in texts]
        left = [place for place, found in enumerate(ids) if found is None]
        if left:
            for place, found in zip(left, self._whole([texts[place] for place in left]), strict=True):
                ids[place] = found
        return ids

    def _joined(self, text: str) -> list[int] | None:
        if self._room < 1:
            return None
        for end in (*self._parts, len(text)):
            ids = self._part_joined(text, end)
            if ids is None:
                return None
            if len(ids) == self._room or len(text) <= end:
                break
        return [*self._before, *ids, *self._after]

    def _part_joined(self, text: str, end: int) -> list[int] | None:
        """The ids of the words in a text's first ``end`` characters, but for one that may go on behind them."""
        if any(special in text[: end + self._longest_special] for special in self._special):
            return None
        words = self._split(text[:end])
        if not words or len(max(words, key=len)) > _LONGEST_WORD:
            return None
        if end < len(text):
            words = words[:-1]
        self._looked_up += min(len(words), self._room)
        try:
            return list(islice(chain.from_iterable(map(self._words.__getitem__, words)), self._room))
        except _NotAlone:
            return None


class _NotAlone(Exception):
    """A word whose ids may depend on what stands beside it."""


class _Words(dict):
    """Ids by word, found when they are first asked for. Threads may share it: at worst a word is encoded twice."""

    def __init__(self, encode: Callable[[str], Ids], stands_alone: Callable[[str], bool]):
        self._encode, self._stands_alone = encode, stands_alone
        self.encoded = 0

    def __missing__(self, word: str) -> tuple[int, ...]:
        if not self._stands_alone(word):
            raise _NotAlone
        ids = tuple(self._encode(word))
        self.encoded += 1
        if len(self) >= _MOST_WORDS:
            self.clear()
        self[word] = ids
        return ids


def _frame(framed: Ids, inner: Ids) -> tuple[Ids, Ids]:
    """The special tokens before and after a text."""
    framed, inner = list(framed), list(inner)
    for start in range(len(framed)):
        end = start + len(inner)
        if inner and framed[start:end] == inner:
            return framed[:start], framed[end:]
    return framed, []  # the limit has room for no more


def parts(max_length: int) -> list[int]:
    """How many characters of a text are looked at first, and next, for so many tokens."""
    return [max_length * characters for characters in _CHARACTERS_PER_TOKEN]


def bert_words(text: str) -> list[str]:
    """Words of a text for a tokenizer that sets Chinese characters apart, as BERT's does."""
    return _BERT_WORDS.findall(text)


def of_rust(tokenizer, whole: Callable[[Sequence[str]], list[Ids]], max_length: int) -> Callable | None:
    """A cache in front of a ``tokenizers.Tokenizer``; None if it is of a kind that is not known here.

    Known are BERT's WordPiece, and XLM-RoBERTa's Unigram, of which texts without spaces stay whole.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.normalized for token in added):  # looked for in what the text becomes, and not in the text
        return None
    special = [token.content for token in added]

    def encode(text: str) -> Ids:
        return tokenizer.encode(text, add_special_tokens=False).ids

    kind = type(tokenizer.model).__name__
    normalizers, splitters = _steps(tokenizer.normalizer), _steps(tokenizer.pre_tokenizer)
    split = {"WordPiece": _wordpiece_split, "Unigram": _unigram_split}.get(kind, _no_split)(normalizers, splitters)
    if split is None:
        return None
    if kind == "WordPiece":
        return WordCache(whole, encode, split, special, max_length)
    return WordCache(whole, encode, split, special, max_length, lambda word: _stands_alone(encode, word))


def of_paddlenlp(tokenizer, whole: Callable[[Sequence[str]], list[Ids]], max_length: int) -> Callable | None:
    """A cache in front of PaddleNLP's BertTokenizer or ErnieTokenizer; None for others."""
    special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder, *tokenizer.unique_no_split_tokens}
    known = type(tokenizer).__name__ in ("BertTokenizer", "ErnieTokenizer")
    apart = getattr(getattr(tokenizer, "basic_tokenizer", None), "tokenize_chinese_chars", False)
    if not known or not apart or any(token == token.lower() for token in special):  # looked for in lower case, too
        return None
    return WordCache(
        whole, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], bert_words, special, max_length
    )


def _no_split(normalizers: list[dict], splitters: list[dict]) -> None:
    return None


def _wordpiece_split(normalizers: list[dict], splitters: list[dict]) -> Callable | None:
    kinds = [step["type"] for step in normalizers + splitters]
    known = kinds == ["BertNormalizer", "BertPreTokenizer"] and normalizers[0]["handle_chinese_chars"]
    return bert_words if known else None


def _unigram_split(normalizers: list[dict], splitters: list[dict]) -> Callable | None:
    kinds = [step["type"] for step in splitters]
    if not all(step["type"] == "Precompiled" or _joins_spaces(step) for step in normalizers):
        return None
    if kinds[-1:] != ["Metaspace"] or splitters[-1]["prepend_scheme"] != "always" or not splitters[-1]["split"]:
        return None
    if kinds == ["WhitespaceSplit", "Metaspace"]:
        return _spaced_words
    return _single_spaced_words if kinds == ["Metaspace"] else None


def _joins_spaces(step: dict) -> bool:
    return step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}


def _spaced_words(text: str) -> list[str]:
    return [word for word in text.split(" ") if word]


def _single_spaced_words(text: str) -> list[str] | None:
    """For a tokenizer that makes something of spaces at the ends and of several in a row."""
    words = text.split(" ")
    return words if all(words) else None


def _stands_alone(encode: Callable[[str], Ids], word: str) -> bool:
    """Whether a Unigram tokenizer gives a word the same ids with and without other words around it.

    A mark at its beginning, for one, is normalised together with the space before it. Letters, digits and punctuation
    at its ends are not; with others, it is tried.
    """
    if _is_plain(word[0]) and _is_plain(word[-1]):
        return True
    inside, outside = list(encode(word)), list(encode("a"))
    return (
        list(encode(f"a {word}")) == outside + inside
        and list(encode(f"{word} a")) == inside + outside
        and list(encode(f"a {word} a")) == outside + inside + outside
    )


def _is_plain(character: str) -> bool:
    """Whether a character stays apart from a space on either side, in the sense of Unicode's grapheme clusters."""
    return (
        unicodedata.category(character) in _PLAIN
        or "\u3041" <= character <= "\u3096"
        or ("\u4e00" <= character <= "\u9fa5" or "\uac00" <= character <= "\ud7a3")
    )


def _steps(part) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, as its JSON says them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state.get("normalizers") or state.get("pretokenizers") or [state]
