"""A vocabulary without tokenizer.json is read as the library does that its weights belong to."""

import json
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_word_cache import bare_vocabulary, nasty_texts, vocabulary

from utils.models.tokenizers import tokenizer as tokenizing
from utils.models.tokenizers import wordpiece
from utils.training import export


def _tokens(tokenizer, text: str) -> list[str]:
    return [vocabulary()[number] for number in tokenizer([text])[0]]


def test_symbols_stay_in_words_for_torch_and_not_for_paddle(tmp_path):
    folder = bare_vocabulary(tmp_path, "bert")
    for text in ("1℃", "Lost→card"):
        assert _tokens(tokenizing.load(folder, 9, for_torch=True), text)[1] == "[UNK]"
        assert _tokens(tokenizing.load(folder, 9, for_torch=False), text)[1] != "[UNK]"
    assert _tokens(tokenizing.load(folder, 9, for_torch=True), "Löst[MASK],用") == [
        "[CLS]", "lost", "[MASK]", ",", "用", "[SEP]"
    ]  # fmt: skip
    cased = bare_vocabulary(tmp_path, "bert", do_lower_case=False, unk_token={"content": "[MASK]"})
    assert _tokens(tokenizing.load(cased, 9, for_torch=True), "Lost") == ["[CLS]", "[MASK]", "[SEP]"]


@pytest.mark.parametrize("kind", ["bert", "ernie"])
@pytest.mark.parametrize("lower", [True, False])
def test_an_export_reads_texts_as_paddlenlp_does(tmp_path, kind, lower):
    folder = bare_vocabulary(tmp_path, kind, do_lower_case=lower)
    written = tmp_path / "export"
    written.mkdir()
    export.write_tokenizer(SimpleNamespace(tokenizer_folder=folder, is_torch=False), written, for_torch=True)
    ours, exported = (tokenizing.load(f, 64, for_torch=f is written) for f in (folder, written))
    assert type(ours) is not type(exported)
    # Characters that both libraries' tables know.
    known = unicodedata.ucd_3_2_0.category
    texts = ["".join(c for c in text if known(c) != "Cn") for text in nasty_texts(400, seed=3)]
    for text, a, b in zip(texts, ours(texts), exported(texts), strict=True):
        assert list(a) == list(b), text


def test_a_trained_folder_reads_texts_as_its_base_did(tmp_path):
    folder = bare_vocabulary(tmp_path, "bert")
    for base_is_torch in (True, False):
        for for_torch in (True, False):
            written = tmp_path / "written"
            written.mkdir()
            base = SimpleNamespace(tokenizer_folder=folder, is_torch=base_is_torch)
            export.write_tokenizer(base, written, for_torch)
            assert (written / "tokenizer.json").is_file() == (base_is_torch != for_torch)
            before, after = (
                tokenizing.load(f, 9, torch) for f, torch in ((folder, base_is_torch), (written, for_torch))
            )
            assert _tokens(before, "1℃ card") == _tokens(after, "1℃ card")
            shutil.rmtree(written)


def test_what_is_not_plain_is_left_to_paddlenlp(tmp_path):
    assert wordpiece.build(bare_vocabulary(tmp_path, "bert"), symbols_apart=False) is not None
    assert wordpiece.build(bare_vocabulary(tmp_path, "ernie"), symbols_apart=False) is None
    assert wordpiece.build(bare_vocabulary(tmp_path, "bert", do_basic_tokenize=False), symbols_apart=False) is None
    assert wordpiece.build(bare_vocabulary(tmp_path, "bert", sep_token="</s>"), symbols_apart=False) is None
    folder = bare_vocabulary(tmp_path, "bert")
    (folder / "added_tokens.json").write_text(json.dumps({"<q>": 90}))
    assert wordpiece.build(folder, symbols_apart=False) is None
    assert wordpiece.build(Path(tmp_path / "nowhere"), symbols_apart=False) is None


def test_settings_may_begin_with_a_byte_order_mark(tmp_path, tiny_model):
    """As ``checkpoint`` lets them, whichever tokenizer reads them next."""
    bare = bare_vocabulary(tmp_path, "bert", do_lower_case=False, pad_token="[UNK]")
    rust = Path(shutil.copytree(tiny_model, tmp_path / "rust"))
    for folder in (bare, rust):
        before = tokenizing.load(folder, 9, for_torch=True)
        path = folder / "tokenizer_config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        after = tokenizing.load(folder, 9, for_torch=True)
        assert _tokens(before, "Card card") == _tokens(after, "Card card") and before.pad_id == after.pad_id


def test_added_tokens_are_not_split(tmp_path):
    """Numbers and ids as transformers 5 gives them."""
    n, five = len(vocabulary()), {str(i): {"content": word, "special": True} for i, word in enumerate(vocabulary()[:5])}
    texts = ["<q> card", "lost<q>card", "<Q> <d>"]
    for settings, expected in (
        ({"added_tokens_decoder": five}, [[2, 1, 23, 1, 6, 3], [2, 5, 1, 23, 1, 6, 3], [2, 1, 23, 1, 1, 10, 1, 3]]),
        (
            {"added_tokens_decoder": five | {str(n): {"content": "<q>", "special": True}}},
            [[2, n, 6, 3], [2, 5, n, 6, 3], [2, 1, 23, 1, 1, 10, 1, 3]],
        ),
        (
            {"added_tokens_decoder": {str(n): {"content": "<Q>", "normalized": True, "single_word": True}}},
            [[2, n, 6, 3], [2, 5, 1, 23, 1, 6, 3], [2, n, 1, 10, 1, 3]],
        ),
        (
            {"added_tokens_decoder": None, "additional_special_tokens": ["<q>", {"content": "<d>"}]},
            [[2, n, 6, 3], [2, 5, n, 6, 3], [2, 1, 23, 1, n + 1, 3]],
        ),
        (
            {"extra_special_tokens": {"query_token": "<q>"}},
            [[2, n, 6, 3], [2, 5, n, 6, 3], [2, 1, 23, 1, 1, 10, 1, 3]],
        ),
    ):
        folder = bare_vocabulary(tmp_path, "bert", **settings)
        assert [list(ids) for ids in tokenizing.load(folder, 9, for_torch=True)(texts)] == expected
    assert wordpiece.build(folder, symbols_apart=True) is None  # which PaddleNLP reads in a way of its own


def test_settings_that_are_null_are_not_there(tmp_path):
    names = ("do_lower_case", "tokenize_chinese_chars", "strip_accents", "added_tokens_decoder", "mask_token")
    folder = bare_vocabulary(tmp_path, "bert", **dict.fromkeys(names))
    assert _tokens(tokenizing.load(folder, 9, for_torch=True), "Löst用") == ["[CLS]", "lost", "用", "[SEP]"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes'; expected true or false"),
        ({"strip_accents": 0}, "strip_accents is 0; expected true or false"),
        ({"tokenize_chinese_chars": []}, r"tokenize_chinese_chars is \[\]; expected true or false"),
        ({"added_tokens_decoder": ["<q>"]}, "its added tokens cannot be read"),
        ({"added_tokens_decoder": {"x": {"content": "<q>"}}}, "its added tokens cannot be read"),
        ({"added_tokens_decoder": {"9": "<q>"}}, "its added tokens cannot be read"),
        ({"additional_special_tokens": 3}, "its added tokens cannot be read"),
        ({"added_tokens_decoder": {"9": {"content": "<q>"}}}, "has '<q>' as 9; expected 95, its place in vocab.txt or"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_file(tmp_path, settings, message):
    folder = bare_vocabulary(tmp_path, "bert", **settings)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*" + message):
        tokenizing.load(folder, 9, for_torch=True)


def test_damaged_files_are_named(tmp_path):
    folder = bare_vocabulary(tmp_path, "bert")
    (folder / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: is no UTF-8 text"):
        tokenizing.load(folder, 9, for_torch=True)
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: cannot be read"):
        tokenizing.load(folder, 9, for_torch=True)
