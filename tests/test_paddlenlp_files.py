"""What PaddleNLP's own files mean here: its losses, its prompts for Qwen, and its other arguments."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import read_jsonl, run_script, write_jsonl

from utils.arguments import paddlenlp_keys
from utils.arguments.fields import ArgumentError, build
from utils.arguments.training import training_arguments
from utils.encoding.encoder import pooling_weights
from utils.models import checkpoint, loading, paddlenlp
from utils.training import job
from utils.training import rows as training_rows
from utils.training.plan import Plan

ROWS = [
    {"query": f"how is card {i}", "pos_passage": [f"visa {i} answer"], "neg_passage": [f"soup {i}", f"star {i}"]}
    for i in range(37)
]
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2Model"], "vocab_size": 160, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tiny_model, tmp_path_factory) -> str:
    import paddle

    folder = tmp_path_factory.mktemp("qwen")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(Path(tiny_model) / name, folder)
    (folder / "config.json").write_text(json.dumps(QWEN))
    kept = folder / "model_state.pdparams"
    kept.touch()
    fresh = paddlenlp.new_model(checkpoint.resolve(str(folder)), "float32")
    rng = np.random.default_rng(0)
    state = {name: paddle.to_tensor(rng.normal(0, 0.3, w.shape), "float32") for name, w in fresh.state_dict().items()}
    paddle.save(state, str(kept))
    return str(folder)


def embedded(folder: str, texts: list[str], pooling: str) -> np.ndarray:
    """Unit vectors by PaddleNLP's model, one text at a time."""
    import paddle

    model = loading.load_model(checkpoint.resolve(folder))
    model.eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    found = []
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids])
        hidden = paddlenlp.first_output(model(paddle.to_tensor(ids))).numpy()[0].astype(np.float64)
        vector = pooling_weights(np.array([ids.shape[1]]), ids.shape[1], pooling)[0] @ hidden
        found.append(vector / np.linalg.norm(vector))
    return np.array(found)


def in_batch_loss(queries: np.ndarray, passages: np.ndarray, temperature: float) -> float:
    """As PaddleNLP writes it: cross-entropy of each query's positive among all passages, the mean over queries."""
    scores = queries @ passages.T / temperature
    places = np.arange(len(queries)) * (len(passages) // len(queries))
    return float(np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(queries)), places]))


@pytest.mark.parametrize(
    ("kind", "n_ranks", "batch", "accumulated", "options"),
    [
        ("bert", 1, 2, 4, {}),
        ("bert", 1, 8, 1, {"loss_type": "inf_cl"}),
        ("bert", 1, 1, 4, {"group_size": 1, "warmup_steps": 20}),
        ("qwen", 1, 2, 4, {}),
        ("qwen", 1, 1, 4, {"loss_type": "inf_cl", "query_template": "{text}", "passage_template": "{text}"}),
        ("bert", 2, 2, 4, {}),
    ],
)
def test_losses_are_paddlenlps_over_the_accumulated_batch(
    kind, n_ranks, batch, accumulated, options, tiny_model, qwen, tmp_path
):
    """At rate 0, so that each step's loss is of the weights that the reference has too."""
    folder = qwen if kind == "qwen" else tiny_model
    given = {
        "model_name_or_path": folder, "dataset_name_or_path": write_jsonl(tmp_path / "rows.jsonl", ROWS),
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": batch, "group_size": 3,
        "gradient_accumulation_steps": accumulated, "learning_rate": 0.0, "logging_steps": 1, "dropout": 0.0,
        "save_strategy": "no", "report_to": "none",
    } | options  # fmt: skip
    if n_ranks == 1:
        job.train(build(training_arguments(), **given))
    else:
        (tmp_path / "given.json").write_text(json.dumps(given))
        done = run_script("run_embedding.py", tmp_path / "given.json", nproc=n_ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    logged = [entry["loss"] for entry in read_jsonl(tmp_path / "out" / "training.jsonl") if "loss" in entry]

    rows = training_rows.read([given["dataset_name_or_path"]], None, "error", False)
    plan = Plan(rows, batch * accumulated * n_ranks, given["group_size"], seed=42, n_ranks=n_ranks)
    query, passage = "{text}", "{text}"
    if kind == "qwen" and "query_template" not in options:
        query = "Query: {text}\nUse one word to summarize the query's relevant information. The word is: \""
        passage = "Text: {text}\nUse one word to summarize the text's content. The word is: \""
    pooling = "last" if kind == "qwen" else checkpoint.resolve(folder).pooling
    temperature = 1.0 if "loss_type" in options else 0.02
    queries = embedded(folder, [query.replace("{text}", text) for text in rows.queries], pooling)
    passages = embedded(folder, [passage.replace("{text}", text) for text in rows.passages], pooling)
    expected = [
        in_batch_loss(
            queries[[example.query_id for example in examples]],
            passages[np.concatenate([example.passages for example in examples])],
            temperature,
        )
        for examples in plan.epoch(0)
    ]
    assert len(logged) == len(expected)
    np.testing.assert_allclose(logged, expected, atol=1e-4, rtol=1e-4)


def run(tiny_model, tmp_path, **options):
    given = {
        "model_name_or_path": tiny_model, "dataset_name_or_path": write_jsonl(tmp_path / "rows.jsonl", ROWS),
        "output_dir": str(tmp_path / "out"), "max_steps": 1, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    return job.train(build(training_arguments(), **given | options))


def test_qwens_prompts_are_told_of_and_give_way(qwen, tmp_path, caplog):
    caplog.set_level("INFO")
    run(qwen, tmp_path)
    assert "query_template is PaddleNLP's for Qwen models: 'Query: {text}\\nUse one word" in caplog.text
    assert "would add the end token" not in caplog.text
    caplog.clear()
    run(qwen, tmp_path, query_template="a {text}", passage_template="b {text}", overwrite_output_dir=True)
    assert "PaddleNLP's for Qwen" not in caplog.text
    assert "passage texts end where the tokenizer ends them; PaddleNLP would add the end token" in caplog.text


def theirs() -> dict[str, object]:
    """Every argument of its configurations with its default."""
    import dataclasses

    paddlenlp.import_paddlenlp()
    from paddlenlp.trl import DataConfig, ModelConfig, SFTConfig

    return {f.name: f.default for cls in (ModelConfig, DataConfig, SFTConfig) for f in dataclasses.fields(cls)}


def test_each_of_paddlenlps_arguments_is_known():
    """But for those of texts and models that are generated from, or made otherwise than from a file."""
    missing = theirs().keys() - training_arguments().__dataclass_fields__.keys()
    assert missing == {
        "dataset_text_field", "max_seq_length", "model_init_kwargs", "dataset_kwargs", "no_recompute_layers",
    }  # fmt: skip


def test_its_defaults_say_nothing(tiny_model, tmp_path, caplog):
    caplog.set_level("INFO")
    given = {name: value for name, value in theirs().items() if name in paddlenlp_keys.KEYS}
    assert len(given) > 60
    run(tiny_model, tmp_path, **given, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert "without effect" not in caplog.text


OTHER = {bool: True, int: 7, float: 0.125, str: "some"}


@pytest.mark.parametrize("name", sorted(paddlenlp_keys.KEYS))
def test_other_values_are_refused_or_told_of_in_one_line(name):
    key = paddlenlp_keys.KEYS[name]
    value = not key.harmless[0] if key.kind is bool and key.harmless else OTHER[key.kind]
    if key.is_refused:
        with pytest.raises(ArgumentError, match=f"^{name} is .*; not supported here: "):
            build(training_arguments(), **{name: value})
    else:
        given = build(training_arguments(), **{name: value})
        assert paddlenlp_keys.without_effect(vars(given)) == f"{name} ({key.why})"


def test_what_has_no_effect_is_in_one_line(tiny_model, tmp_path, caplog):
    caplog.set_level("INFO")
    run(tiny_model, tmp_path, fuse_attention_qkv=True, flash_mask=True, src_length=512, intokens=True)
    (line,) = [message for message in caplog.messages if "without effect" in message]
    assert all(name in line for name in ("fuse_attention_qkv, flash_mask", "src_length", "intokens"))


def test_paddlenlps_dropout_and_decay_have_their_meaning(tiny_model, tmp_path, monkeypatch):
    shares, load = [], job.TrainableEncoder
    monkeypatch.setattr(job, "TrainableEncoder", lambda *args: shares.append(args[5]) or load(*args))
    run(
        tiny_model, tmp_path, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25, max_steps=4, decay_steps=8,
        warmup_ratio=0.0, logging_steps=1, learning_rate=1e-4, per_device_train_batch_size=8,
    )  # fmt: skip
    assert shares == [0.25]
    logs = read_jsonl(tmp_path / "out" / "training.jsonl")
    rates = [entry["learning_rate"] for entry in logs if "learning_rate" in entry]
    np.testing.assert_allclose(rates, [1e-4 * (8 - s) / 8 for s in range(4)])
    for options in (
        {"hidden_dropout_prob": 0.1},
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "dropout": 0.1},
    ):
        with pytest.raises(ArgumentError, match="expected the first two alike, or dropout alone"):
            build(training_arguments(), **options)
