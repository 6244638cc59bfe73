"""Small inputs and a tiny checkpoint that every test can make for itself."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.process import runtime  # noqa: E402

runtime.prepare()
# Tests that were started in the background ignore it otherwise, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOPICS = ("loan", "card", "river", "list", "train", "visa", "soup", "phone", "star", "shirt", "fever", "wage")
FILLERS = (
    "how",
    "do",
    "i",
    "the",
    "a",
    "where",
    "is",
    "my",
    "new",
    "old",
    "lost",
    "big",
    "fast",
    "get",
    "open",
    "close",
)


def write_jsonl(path: Path, rows: list) -> str:
    """Rows as JSON lines; returns the path as text."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def make_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows over a small vocabulary, so that near-duplicates and exact copies abound."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [*rng.choice(FILLERS, rng.integers(1, 6)), *rng.choice(TOPICS, rng.integers(1, 3))]
        rng.shuffle(words)
        query = " ".join(words) if i % 10 < 9 else rows[rng.integers(0, i)]["query"]
        rows.append({"query": query, "pos_passage": [f"{query} answer {i}"], "neg_passage": [], "id": i})
    return rows


@pytest.fixture
def rows() -> list[dict]:
    return make_rows(300)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A random two-layer BERT with a word-level tokenizer, as a Hugging Face folder."""
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def make_tiny_bert(
    folder: Path, hidden: int = 32, layers: int = 2, ffn: int = 64, positions: int = 64, labels: int = 0
) -> str:
    """``labels`` above 0 adds a classification head with that many logits, over pairs of texts."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *TOPICS, *FILLERS, "answer", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "intermediate_size": ffn, "vocab_size": len(words),
        "max_position_embeddings": positions, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
    }  # fmt: skip
    if labels:
        config |= {"architectures": ["BertForSequenceClassification"], "num_labels": labels}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "do_lower_case": True})
    )
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    ones, zeros = np.ones(hidden, np.float32), np.zeros(hidden, np.float32)
    weights = {
        "embeddings.word_embeddings.weight": normal(len(words), hidden),
        "embeddings.position_embeddings.weight": normal(positions, hidden) / 4,
        "embeddings.token_type_embeddings.weight": normal(2, hidden) / 4,
        "embeddings.LayerNorm.weight": ones,
        "embeddings.LayerNorm.bias": zeros,
    }
    for i in range(layers):
        sizes = {
            "attention.self.query": (hidden, hidden), "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden), "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (ffn, hidden), "output.dense": (hidden, ffn),
        }  # fmt: skip
        for name, shape in sizes.items():
            weights[f"encoder.layer.{i}.{name}.weight"] = normal(*shape)
            weights[f"encoder.layer.{i}.{name}.bias"] = normal(shape[0])
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            weights[f"encoder.layer.{i}.{name}.weight"] = ones + normal(hidden)
            weights[f"encoder.layer.{i}.{name}.bias"] = normal(hidden)
    if labels:
        weights = {f"bert.{name}": value for name, value in weights.items()}
        weights |= {"bert.pooler.dense.weight": normal(hidden, hidden), "bert.pooler.dense.bias": zeros}
        weights |= {"classifier.weight": normal(labels, hidden) * 10, "classifier.bias": normal(labels)}
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / "model.safetensors")
    return str(folder)


def run_script(script: str, *arguments, nproc: int = 1, cwd=ROOT, timeout: float = 300, **popen):
    """Run a script alone or under the launcher; returns the finished process with its output."""
    command = script_command(script, *arguments, nproc=nproc)
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=script_env(), check=False, **popen
    )


def script_command(script: str, *arguments, nproc: int = 1) -> list[str]:
    command = [sys.executable]
    if nproc > 1:
        log = str(Path(tempfile.gettempdir()) / f"launch-log-{os.getpid()}")
        command += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(nproc), "--log_dir", log]
    return [*command, str(ROOT / script), *map(str, arguments)]


def script_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(params=["float32", "bfloat16", "amx"])
def arithmetic(request, monkeypatch) -> str:
    """What the screening products are made in, and by."""
    from utils.kernels import onednn
    from utils.kernels.amx import tiles

    if request.param != "float32" and not onednn.bfloat16_is_fast():
        pytest.skip("this processor has no bfloat16 products")
    if request.param == "amx" and not tiles.is_usable():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(onednn, "bfloat16_is_fast", lambda: request.param != "float32")
    if request.param != "amx":
        monkeypatch.setattr(tiles, "is_usable", lambda: False)
    return request.param


def resident(array):
    """How much of the file that an array lies in is in this process's memory now, in bytes."""
    address = f"{array.__array_interface__['data'][0] // 4096 * 4096:x}"
    with open("/proc/self/smaps", encoding="utf-8") as stream:
        for line in stream:
            if line.startswith(address):
                return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("Rss:"))
    raise AssertionError("not mapped")
