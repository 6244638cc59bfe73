"""Of a long text only a part is tokenised, and its ids are those of the whole text, cut to the limit."""

import random
import time

import pytest
import tokenizers
from test_word_cache import KINDS, nasty_texts
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from utils.models.tokenizers import tokenizer as tokenizing

# As GPT's and its successors' are: white space looks at what follows, digits are grouped from the right.
_GPT = r"'s|'t| ?\p{L}+|\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(folder, splitters=(), normalizer=None, model=None):
    """Without ``splitters`` a whole text is one word, as it is for Llama."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splitters, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [*nasty_texts(200, seed=9), "a     b\n\n\n\n\n12345678 ......", "lost cards 111 " * 9], trainer
    )
    tokenizer.add_special_tokens(["<|end_of_a_text|>", tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([tokenizers.AddedToken("two words", normalized=True)])
    end = ("<|end_of_a_text|>", tokenizer.token_to_id("<|end_of_a_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


_SPLIT = pre_tokenizers.Split(tokenizers.Regex(_GPT), "isolated")
ALL = KINDS | {
    "gpt": lambda folder: _byte_level(folder, [_SPLIT], normalizers.NFC()),
    "digits one by one": lambda folder: _byte_level(folder, [pre_tokenizers.Digits(True), _SPLIT]),
    "one word": _byte_level,
    "strip": lambda folder: _byte_level(folder, [pre_tokenizers.Whitespace()], normalizers.Strip()),
}


def _long_texts(count: int, longest: int, seed: int) -> list[str]:
    """Texts whose parts end in all kinds of runs: blanks, tables, digits, dots, added tokens, marks."""
    rng = random.Random(seed)
    nasty = nasty_texts(count, seed)
    columns = ["revenue", "12,345", "net", "用", "a\u0301", "<mask>", "<|end_of_a_text|>", "[SEP]", "two words"]
    kinds = [
        lambda: rng.choice("\n \t\u3000") * rng.randrange(longest),
        lambda: "".join(f"{rng.choice(columns):{rng.randrange(1, 90)}}" for _ in range(rng.randrange(30))),
        lambda: rng.choice("1.用a\u0301") * rng.randrange(longest),
        lambda: " ".join(rng.choices(nasty, k=rng.randrange(40))),
        lambda: "lost cards, " * rng.randrange(longest // 12),
    ]
    return ["".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 5))) + rng.choice(nasty) for _ in range(count)]


def _whole(folder, texts, max_length: int, tokenizer) -> list[list[int]]:
    """The ids of a new tokenizer that nothing is cut for, or of PaddleNLP's."""
    if not (folder / "tokenizer.json").is_file():
        return [tokenizer._tokenizer(text, max_length=max_length, truncation=True)["input_ids"] for text in texts]
    fresh = tokenizing.read(folder)
    fresh.enable_truncation(max_length)
    return [encoding.ids for encoding in fresh.encode_batch(texts)]


@pytest.mark.parametrize("kind", ALL)
def test_the_ids_are_those_of_the_whole_text(tmp_path, kind):
    folder = ALL[kind](tmp_path)
    count = 60 if "paddlenlp" in kind else 200
    for max_length in (3, 4, 9, 24):
        tokenizer = tokenizing.load(folder, max_length, for_torch=False)
        texts = _long_texts(count, max_length * 200, seed=max_length)
        assert sum(len(text) > 64 * max_length for text in texts) > count / 2
        whole = _whole(folder, texts, max_length, tokenizer)
        for ids in (tokenizer(texts), tokenizer.uncached(texts)):
            for text, found, expected in zip(texts, ids, whole, strict=True):
                assert list(found) == list(expected), text


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "gpt"])
def test_the_beginning_of_a_huge_text_is_enough(tmp_path, kind):
    """Tokenising these 10 MB whole takes seconds."""
    tokenizer = tokenizing.load(ALL[kind](tmp_path), 512, for_torch=False)
    text = "lost cards, lost\u3000card " * 500_000
    for encode in (tokenizer, tokenizer.uncached):
        started = time.process_time()
        (ids,) = encode([text])
        assert len(ids) == 512 and time.process_time() - started < 0.5


@pytest.mark.parametrize("blank", ["\n", " " * 90])
def test_a_sentence_after_blanks_is_read(tmp_path, blank):
    tokenizer = tokenizing.load(ALL["bert"](tmp_path), 16, for_torch=False)
    assert [list(ids) for ids in tokenizer([blank * 5000 + "lost card"])] == [[2, 5, 6, 3]]
