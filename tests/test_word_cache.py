"""Token ids put together from words must be the tokenizer's own, whatever is in the text."""

import json
import random
import unicodedata

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from utils.models import bundled
from utils.models.tokenizers import tokenizer as tokenizing
from utils.models.tokenizers import word_cache

ALPHABET = "".join(map(chr, [*range(0x20, 0x7F)] * 5 + [*range(0x3100)] + [*range(0x4E00, 0xA000, 97)] * 2))
ALPHABET += "".join(map(chr, [*range(0xAC00, 0xD7A3, 197), *range(0xF900, 0x10000), *range(0x1F1E6, 0x1F700, 7)]))
# What is told apart or joined across a word's ends: marks, joiners, special tokens, spaces of all kinds, lower case.
PIECES = ["[SEP]", "<mask>", "</s>", "[MASK]", "  ", "\u3000", "\n", "\x06", "\u200d", "\u0301", "\u3099", "\u0e33"]
PIECES += ["\u0600", "\uff9e", "ΑΣ", "Σ'", "İ", "ﷺ", "龥", "\u9fef", "\ufaf5", "信用卡丢了怎么挂失", "lost cards"]


def nasty_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def piece() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(PIECES)
        characters = ALPHABET if kind < 0.6 else ALPHABET[: 95 * 5]
        return "".join(rng.choices(characters, k=rng.randrange(1, 7)))

    return [rng.choice(["", " "]).join(piece() for _ in range(rng.randrange(16))) for _ in range(count)]


def vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lost", "card", *letters, *"信用卡丢了怎么挂失龥'.,?[]"]
    return words + ["##" + letter for letter in letters]


def _bert(folder, **normalizer):
    numbers = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(vocabulary()[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _xlm_roberta(folder, pre_tokenizer=None):
    tokenizer = tokenizers.Tokenizer.from_file(str(bundled.build() / "tokenizer.json"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bare_vocabulary(folder, kind, **settings):
    """A folder that holds a vocabulary and no tokenizer.json."""
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": len(vocabulary())}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": f"{kind.title()}Tokenizer", "do_lower_case": True} | settings)
    )
    return folder


KINDS = {
    "bert": _bert,
    "bert, cased": lambda folder: _bert(folder, lowercase=False),
    "bert, accents kept": lambda folder: _bert(folder, strip_accents=False, clean_text=False),
    "xlm-roberta": _xlm_roberta,
    "xlm-roberta, spaces kept": lambda folder: _xlm_roberta(folder, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "paddlenlp bert": lambda folder: bare_vocabulary(folder, "bert"),
    "paddlenlp ernie": lambda folder: bare_vocabulary(folder, "ernie", do_lower_case=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_as_without(tmp_path, kind):
    folder = KINDS[kind](tmp_path)
    count = 200 if "paddlenlp" in kind else 1500
    for max_length in (3, 4, 9, 512):
        tokenizer = tokenizing.load(folder, max_length, for_torch=False)
        assert isinstance(tokenizer._encode, word_cache.WordCache)
        assert tokenizer._encode._joined("lost cards, lost\u3000card") is not None
        for texts in (nasty_texts(count, seed=max_length), nasty_texts(count, seed=1)):
            for text, ids, expected in zip(texts, tokenizer(texts), tokenizer.uncached(texts), strict=True):
                assert list(ids) == list(expected), text


@pytest.mark.parametrize("pre_tokenizer", [None, pre_tokenizers.Metaspace(prepend_scheme="always")])
def test_a_character_taken_for_plain_stays_apart(tmp_path, pre_tokenizer):
    tokenizer = tokenizers.Tokenizer.from_file(str(_xlm_roberta(tmp_path, pre_tokenizer) / "tokenizer.json"))
    plain = [chr(point) for point in range(0x21, 0x10000) if word_cache._is_plain(chr(point))]
    assert len(plain) > 10_000 and "，" in plain and unicodedata.lookup("COMBINING ACUTE ACCENT") not in plain

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    (outside,) = encode(["a"])
    contexts = [f"a {character} a" for character in plain]
    for character, alone, between in zip(plain, encode(plain), encode(contexts), strict=True):
        assert between == outside + alone + outside, f"U+{ord(character):04X}"


def test_kinds_that_are_not_known_stay_whole(tmp_path):
    def cached(tokenizer) -> bool:
        return word_cache.of_rust(tokenizer, lambda texts: [[]] * len(texts), 8) is not None

    for settings, expected in (({}, True), ({"handle_chinese_chars": False}, False)):
        folder = _bert(tmp_path, **settings)
        assert cached(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))) is expected
    tokenizer = tokenizers.Tokenizer.from_file(str(_bert(tmp_path) / "tokenizer.json"))
    tokenizer.add_tokens([tokenizers.AddedToken("lost card", normalized=True)])
    assert not cached(tokenizer)
    assert not cached(tokenizers.Tokenizer(models.BPE()))
    for pre_tokenizer in (pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Whitespace()):
        folder = _xlm_roberta(tmp_path, pre_tokenizer)
        assert not cached(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    (tmp_path / "tokenizer.json").unlink()
    paddlenlp = tokenizing.load(bare_vocabulary(tmp_path, "bert", do_basic_tokenize=False), 8, for_torch=True)
    assert paddlenlp._encode == paddlenlp.uncached


def test_given_up_where_words_do_not_come_again():
    calls = []

    def whole(texts):
        calls.append(len(texts))
        return [[0, *map(len, text.split()), 1] for text in texts]

    cache = word_cache.WordCache(whole, lambda text: [len(text)], word_cache.bert_words, [], 512)
    calls.clear()
    for start in range(0, word_cache._TRIED_WORDS + 1, 500):
        cache([" ".join(f"{start + n}" for n in range(500))])
    assert calls == []
    cache(["a b"])
    assert calls == [1]
