"""The training job from end to end, on a tiny model."""

import json
import os
import pickle
import resource
import shutil
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_rows, make_tiny_bert, read_jsonl, run_script, write_jsonl
from thread_ranks import on_ranks

from utils.arguments.scripts import ArgumentError, ModelArguments, build, parse
from utils.arguments.training import _REPORTS, training_arguments
from utils.encoding import cpu_engine, engines
from utils.encoding.embed import build_encoders
from utils.encoding.encoder import pooling_weights
from utils.kernels import onednn as matmul
from utils.models import bert_names, checkpoint, paddlenlp, pdparams, weight_files
from utils.process import own_files
from utils.training import batches, guard
from utils.training import folder as training_folder
from utils.training import job as training
from utils.training import resume as resuming
from utils.training.batches import Collator
from utils.training.encoder import TrainableEncoder
from utils.training.gradients import GradientStep

TEXTS = ["my old card is lost", "how do i open the list", "train"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A folder with train.json and dev.json."""
    folder = tmp_path_factory.mktemp("data")
    rows = make_rows(60)
    for i, row in enumerate(rows):
        row["neg_passage"] = [rows[(i + k) % 60]["pos_passage"][0] for k in (7, 9)]
    write_jsonl(folder / "train.json", rows)
    write_jsonl(folder / "dev.json", rows[:15])
    return str(folder)


@pytest.fixture
def run(tiny_model, data, tmp_path):
    """Train with a few arguments; returns the result."""

    def train(folder="out", **options):
        given = {
            "model_name_or_path": tiny_model, "dataset_name_or_path": data, "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 4,
            "max_query_len": 16, "max_passage_len": 32, "evaluation_strategy": "no", "save_strategy": "steps",
            "save_steps": 3, "pooling": "mean", "report_to": "none",
        }  # fmt: skip
        return training.train(build(training_arguments(), **given | options))

    return train


def vectors(folder) -> np.ndarray:
    given = build(ModelArguments, model_path=str(folder), dtype="float32")
    query, passage = build_encoders(given)
    return np.concatenate([query.encode(TEXTS), passage.encode(TEXTS)])


def weights(folder) -> dict:
    import paddle

    return paddle.load(str(Path(folder) / "model_state.pdparams"), return_numpy=True)


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_training_learns_and_the_checkpoint_is_a_model(run, tmp_path):
    result = run(
        evaluation_strategy="epoch", save_strategy="epoch", num_train_epochs=6, export_format="huggingface",
        query_template="how {text}", passage_template="the {text}",
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result.report
    assert set(result.report["seconds"]) == {"read", "preflight", "train", "write", "total"}
    log = read_jsonl(tmp_path / "out" / "training.jsonl")
    dev = [entry["eval_ndcg@10"] for entry in log if "eval_ndcg@10" in entry]
    before, *dev = dev
    assert len(dev) == 6 and dev[-1] > dev[0] > before and result.metrics["ndcg@10"] == dev[-1]
    assert result.before["ndcg@10"] == result.report["metrics_before"]["ndcg@10"] == before
    assert "-> " + str(tmp_path / "out") + ", and for sentence-transformers in huggingface/" in result.summary()
    assert f"dev ndcg@10      {before:.4f} -> {dev[-1]:.4f}" in result.summary()
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    model = checkpoint.resolve(str(tmp_path / "out"))
    assert (model.pooling, model.query_template, model.passage_template) == ("mean", "how {text}", "the {text}")
    described = json.loads((tmp_path / "out" / "huggingface" / "config_sentence_transformers.json").read_text())
    assert described["prompts"] == {"query": "how ", "passage": "the ", "document": "the "}
    # The exported folder, a step's checkpoint and the final model give the same vectors.
    final = vectors(tmp_path / "out")
    np.testing.assert_allclose(vectors(tmp_path / "out" / "huggingface"), final, atol=1e-6)
    np.testing.assert_allclose(vectors(tmp_path / "out" / f"checkpoint-{result.steps}"), final, atol=1e-6)
    kept = {p.name for p in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {"checkpoint-40", "checkpoint-48", f"checkpoint-{8 * (1 + int(np.argmax(dev)))}"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}) == 1


def test_a_rows_prompt_is_its_querys_template(run, data, tmp_path, caplog):
    """The same weights and dev metrics as of rows that hold the instruction already, with no template."""
    caplog.set_level("INFO")
    rows, dev = (read_jsonl(Path(data) / name) for name in ("train.json", "dev.json"))
    prompts = ["where is the ", "", "new "]
    folders = []
    for prefilled in (False, True):
        folders.append(tmp_path / f"data{prefilled}")
        folders[-1].mkdir()
        for name, part in (("train.json", rows), ("dev.json", dev)):
            made = []
            for i, row in enumerate(part):
                prompt = prompts[i % 3]
                made.append(row | ({"query": prompt + row["query"]} if prefilled else {"prompt": prompt}))
            write_jsonl(folders[-1] / name, made)
    options = {"evaluation_strategy": "epoch", "dataloader_drop_last": True, "max_steps": 3, "seed": 1}
    one = run("one", dataset_name_or_path=str(folders[0]), query_template="my {text}", **options)
    other = run("other", dataset_name_or_path=str(folders[1]), query_template="{text}", **options)
    assert one.before == other.before and one.metrics == other.metrics
    plain = run("plain", query_template="{text}", **options)
    assert plain.loss != one.loss
    assert "60 rows have a prompt: it stands before the query" in caplog.text


def test_what_is_cut_of_rows_and_dev_rows_is_counted(run, data, tmp_path, caplog):
    rows, dev = (read_jsonl(Path(data) / name) for name in ("train.json", "dev.json"))
    longest = "how " * 30
    (tmp_path / "long").mkdir()
    write_jsonl(tmp_path / "long" / "train.json", [*rows, {"query": longest, "pos_passage": ["loan"]}])
    more = [{"query": f"{longest} {i}", "pos_passage": [f"card {i}"]} for i in range(3)]
    write_jsonl(tmp_path / "long" / "dev.json", [*dev, *more])
    options = {"evaluation_strategy": "epoch", "max_steps": 2, "max_query_len": 20}
    report = run(dataset_name_or_path=str(tmp_path / "long"), **options).report
    assert (report["preflight"]["queries_cut_texts"], report["preflight"]["queries_cut_tokens"]) == (1, 12)
    assert "1 of the" in caplog.text and "are longer than max_query_len = 20 tokens" in caplog.text
    found = report["dev_cut"]
    assert found["query"] == {"texts": 3, "tokens": 3 * 13, "limit": 20, "is_estimated": False}
    assert found["passage"]["texts"] == 0
    assert caplog.text.count("dev queries are longer than 20 tokens; their other 39 tokens are not encoded") == 1


def test_xlm_roberta_too(run, tiny_model, tmp_path):
    """PaddleNLP gives its weights Hugging Face's names, but not their layout."""
    base = tmp_path / "xlmr"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "xlm-roberta"}
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["XLMRobertaModel"]}))
    run(model_name_or_path=str(base), export_format="huggingface", save_strategy="no", lora=True, num_train_epochs=1)
    final = vectors(tmp_path / "out")
    np.testing.assert_allclose(vectors(tmp_path / "out" / "huggingface"), final, atol=1e-6)
    assert not np.allclose(vectors(base), final, atol=1e-3)
    encoder = TrainableEncoder(checkpoint.resolve(str(tmp_path / "out")), "mean")
    encoder.model.eval()
    ids, lengths = np.random.default_rng(0).integers(4, 40, (3, 9)), np.array([9, 2, 5])
    ids[np.arange(9) >= lengths[:, None]] = 0
    lean = encoder.embed(ids, lengths).numpy()
    encoder._lean = None
    np.testing.assert_allclose(lean, encoder.embed(ids, lengths).numpy(), atol=1e-5)


def test_roberta_is_exported_with_its_pooler_and_the_type_that_its_weights_have(run, tiny_model, tmp_path):
    base = tmp_path / "roberta"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "roberta", "dtype": "bfloat16"}
    config |= {"architectures": ["RobertaModel"], "torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    run(model_name_or_path=str(base), export_format="huggingface", save_strategy="no", max_steps=2)
    np.testing.assert_allclose(vectors(tmp_path / "out" / "huggingface"), vectors(tmp_path / "out"), atol=1e-6)
    exported = checkpoint.resolve(str(tmp_path / "out" / "huggingface"))
    assert "pooler.dense.weight" in weight_files.read_weights(exported)
    assert exported.config["dtype"] == exported.config["torch_dtype"] == "float32"


@pytest.fixture
def ernie(tiny_model, tmp_path) -> str:
    """ERNIE 3 in PaddleNLP's layout, for which PaddleNLP has no Hugging Face names."""
    import paddle

    folder = tmp_path / "ernie"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "ernie", "architectures": ["ErnieModel"]}
    config |= {"use_task_id": True, "task_type_vocab_size": 3, "layer_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model_state.pdparams").write_bytes(b"")
    model = paddlenlp.new_model(checkpoint.resolve(str(folder)), "float32")
    paddle.seed(5)
    for parameter in model.parameters():
        parameter.set_value(parameter + paddle.randn(parameter.shape) * 0.2)
    paddle.save(model.state_dict(), str(folder / "model_state.pdparams"))
    return str(folder)


def test_ernie_too(run, ernie, tmp_path):
    """Its export has transformers' names, and every way of computing it gives PaddleNLP's vectors."""
    import paddle

    run(model_name_or_path=ernie, export_format="huggingface", save_strategy="no", max_steps=3)
    final = vectors(tmp_path / "out")
    np.testing.assert_allclose(vectors(tmp_path / "out" / "huggingface"), final, atol=1e-6)
    assert not np.allclose(vectors(ernie), final, atol=1e-3)
    names = set(weight_files.read_weights(checkpoint.resolve(str(tmp_path / "out" / "huggingface"))))
    assert {"embeddings.task_type_embeddings.weight", "embeddings.LayerNorm.bias", "pooler.dense.weight"} < names
    assert "encoder.layer.1.attention.self.query.weight" in names
    ids, lengths = np.random.default_rng(0).integers(4, 40, (3, 9)), np.array([9, 2, 5])
    ids[np.arange(9) >= lengths[:, None]] = 0
    encoder = TrainableEncoder(checkpoint.resolve(ernie), "cls")
    encoder.model.eval()
    expected = encoder.model(
        paddle.to_tensor(ids), attention_mask=paddle.to_tensor((np.arange(9) < lengths[:, None]).astype(np.int64))
    )[0][:, 0].numpy()
    np.testing.assert_allclose(encoder.embed(ids, lengths).numpy(), expected, atol=1e-5)
    shares = pooling_weights(lengths, 9, "cls")
    engine = cpu_engine.OneDNNEngine(checkpoint.resolve(ernie), "float32").forward(ids, lengths, shares)
    np.testing.assert_allclose(engine, expected, atol=1e-5)


def test_ernies_task_is_the_first_where_it_is_null_and_one_that_it_has(ernie):
    path, first = Path(ernie) / "config.json", vectors(ernie)
    config, ids, lengths = json.loads(path.read_text()), np.array([[5, 9, 11]]), np.array([3])
    found = []
    for task in (0, None):
        path.write_text(json.dumps(config | {"task_id": task}))
        model = checkpoint.resolve(ernie)
        encoder, engine = TrainableEncoder(model, "cls"), engines.PaddleEngine(model, "float32", "cpu")
        encoder.model.eval()
        found += [encoder.embed(ids, lengths).numpy(), engine.forward(ids, lengths, np.eye(1, 3, dtype=np.float32))]
        np.testing.assert_array_equal(vectors(ernie), first)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    path.write_text(json.dumps(config | {"task_id": 3}))
    with pytest.raises(ValueError, match=r"config\.json wants the embedding of task 3; there are 3 tasks"):
        TrainableEncoder(checkpoint.resolve(ernie), "cls")
    for task in ("1", True, -1, 0.5):
        path.write_text(json.dumps(config | {"task_id": task}))
        with pytest.raises(ValueError, match=r"config\.json: task_id is .*; expected a whole number"):
            checkpoint.resolve(ernie)


def test_an_export_that_cannot_be_is_refused_before_training(run, ernie, tmp_path, monkeypatch):
    calls = die_at(1, monkeypatch)
    config = json.loads((Path(ernie) / "config.json").read_text())
    (Path(ernie) / "config.json").write_text(json.dumps(config | {"task_id": 2}))
    message = "config.json wants task_id 2, and transformers knows only task 0"
    with pytest.raises(ValueError, match=f"^export_format is 'huggingface', but {message}; leave it out$"):
        run(model_name_or_path=ernie, export_format="huggingface")
    monkeypatch.setattr(bert_names, "to_torch", lambda name: None)
    message = "PaddleNLP has no Hugging Face names for ErnieModel"
    (Path(ernie) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^export_format is 'huggingface', but {message}; leave it out$"):
        run(model_name_or_path=ernie, export_format="huggingface")
    assert not calls
    monkeypatch.undo()
    run(model_name_or_path=ernie, max_steps=1)
    assert (tmp_path / "out" / "model_state.pdparams").is_file()


def test_a_failed_export_costs_no_model(run, tmp_path, monkeypatch):
    write = training.export.write_torch_weights
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        write(*args)

    monkeypatch.setattr(training.export, "write_torch_weights", full)
    try:
        with pytest.raises(OSError, match=r"out: cannot write the export: .*File too large"):
            run(max_steps=1, export_format="huggingface")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    vectors(tmp_path / "out")
    assert not (tmp_path / "out" / "huggingface").exists() and not list((tmp_path / "out").glob("*.work"))


def test_nothing_of_an_earlier_model_is_left(run, tiny_model, tmp_path):
    """A tokenizer.json would be preferred to the vocabulary that the new model has."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("tokenizer.json"))
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": 500}
    (base / "config.json").write_text(json.dumps(config))
    words = (base / "vocab.txt").read_text().split()
    state = weight_files.read_weights(checkpoint.resolve(tiny_model))
    state["embeddings.word_embeddings.weight"] = np.resize(state["embeddings.word_embeddings.weight"], (500, 32))
    weight_files.write_weights(state, base / "model.safetensors")
    (base / "vocab.txt").write_text("\n".join([*words, *(f"more{i}" for i in range(500 - len(words)))]) + "\n")
    run(max_steps=1, export_format="huggingface")
    (tmp_path / "out" / "added_tokens.json").write_text('{"loan": 7}')
    options = {"model_name_or_path": str(base), "normalize": False, "max_steps": 1}
    run(**options, overwrite_output_dir=True)
    run("fresh", **options)
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("out", "fresh")]
    assert names[0] == names[1] and "2_Normalize" not in names[0]
    assert_same_weights(tmp_path / "out", tmp_path / "fresh")
    np.testing.assert_array_equal(vectors(tmp_path / "out"), vectors(tmp_path / "fresh"))


def test_a_kill_never_leaves_one_models_weights_with_anothers_description(tmp_path, monkeypatch):
    """Killed after each of its steps in turn, and then finished by the next run."""
    models = {"old": {"tokenizer.json", "config.json", "2_Normalize"}, "new": {"vocab.txt", "config.json", "1_Pooling"}}

    def write(folder: Path, model: str) -> None:
        for name in models[model]:
            (folder / name).mkdir() if name[0].isdigit() else (folder / name).write_text(model)
        (folder / training_folder.WEIGHTS).write_text(model)

    def put(folder: Path) -> None:
        earlier = ("huggingface", training_folder.WEIGHTS, *checkpoint.DESCRIPTION)
        with training_folder.put_into(folder, "the model", earlier) as work:
            write(work, "new")

    def found(folder: Path) -> str | None:
        if not (folder / training_folder.WEIGHTS).exists():
            return None
        model = (folder / training_folder.WEIGHTS).read_text()
        assert {path.name for path in folder.iterdir()} - {"model.part"} == models[model] | {training_folder.WEIGHTS}
        assert (folder / "config.json").read_text() == model
        return model

    left, steps = [], 0
    while "new" not in left:
        folder, steps, done = tmp_path / f"{steps}", steps + 1, []
        folder.mkdir()
        write(folder, "old")

        def counted(step, done=done, most=steps):
            def step_or_kill(*args):
                if len(done) == most:
                    raise Killed
                done.append(1)
                step(*args)

            return step_or_kill

        with monkeypatch.context() as patched:
            patched.setattr(training_folder, "remove", counted(training_folder.remove))
            patched.setattr(training_folder.os, "replace", counted(os.replace))
            with suppress(Killed):
                put(folder)
        left.append(found(folder))
        put(folder)
        assert found(folder) == "new" and not (folder / "model.part").exists()
    assert left[0] == "old" and None in left


@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_on_a_cpu_multiplies_in_it_where_that_is_fast(run, tmp_path, monkeypatch, caplog, has_it):
    if has_it and not matmul.bfloat16_is_fast():
        pytest.skip("this processor has no bfloat16 products")
    monkeypatch.setattr(matmul, "bfloat16_is_fast", lambda: has_it)
    with caplog.at_level("INFO"):
        run("plain", num_train_epochs=1, save_strategy="no")
        run("low", num_train_epochs=1, save_strategy="no", bf16=True)
    assert ("bf16 is not used on this processor" in caplog.text) != has_it
    plain, low = (weights(tmp_path / name) for name in ("plain", "low"))
    assert (max(np.abs(plain[name] - low[name]).max() for name in plain) > 0) == has_it
    losses = [
        [entry["loss"] for entry in read_jsonl(tmp_path / name / "training.jsonl") if "loss" in entry]
        for name in ("plain", "low")
    ]
    np.testing.assert_allclose(*losses, rtol=0.02)


@pytest.mark.parametrize("argument", ["dataset_name_or_path", "dev_dataset_path", "model_name_or_path"])
@pytest.mark.parametrize("place", ["training.jsonl", "report.json", "huggingface/rows", "checkpoint-6"])
def test_what_is_read_is_not_written_over(run, data, tiny_model, tmp_path, argument, place):
    path = tmp_path / "out" / place
    shutil.copytree(tiny_model if argument == "model_name_or_path" else data, path)
    with pytest.raises(ValueError, match="is an input, and lies where training writes or removes"):
        run(**{argument: str(path)}, overwrite_output_dir=True)
    assert path.exists()


@pytest.mark.parametrize("argument", ["dataset_name_or_path", "model_name_or_path"])
@pytest.mark.parametrize("place", ["training.jsonl", "run.json.part", "checkpoint-6/weights"])
def test_what_links_of_an_input_folder_lead_to_is_not_written_over(run, data, tiny_model, tmp_path, argument, place):
    target, folder = tmp_path / "out" / place, tmp_path / "given"
    target.parent.mkdir(parents=True)
    shutil.copytree(tiny_model if argument == "model_name_or_path" else data, folder)
    moved = folder / ("train.json" if argument == "dataset_name_or_path" else "config.json")
    moved.rename(target)
    moved.symlink_to(target)
    with pytest.raises(ValueError, match=f"{moved.name}: is an input, and lies where training writes or removes"):
        run(**{argument: str(folder)}, overwrite_output_dir=True)
    assert target.exists()


@pytest.mark.parametrize("place", ["config.json", "huggingface/arguments.json"])
def test_the_file_of_arguments_is_not_written_over(data, tiny_model, tmp_path, place):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    arguments = {
        "model_name_or_path": str(tiny_model),
        "dataset_name_or_path": str(data),
        "output_dir": f"{tmp_path}/out",
    }
    path.write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match="is an input, and lies where training writes or removes"):
        training.train(parse(training_arguments(), [str(path)], ""))
    assert json.loads(path.read_text()) == arguments


def test_a_folder_of_the_data_can_be_the_output_folder_too(run, data, tmp_path):
    shutil.copytree(data, tmp_path / "out")
    for _ in range(2):
        run(dataset_name_or_path=str(tmp_path / "out"), max_steps=2)


@pytest.mark.parametrize("argument", ["model_name_or_path", "tokenizer_name_or_path"])
def test_the_base_models_folder_is_no_output_folder(run, tiny_model, tmp_path, argument):
    shutil.copytree(tiny_model, tmp_path / "out")
    with pytest.raises(ValueError, match="is the base model's folder; give another output_dir"):
        run(**{argument: str(tmp_path / "out")})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huggingface/README.md", "huggingface: holds README.md, which is of no export, and would be removed"),
        ("huggingface/modules.json", "holds huggingface, of no earlier training there, and would lose it"),
        ("config.json", "holds config.json, of no earlier training there, and would lose it"),
        ("run.json", "holds run.json, of no earlier training there, and would lose it"),
        ("report.json.part", "holds report.json.part, of no earlier training there, and would lose it"),
        ("model_state.pdparams", "holds model_state.pdparams, of no earlier training there, and would lose it"),
        ("model.part/notes.txt", "holds model.part, of no earlier training there, and would lose it"),
        ("checkpoint-2/notes.txt", "holds checkpoint-2, of no earlier training there, and would lose it"),
    ],
)
def test_what_is_of_no_training_is_kept(run, tmp_path, name, message):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"{message}; "):
        run(export_format="huggingface", overwrite_output_dir=True)
    assert path.read_text() == "{}"


def test_other_names_like_a_trainings_are_left_alone(run, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copyfile(f"{data}/train.json", out / "checkpoint-data.jsonl")
    for name in ("checkpoint-8.jsonl.work", "model.work"):
        (out / name).mkdir()
    run(dataset_name_or_path=str(out / "checkpoint-data.jsonl"), max_steps=1)
    assert {"checkpoint-8.jsonl.work", "model.work", "checkpoint-data.jsonl"} <= {path.name for path in out.iterdir()}


def test_the_same_data_elsewhere_make_the_same_run(run, data, tiny_model, tmp_path, monkeypatch):
    options = {"max_steps": 6}
    run(**options)
    shutil.copytree(data, tmp_path / "moved")
    shutil.copytree(tiny_model, tmp_path / "base")
    from utils.training.trainer import EmbeddingTrainer

    monkeypatch.setattr(EmbeddingTrainer, "training_step", None)  # nothing is left to be done
    run(model_name_or_path=str(tmp_path / "base"), dataset_name_or_path=f"{tmp_path}/moved/", save_steps=2, **options)


def test_what_the_base_says_may_be_said_again(run, tmp_path, monkeypatch):
    options = {"max_steps": 6}
    run(**options)
    from utils.training.trainer import EmbeddingTrainer

    monkeypatch.setattr(EmbeddingTrainer, "training_step", None)
    run(normalize=True, query_template="{text}", passage_template="{text}", dataloader_num_workers=1, **options)
    with pytest.raises(ValueError, match=r'other query_template \("{text}" then, "how {text}" now\)'):
        run(query_template="how {text}", **options)


def test_another_runs_model_is_not_written_over_by_a_checkpoint_from_elsewhere(run, tmp_path):
    run(save_strategy="no", max_steps=2)
    run("other", max_steps=6)
    asked = {"max_steps": 8, "resume_from_checkpoint": str(tmp_path / "other" / "checkpoint-6")}
    with pytest.raises(ValueError, match="holds the model of a run with other max_steps"):
        run(**asked)
    run(**asked, overwrite_output_dir=True)


def test_a_run_of_an_earlier_version_is_gone_on_with(run, tmp_path, monkeypatch):
    options = {"max_steps": 6}
    run(**options)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    record |= {"float32_matmul_precision": "highest", "dataset_name_or_path": ["elsewhere"], "save_steps": 4}
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    from utils.training.trainer import EmbeddingTrainer

    monkeypatch.setattr(EmbeddingTrainer, "training_step", None)
    run(**options)


def test_a_kill_in_the_first_write_is_no_reason_to_refuse(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json.part").write_text("{")
    run(max_steps=1)


def test_a_folder_made_for_nothing_goes(run, tmp_path, monkeypatch):
    made = resuming.leave_nothing_else
    held = []

    def leave(*given):
        held.append(own_files.take_lock(tmp_path / "out", 0) is None)
        made(*given)

    monkeypatch.setattr(resuming, "leave_nothing_else", leave)
    with pytest.raises(FileNotFoundError):
        run(dataset_name_or_path="none.json")
    assert not (tmp_path / "out").exists() and held == [True]
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        run(dataset_name_or_path="none.json")
    assert (tmp_path / "out").exists()
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(ValueError, match="lock: is in the way and no regular file"):
        run(".")


def test_a_trained_model_keeps_the_length_of_its_base(run, tiny_model, tmp_path):
    """It is longer only if the training was, so that a comparison of both compares their weights."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for own, trained, expected in ((24, 16, 24), (24, 32, 32), (1000, 16, 64)):
        (base / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": own}))
        options = {"max_query_len": 8, "max_passage_len": trained, "max_steps": 1, "export_format": "huggingface"}
        run("out", model_name_or_path=str(base), overwrite_output_dir=True, **options)
        for folder in ("out", "out/huggingface"):
            assert checkpoint.resolve(str(tmp_path / folder)).default_length == expected


def test_a_model_of_dot_products_says_so(run, tiny_model, tmp_path):
    """To every script that loads it, the next training too; what is asked for goes first."""
    options = {"max_steps": 2, "save_strategy": "no"}
    run("dots", normalize=False, export_format="huggingface", **options)
    run("cosines", **options)

    def lengths(folder: str, **given) -> np.ndarray:
        encoder, _ = build_encoders(build(ModelArguments, model_path=str(tmp_path / folder), dtype="float32", **given))
        assert encoder.description()["normalize"] == encoder.normalize
        return np.linalg.norm(encoder.encode(TEXTS), axis=1)

    for folder in ("dots", "dots/huggingface"):
        assert np.ptp(lengths(folder)) > 0.1
        np.testing.assert_array_equal(lengths(folder), lengths(folder, normalize=False))
        np.testing.assert_allclose(lengths(folder, normalize=True), 1, atol=1e-6)
    np.testing.assert_allclose(lengths("cosines"), 1, atol=1e-6)
    run("again", model_name_or_path=str(tmp_path / "dots"), **options)
    run("asked", model_name_or_path=str(tmp_path / "dots"), normalize=False, **options)
    assert not checkpoint.resolve(str(tmp_path / "again")).normalize
    assert_same_weights(tmp_path / "again", tmp_path / "asked")
    run("back", model_name_or_path=str(tmp_path / "dots"), normalize=True, **options)
    assert checkpoint.resolve(str(tmp_path / "back")).normalize


@pytest.fixture
def dots(tiny_model, tmp_path) -> str:
    """The tiny model, whose folder names dot products."""
    folder = tmp_path / "dots-model"
    shutil.copytree(tiny_model, folder)
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "dot"}')
    return str(folder)


def test_every_script_takes_the_models_word_for_dot_products(dots, tiny_model, data, tmp_path):
    """As if normalize were false, cut vectors too; cleaning compares cosines in any case."""
    train, dev = f"{data}/train.json", f"{data}/dev.json"

    def written(script: str, name: str, *flags) -> list[dict]:
        done = run_script(script, *flags, "--output_data_path", tmp_path / name, "--dtype", "float32")
        assert done.returncode == 0, done.stderr
        return read_jsonl(tmp_path / name)

    for script, flags in (
        ("mining_negative_samples.py", ["--input_data_path", train, "--num_negatives", "3", "--output_scores", "true"]),
        ("embedding_evaluate.py", ["--dev_path", dev, "--dimension", "8"]),
        ("clean_query.py", ["--input_data_path", train, "--similarity_threshold", "0.95"]),
    ):
        own = written(script, f"{script}.1", *flags, "--model_path", dots)
        asked = written(script, f"{script}.2", *flags, "--model_path", tiny_model, "--normalize", "false")
        unit = written(script, f"{script}.3", *flags, "--model_path", tiny_model)
        assert own == asked
        assert (own == unit) == (script == "clean_query.py")


def test_a_baseline_above_every_cosine_is_refused(dots, tiny_model, data, tmp_path):
    flags = ["--input_data_path", f"{data}/dev.json", "--score_baseline", "2", "--output_data_path", tmp_path / "a"]
    done = run_script("mining_negative_samples.py", *flags, "--model_path", tiny_model)
    assert done.returncode == 2 and "score_baseline is 2.0; expected less than 1, a cosine" in done.stderr
    assert run_script("mining_negative_samples.py", *flags, "--model_path", dots).returncode == 0


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def die_at(number: int, monkeypatch) -> list:
    """The training step of that number raises ``Killed``, once; returns a list that grows by every step."""
    step, calls = GradientStep.__call__, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(GradientStep, "__call__", dies)
    return calls


@contextmanager
def killed_at(number: int, monkeypatch):
    """A run that dies at that training step."""
    with monkeypatch.context() as patched:
        die_at(number, patched)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": True}, {"gradient_accumulation_steps": 2, "gradcache_chunk_size": 3, "plain_accumulation": True}],
)
def test_a_killed_run_ends_with_the_same_weights(run, tmp_path, monkeypatch, options):
    run("whole", **options)
    calls = die_at(11, monkeypatch)
    with pytest.raises(Killed):
        run("broken", **options)
    assert not (tmp_path / "broken" / "model_state.pdparams").exists()
    tokenised, collate = [], Collator.__call__
    monkeypatch.setattr(
        Collator, "__call__", lambda self, examples, number: tokenised.append(number) or collate(self, examples, number)
    )
    (tmp_path / "broken" / "checkpoint-99.work").mkdir()  # a kill while a checkpoint was being written
    for name in ("checkpoint-12.work", "model.part"):  # whatever else
        (tmp_path / "broken" / name).write_text("")
    run("broken", **options)
    assert len(calls) < 11 + 16  # it did not begin again
    assert len(tokenised) == len(calls) - 11 and tokenised[-1] == 15  # nor tokenise what it passed over
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
    assert not list((tmp_path / "broken").glob("*.work"))
    # Of all steps, and not of those since the resume.
    ends = [read_jsonl(tmp_path / name / "training.jsonl")[-1]["train_loss"] for name in ("whole", "broken")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_accumulated_batches_are_one_contrastive_batch(run, tmp_path):
    """As PaddleNLP's users know it; every row of an epoch is trained on, the last step being smaller."""
    rows = [{"query": f"card {i}", "pos_passage": [f"visa {i} answer"]} for i in range(24)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {
        "dataset_name_or_path": data, "group_size": 1, "num_train_epochs": 1, "dropout": 0.0,
        "evaluation_strategy": "no",
    }  # fmt: skip
    found = run("cached", per_device_train_batch_size=2, gradient_accumulation_steps=7, **options)
    assert found.steps == 2 and found.epochs == 1 and found.loss > 0
    assert found.report["preflight"]["negatives_a_query_sees"] == pytest.approx((14 * 13 + 10 * 9) / 24, abs=3)
    assert not any("in no batch" in warning for warning in found.report["preflight"]["warnings"])
    run("large", per_device_train_batch_size=14, gradcache_chunk_size=2, **options)
    assert_same_weights(tmp_path / "cached", tmp_path / "large")


def test_plain_accumulation_trains_every_row(run, tmp_path, monkeypatch):
    """12 batches of 2 in steps of 7 and 5; each step's gradient is the mean of its own batches'."""
    paddlenlp.import_paddlenlp()
    from utils.training.trainer import EmbeddingTrainer

    rows = [{"query": f"card {i}", "pos_passage": [f"visa {i} answer"]} for i in range(24)]
    shares, met, scaled, collate = [], [], EmbeddingTrainer._scaled, Collator.__call__
    monkeypatch.setattr(
        EmbeddingTrainer, "_scaled", lambda self, loss: shares.append(self._share) or scaled(self, loss)
    )
    monkeypatch.setattr(
        Collator,
        "__call__",
        lambda self, examples, n: met.extend(e.row for e in examples) or collate(self, examples, n),
    )
    found = run(
        dataset_name_or_path=write_jsonl(tmp_path / "rows.jsonl", rows), group_size=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=7, plain_accumulation=True, num_train_epochs=1,
    )  # fmt: skip
    assert sorted(met) == list(range(24)) and shares == pytest.approx([1 / 7] * 7 + [1 / 5] * 5)
    assert (found.steps, found.epochs, found.report["rows_trained"]) == (2, 1, 24)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"per_device_train_batch_size": 23}, None),
        ({"per_device_train_batch_size": 23, "group_size": 1}, None),
        ({"per_device_train_batch_size": 23, "dataloader_drop_last": True}, "1 row is in no batch of an epoch: data"),
        ({"per_device_train_batch_size": 22, "dataloader_drop_last": True}, "2 rows are in no batch of an epoch: data"),
    ],
)
def test_rows_are_reported_as_they_are_trained(run, tmp_path, options, left_out):
    rows = [{"query": f"card {i}", "pos_passage": [f"visa {i} answer"]} for i in range(24)]
    found = run(dataset_name_or_path=write_jsonl(tmp_path / "rows.jsonl", rows), num_train_epochs=1, **options)
    expected = options["per_device_train_batch_size"] if left_out else 24
    assert found.report["rows_trained"] == expected and found.epochs == expected / 24
    told = [warning for warning in found.report["preflight"]["warnings"] if "in no batch" in warning]
    assert len(told) == bool(left_out) and all(warning.startswith(left_out) for warning in told)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warm", [{}, {"warmup_steps": 4}, {"warmup_ratio": 1.0}, {"warmup_ratio": 0.0}])
def test_no_step_has_rate_0(run, tmp_path, schedule, warm):
    """Beside the first, rates are PaddleNLP's."""
    run(lr_scheduler_type=schedule, logging_steps=1, save_strategy="no", freeze_layers=1, **warm)
    logs = read_jsonl(tmp_path / "out" / "training.jsonl")
    rates = [entry["learning_rate"] for entry in logs if "learning_rate" in entry]
    assert len(rates) == 16 and min(rates) > 0
    steps = warm.get("warmup_steps", int(16 * warm.get("warmup_ratio", 0.1)))
    if steps > 1 and schedule != "constant":
        np.testing.assert_allclose(rates[:steps], [1e-3 * max(s, 0.5) / steps for s in range(steps)])


def test_a_part_of_an_epoch_rounds_up_to_a_step_that_learns(run, tmp_path):
    found = run("part", num_train_epochs=0.01, evaluation_strategy="no", save_strategy="no")
    rates = [
        entry["learning_rate"] for entry in read_jsonl(tmp_path / "part" / "training.jsonl") if "learning_rate" in entry
    ]
    assert found.steps == 1 and rates and min(rates) > 0


def test_more_accumulation_than_an_epoch_has_batches_is_an_epochs(run, tmp_path, monkeypatch):
    """Each epoch is one step, with the mean of its batches' gradients, in a resumed run too."""
    epochs, set_epoch = [], batches.Loader.set_epoch
    monkeypatch.setattr(
        batches.Loader, "set_epoch", lambda *args: epochs.append(args[1]) or set_epoch(*args)
    )  # fmt: skip
    options = {"num_train_epochs": 6, "save_steps": 1}
    assert run("exact", gradient_accumulation_steps=8, plain_accumulation=True, **options).steps == 6
    run("more", gradient_accumulation_steps=11, plain_accumulation=True, **options)
    assert epochs == [*range(6), *range(6)]
    assert_same_weights(tmp_path / "exact", tmp_path / "more")
    with killed_at(30, monkeypatch):
        run("broken", gradient_accumulation_steps=11, plain_accumulation=True, **options)
    run("broken", gradient_accumulation_steps=11, plain_accumulation=True, **options)
    assert epochs[12:] == [0, 1, 2, 3, 3, 4, 5]
    assert_same_weights(tmp_path / "broken", tmp_path / "more")


@pytest.mark.parametrize("options", [{}, {"max_steps": 6, "save_steps": 3}])
def test_an_ended_run_is_not_gone_on_with(run, tmp_path, options):
    """As after a kill between the last checkpoint and the model."""
    first = run("once", **options)
    before = weights(tmp_path / "once")
    (tmp_path / "once" / "model_state.pdparams").unlink()
    again = run("once", **options)
    after = weights(tmp_path / "once")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (again.steps, again.loss) == (first.steps, pytest.approx(first.loss))


def test_what_is_left_out_and_what_dev_rows_are_known_is_told(run, data, tmp_path, caplog):
    shutil.copytree(data, tmp_path / "data")
    with open(tmp_path / "data" / "train.json", "a") as stream:
        stream.write('{"query": "a", "pos_passage": []}\n')
    run(dataset_name_or_path=f"{tmp_path}/data", max_steps=1, on_bad_row="skip", evaluation_strategy="epoch")
    assert (
        "1 bad rows are left out, the first: " in caplog.text
        and 'train.json:61: "pos_passage" is an empty' in caplog.text
    )
    n_dev = len({row["query"] for row in read_jsonl(tmp_path / "data" / "dev.json")})
    assert f"{n_dev} of the {n_dev} dev queries are training rows' too" in caplog.text
    caplog.clear()
    caplog.set_level("INFO")
    (tmp_path / "data" / "dev.json").unlink()
    run("other", dataset_name_or_path=f"{tmp_path}/data", max_steps=1, on_bad_row="skip", evaluation_strategy="epoch")
    assert "no dev rows, so nothing is evaluated" in caplog.text and "dev queries" not in caplog.text


def test_the_metrics_of_before_survive_a_kill(run, tmp_path, monkeypatch):
    options = {"evaluation_strategy": "epoch", "save_strategy": "epoch"}
    whole = run("whole", **options)
    with killed_at(9, monkeypatch):
        run("killed", **options)
    assert run("killed", **options).before == whole.before != {}


def test_a_model_that_became_worse_is_told_of(run, monkeypatch, caplog):
    def judge(*values):
        left = iter(values)
        monkeypatch.setattr(training.Job, "evaluate", lambda job: dict.fromkeys(training.METRICS, next(left)))

    judge(0.9, 0.5, 0.7)
    run(evaluation_strategy="epoch")
    assert "passages are found worse than before training: ndcg@10 0.9000 -> 0.7000; a lower" in caplog.text
    caplog.clear()
    judge(0.6, 0.5, 0.7)
    run("better", evaluation_strategy="epoch")
    assert "worse" not in caplog.text


def test_the_logged_learning_rate_is_that_of_the_logged_step(run, tmp_path):
    run(max_steps=4, logging_steps=1, warmup_steps=2, learning_rate=1e-3)
    log = read_jsonl(tmp_path / "out" / "training.jsonl")
    assert [entry["learning_rate"] for entry in log if "learning_rate" in entry] == pytest.approx(
        [2.5e-4, 5e-4, 1e-3, 5e-4]
    )


def test_a_template_that_a_folder_cannot_hold_is_told_of_once(run, tmp_path, caplog):
    run(query_template="how {text} ?", max_steps=6)
    told = [record for record in caplog.records if "goes on behind the text" in record.getMessage()]
    assert len(told) == 1 and "query_template 'how {text} ?'" in told[0].getMessage()


def test_another_runs_checkpoints_are_not_taken_over(run):
    run()
    with pytest.raises(ValueError, match=r"a run with other learning_rate \(0\.001 then, 0\.0005 now\); give another"):
        run(learning_rate=5e-4)
    run(learning_rate=5e-4, overwrite_output_dir=True)


def test_other_dev_rows_make_another_run(run, data, tmp_path, monkeypatch, caplog):
    judge_by_step({2: 0.1, 6: 0.9, 10: 0.4, 14: 0.3}, monkeypatch)
    dev = tmp_path / "dev.json"
    shutil.copyfile(Path(data) / "dev.json", dev)
    options = BEST_BETWEEN | {"dev_dataset_path": str(dev), "save_total_limit": 9}
    with killed_at(9, monkeypatch):
        run(**options)
    write_jsonl(dev, make_rows(9, seed=1))
    with pytest.raises(ValueError, match="holds checkpoints of a run with other dev rows; give another output_dir"):
        run(**options)
    # A checkpoint that is asked for is gone on with, but its best is none of the new rows.
    with caplog.at_level("INFO"):
        run(**options, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert "the best so far was found on other dev rows, or by another metric" in caplog.text
    assert_same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-10")


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_going_on_from_an_earlier_checkpoint(run, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    run("whole")
    with killed_at(11, monkeypatch):
        run(save_total_limit=5)
    options = {"resume_from_checkpoint": str(out / "checkpoint-3"), "save_total_limit": 2}
    with pytest.raises(ValueError, match=r"holds checkpoint-6, checkpoint-9, not on the way to .*checkpoint-3; give"):
        run(**options)
    assert kept(out) == [3, 6, 9]
    with caplog.at_level("INFO"), killed_at(8, monkeypatch):
        run(**options, overwrite_output_dir=True)
    assert "checkpoint-9, of an earlier run" in caplog.text and kept(out) == [6, 9]
    # The same command goes on from its own, though the one that it names has made room; one without it, too.
    calls = die_at(99, monkeypatch)
    run(**options, overwrite_output_dir=True)
    assert len(calls) == 16 - 9 and kept(out) == [12, 15]
    run()
    assert len(calls) == 16 - 9 + 1
    assert_same_weights(out, tmp_path / "whole")


def test_going_on_from_another_folders_checkpoint(run, tmp_path, monkeypatch):
    run("whole")
    with killed_at(8, monkeypatch):
        run("old")
    options = {"resume_from_checkpoint": str(tmp_path / "old" / "checkpoint-3")}
    with killed_at(5, monkeypatch):
        run("new", **options)
    assert kept(tmp_path / "new") == [6] and kept(tmp_path / "old") == [3, 6]
    run("new", **options)
    assert_same_weights(tmp_path / "new", tmp_path / "whole")
    steps = [entry["step"] for entry in read_jsonl(tmp_path / "new" / "training.jsonl")]
    assert steps == sorted(steps) and steps[0] > 3
    run("other", seed=1, num_train_epochs=1)
    with pytest.raises(ValueError, match="other: holds checkpoint-3, checkpoint-6, not on the way to"):
        run("other", **options)
    with pytest.raises(ValueError, match="checkpoint-5: no checkpoint there; expected"):
        run("other", resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-5"))


def test_a_best_checkpoint_that_stays_behind_is_not_ended_with(run, tmp_path, monkeypatch):
    judge_by_step({2: 0.1, 6: 0.9, 14: 0.4}, monkeypatch)
    run("old", **BEST_BETWEEN | {"save_total_limit": 9})
    run("new", **BEST_BETWEEN, resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-10"))
    assert_same_weights(tmp_path / "new", tmp_path / "new" / "checkpoint-14")


def test_the_journal_and_the_export_are_this_runs(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(export_format="huggingface", max_steps=2, save_strategy="no")
    assert (out / "huggingface").is_dir()
    run(max_steps=2, save_strategy="no")
    assert (out / "huggingface").is_dir()  # the same model's
    with pytest.raises(ValueError, match=r"holds the model of a run with other max_steps \(2 then, -1 now\), save_str"):
        run(logging_steps=1)
    with killed_at(9, monkeypatch):
        run(logging_steps=1, overwrite_output_dir=True)
    assert (out / "huggingface").is_dir()  # as long as the model that it is of
    with open(out / "training.jsonl", "a") as stream:
        stream.write('{"step": 9, "lo')
    run(logging_steps=1)
    steps = [entry["step"] for entry in read_jsonl(out / "training.jsonl") if "loss" in entry]
    assert steps == list(range(1, 17))
    assert not (out / "huggingface").exists()


@pytest.mark.parametrize("name", ["model_state.pdparams", "optimizer.pdopt", "standing.json", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"", b"[]", None])
def test_a_damaged_checkpoint_is_named_or_passed_over(run, tmp_path, monkeypatch, name, content):
    calls = die_at(8, monkeypatch)
    with pytest.raises(Killed):
        run()
    newest = tmp_path / "out" / "checkpoint-6"
    (newest / name).unlink()
    if content is not None:
        (newest / name).write_bytes(content)
    (tmp_path / "out" / "checkpoint-77").write_text("no folder")
    (tmp_path / "out" / "checkpoint-99").mkdir()
    if name == "trainer_state.json" and content is None:
        assert run().steps == 16 and len(calls) == 8 + 16 - 3  # from the one before
        return
    with pytest.raises(ValueError, match=f"{newest.name}: cannot be read"):
        run()


def rewrite(path: Path, change) -> None:
    """A file of weights or of a state, changed."""
    state = pdparams.read_state(path)
    with open(path, "wb") as stream:
        pickle.dump(change(state), stream, protocol=4)


WORDS = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_state.pdparams", lambda state: {}, "has no weight .*lacks 39 of 39"),
        ("model_state.pdparams", lambda state: {k: v for k, v in state.items() if k != WORDS}, f"no weight {WORDS}"),
        ("model_state.pdparams", lambda state: state | {"odd": state[WORDS]}, "has a weight odd"),
        ("model_state.pdparams", lambda state: state | {WORDS: state[WORDS][:, :9]}, r"of shape \[133, 9\], here"),
        ("optimizer.pdopt", lambda state: {}, "has no state of a trained weight"),
        ("optimizer.pdopt", lambda state: state | {"odd_moment1_0": state[WORDS + "_moment1_0"]}, "weight odd"),
        (
            "optimizer.pdopt",
            lambda state: {k: v for k, v in state.items() if not k.startswith(WORDS)},
            "weights were frozen in its training",
        ),
    ],
)
def test_a_checkpoint_whose_weights_do_not_fit_is_refused(run, tmp_path, monkeypatch, name, change, message):
    with killed_at(5, monkeypatch):
        run()
    rewrite(tmp_path / "out" / "checkpoint-3" / name, change)
    with pytest.raises(ValueError, match=f"checkpoint-3.*{message}"):
        run()


def test_a_checkpoint_of_another_model_or_of_other_weights_is_refused(run, tmp_path):
    others = {
        "layers": ({"layers": 3}, {}, r"has a weight encoder\.layers\.2"),
        "width": ({"hidden": 48}, {}, r"of shape \[133, 48\], here \[133, 32\]"),
        "positions": ({"positions": 40}, {}, r"of shape \[40, 32\], here \[64, 32\]"),
        "lora": (None, {"lora": True}, "its training was with lora"),
        "frozen": (None, {"freeze_layers": 1}, "weights were frozen in its training"),
    }
    for name, (sizes, options, message) in others.items():
        base = {"model_name_or_path": make_tiny_bert(tmp_path / f"base-{name}", **sizes)} if sizes else {}
        run(name, max_steps=3, **base, **options)
        with pytest.raises(ValueError, match=message):
            run("new", max_steps=6, resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
    run("plain", max_steps=3)
    for name, options, message in (
        ("plain", {"lora": True}, "its training was without lora"),
        ("plain", {"word_embeddings": "freeze"}, f"weight {WORDS}, which is not trained here"),
        ("lora", {"lora": True, "lora_rank": 4}, "of shape .*8.*, here .*4"),
    ):
        with pytest.raises(ValueError, match=message):
            run("new", max_steps=6, resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"), **options)


@pytest.mark.parametrize("options", [{}, {"word_embeddings": "freeze"}, {"freeze_layers": 1}, {"lora": True}])
def test_a_checkpoint_holds_what_is_trained_and_says_its_size(run, tmp_path, caplog, options):
    caplog.set_level("INFO")
    run("whole", max_steps=3, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    size = sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())
    assert f"saved checkpoint-3: {size / 1e6:.1f} MB (" in caplog.text
    base = (tmp_path / "whole" / "model_state.pdparams").stat().st_size
    assert (checkpoint / "model_state.pdparams").exists() == (not options)
    if options:
        kept = pdparams.read_state(checkpoint / "trained.pdopt")
        moments = pdparams.read_state(checkpoint / "optimizer.pdopt")
        assert {name.removesuffix("_moment1_0") for name in moments if name.endswith("_moment1_0")} <= kept.keys()
        assert (checkpoint / "trained.pdopt").stat().st_size < 0.9 * base
        other = make_tiny_bert(tmp_path / "other-base")
        Path(other, "vocab.txt").write_text(Path(other, "vocab.txt").read_text() + "another\n")
        options |= {"model_name_or_path": other, "resume_from_checkpoint": str(checkpoint)}
        with pytest.raises(ValueError, match="its frozen weights are another base model's"):
            run("new", max_steps=6, **options)


@pytest.mark.parametrize("name", ["model.safetensors", "model_state-00001-of-00002.pdparams"])
def test_weights_that_would_be_loaded_too_are_refused(run, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("")
    with pytest.raises(ValueError, match=f"holds {name}, which would be loaded in place of what is trained or with it"):
        run()


def test_the_base_is_not_written_over(run, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "out")
    with pytest.raises(ValueError, match="is the base model's folder"):
        run(model_name_or_path=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="would be loaded in place of what is trained"):
        run()
    assert (tmp_path / "out" / "config.json").read_text() == (Path(tiny_model) / "config.json").read_text()


@pytest.mark.parametrize(
    "options", [{"metrics_output_path": "m"}, {"hybrid_parallel_topo_order": "foo"}, {"seed": 2**32}]
)
def test_arguments_of_the_trainer_that_would_end_it_badly(run, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        run(**options)


def test_the_best_checkpoint_and_early_stopping(run, tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.5, 0.4, 0.5, 0.9, 0.9])
    monkeypatch.setattr(
        training.Job, "evaluate", lambda job: dict.fromkeys(training.METRICS, next(values))
    )  # fmt: skip
    run(
        evaluation_strategy="steps", eval_steps=3, num_train_epochs=3, load_best_model_at_end=True,
        early_stopping_patience=2, save_total_limit=1,
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
    # What early stopping ended stays ended.
    result = run(
        evaluation_strategy="steps", eval_steps=3, num_train_epochs=3, load_best_model_at_end=True,
        early_stopping_patience=2, save_total_limit=1,
    )  # fmt: skip
    assert result.steps == 12 and next(values, None) is None
    assert_same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-6")


BEST_BETWEEN = {
    "evaluation_strategy": "steps", "eval_steps": 2, "save_steps": 5, "load_best_model_at_end": True,
    "save_total_limit": 1,
}  # fmt: skip


def judge_by_step(values: dict[int, float], monkeypatch) -> None:
    """An evaluation finds the value of its step, or 0."""
    note = guard.Standing.note
    monkeypatch.setattr(training.Job, "evaluate", lambda job: dict.fromkeys(training.METRICS, 0.0))
    monkeypatch.setattr(guard.Standing, "note", lambda self, _, step: note(self, values.get(step, 0.0), step))


@pytest.mark.parametrize("killed", [False, True])
def test_the_best_step_is_saved_whatever_save_steps_says(run, tmp_path, monkeypatch, killed):
    judge_by_step({2: 0.1, 6: 0.5, 10: 0.4}, monkeypatch)
    if killed:
        with killed_at(8, monkeypatch):
            run(**BEST_BETWEEN)
        assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert run(**BEST_BETWEEN).steps == 16
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-6"]
    assert_same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-6")


def test_weights_that_leave_no_loss_are_refused(run, tiny_model, tmp_path):
    width = checkpoint.resolve(tiny_model).hidden_size
    with pytest.raises(ValueError, match="embedding_matryoshka_weights are all 0, the full width's too; expected"):
        run(embedding_matryoshka_dims=[4, width], embedding_matryoshka_weights=[0, 0])
    run(embedding_matryoshka_dims=[4], embedding_matryoshka_weights=[0], max_steps=1)  # the full width has 1


def test_nan_ends_the_run(run, tiny_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    state = load_file(broken / "model.safetensors")
    state["encoder.layer.1.output.dense.bias"][3] = np.nan
    save_file(state, broken / "model.safetensors")
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        run("nan", model_name_or_path=str(broken))


class Scaler:
    """A loss scale of 1 that passes over an update after a batch without a loss, as a GPU's does in fp16."""

    def __init__(self):
        import paddle

        self._scale, self._cache_founf_inf = paddle.ones([1]), False

    def scale(self, loss):
        return loss

    def step(self, optimizer):
        if not self._cache_founf_inf:
            optimizer.step()

    def update(self):
        self._cache_founf_inf = False


@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_fp16_step_without_a_loss_is_passed_over(run, tmp_path, monkeypatch, accumulated):
    paddlenlp.import_paddlenlp()
    from utils.training.trainer import EmbeddingTrainer

    train, step, scaler, found = EmbeddingTrainer.run, GradientStep.__call__, Scaler(), []

    def scaled(self, resume):
        self.args.fp16 = self.do_grad_scaling = True
        self.scaler = scaler
        train(self, resume)

    def overflows(self, batch):
        outcome = step(self, batch)
        if batch.number == 5:
            scaler._cache_founf_inf, outcome.loss = True, np.nan
        found.append(outcome.loss)
        return outcome

    monkeypatch.setattr(EmbeddingTrainer, "run", scaled)
    monkeypatch.setattr(GradientStep, "__call__", overflows)
    result = run(
        num_train_epochs=1, save_strategy="no", logging_steps=8 // accumulated, gradient_accumulation_steps=accumulated,
        plain_accumulation=True,
    )  # fmt: skip
    assert len(found) == 8 and result.steps == 8 // accumulated
    assert result.loss == pytest.approx(np.nanmean(found))
    log = [entry for entry in read_jsonl(tmp_path / "out" / "training.jsonl") if entry["step"] == result.steps]
    first = [entry for entry in read_jsonl(tmp_path / "out" / "training.jsonl") if entry["step"] == 1]
    logged = [entry["loss"] for entry in first + log if "loss" in entry]
    np.testing.assert_allclose(logged, [np.mean(found[:accumulated]), np.nanmean(found[accumulated:])], rtol=1e-5)
    assert [entry["train_loss"] for entry in log if "train_loss" in entry] == pytest.approx([np.nanmean(found)])


def test_collapsed_embeddings_end_the_run(run, tiny_model, tmp_path):
    still = tmp_path / "still"
    shutil.copytree(tiny_model, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    options = {"passage_template": "the the {text}", "max_passage_len": 4}  # all passages are cut to "the the"
    options |= {"learning_rate": 0.0, "num_train_epochs": 4, "save_strategy": "no"}
    with pytest.raises(ValueError, match="the embeddings have collapsed: at step 24"):
        run(model_name_or_path=str(still), **options)


def test_frozen_word_embeddings_stay(run, tmp_path, tiny_model):
    name = "embeddings.word_embeddings.weight"
    run("base", max_steps=1, learning_rate=0.0)
    run("frozen", max_steps=2, word_embeddings="freeze")
    run("trained", max_steps=2)
    base, frozen, trained = (weights(tmp_path / folder) for folder in ("base", "frozen", "trained"))
    np.testing.assert_array_equal(base[name], frozen[name])
    assert not np.array_equal(base[name], trained[name])
    assert any(not np.array_equal(base[key], frozen[key]) for key in base)


def test_frozen_layers_stay_and_the_others_learn(run, tmp_path):
    run("base", max_steps=1, learning_rate=0.0)
    run("frozen", max_steps=2, freeze_layers=1)
    base, frozen = weights(tmp_path / "base"), weights(tmp_path / "frozen")
    changed = {key for key in base if not np.array_equal(base[key], frozen[key])}
    assert changed and all("layers.1." in key or "layer.1." in key for key in changed)
    with pytest.raises(ValueError, match=r"freeze_layers is 2; .* has only 2 layers to train"):
        run("none", freeze_layers=2)


def test_dropout_is_the_models_unless_it_is_given(run, tmp_path):
    for name, options in (("own", {}), ("same", {"dropout": 0.1}), ("none", {"dropout": 0.0})):
        run(name, max_steps=2, **options)
    own, same, none = (weights(tmp_path / folder) for folder in ("own", "same", "none"))
    assert all(np.array_equal(own[key], same[key]) for key in own)
    assert any(not np.array_equal(own[key], none[key]) for key in own)


def test_a_failed_write_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    import paddle

    save, calls = paddle.save, []

    def full(state, path, *args):
        calls.append(path)
        if "checkpoint-6" in path and path.endswith("optimizer.pdopt"):
            raise OSError(28, "No space left on device")
        return save(state, path, *args)

    monkeypatch.setattr(paddle, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-6: cannot write the checkpoint: No space left"):
        run()
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    run()


def test_a_journal_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    journal = tmp_path / "out" / "training.jsonl"
    monkeypatch.setattr(training_folder.Journal, "cut", lambda *args: journal.mkdir())
    with pytest.raises(ValueError, match=r"/out/training\.jsonl: is in the way and no regular file"):
        run(max_steps=1)
    assert not list((tmp_path / "out").glob("*.part"))


def test_an_unwritable_folder_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write there"):
        run("file/out")
    with pytest.raises(ValueError, match=r"/file: output_dir is a file; expected a folder"):
        run("file")


@pytest.mark.parametrize("changed", ["train.json", "dev.json", "corpus.json", "vocab.txt"])
def test_ranks_that_have_read_different_files_do_not_train(tiny_model, data, tmp_path, changed):
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    corpus = write_jsonl(tmp_path / "data" / "corpus.json", [{"text": "an answer"}])
    given = build(
        training_arguments(), model_name_or_path=str(tmp_path / "model"),
        dataset_name_or_path=str(tmp_path / "data"), dev_corpus_path=corpus,
    )  # fmt: skip
    here = training._Inputs.read(given)
    here.digests()  # the base model's is taken when it is first asked for
    (path,) = tmp_path.glob(f"*/{changed}")
    path.write_text(path.read_text().replace("answer", "reply"))
    there = training._Inputs.read(given)
    on_ranks(2, lambda ranks: training._agree_on_inputs(ranks, here))
    name = "model_name_or_path" if changed == "vocab.txt" else str(path)

    def refuses(ranks):
        with pytest.raises(ValueError, match=f"^{name}: rank 1 has read other content there than rank 0; expected"):
            training._agree_on_inputs(ranks, there if ranks.rank else here)

    on_ranks(2, refuses)


def test_two_ranks_train_as_one(run, tiny_model, data, tmp_path):
    """Dropout is drawn by chunk, so with chunks that fall alike the whole run is the same but for rounding."""
    options = {
        "model_name_or_path": tiny_model, "dataset_name_or_path": data, "num_train_epochs": 1, "pooling": "mean",
        "learning_rate": 1e-3, "max_query_len": 16, "max_passage_len": 32, "gradcache_chunk_size": 4,
        "report_to": "none", "save_strategy": "no", "evaluation_strategy": "epoch",
    }  # fmt: skip
    alone = run("alone", **options, per_device_train_batch_size=8)
    path = tmp_path / "two.json"
    given = options | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 4}
    path.write_text(json.dumps(given))
    done = run_script("run_embedding.py", path, nproc=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "two")
    for name in one:
        # A key's bias adds the same to all scores of a query, so its gradient is 0 but for rounding, which Adam's
        # division by the gradient's size makes into steps.
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(two[name], one[name], atol=2e-4, err_msg=name)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["world_size"] == 2
    assert report["metrics"]["ndcg@10"] == pytest.approx(alone.metrics["ndcg@10"], abs=0.02)


FAILS_ON_ONE_RANK = """
    import json
    import os
    import sys
    from utils.arguments import scripts as arguments
    from utils.training import gradients, job as training, folder as training_folder
    from utils.process import runtime

    def main():
        rank, what, calls = runtime.rank(), sys.argv[2], []
        os.dup2(os.open(f"{sys.argv[3]}.{rank}", os.O_CREAT | os.O_WRONLY), 2)
        step, reduce, add = gradients.GradientStep.__call__, gradients.reduce, training_folder.Journal.add

        def stepped(self, batch):
            calls.append(1)
            outcome = step(self, batch)
            return gradients.Outcome(float("nan"), 0.0) if len(calls) == 3 and what == "loss" and rank == 1 else outcome

        def reduced(parameters):
            if len(calls) == 3 and what == "reduce" and rank == 1:
                raise ValueError("rank 1 cannot go on")
            reduce(parameters)

        def added(self, number, *args, **kwargs):
            if number >= 3 and what == "journal":
                raise OSError(28, "No space left on device")
            return add(self, number, *args, **kwargs)

        gradients.GradientStep.__call__, gradients.reduce, training_folder.Journal.add = stepped, reduced, added
        from utils.arguments.training import training_arguments
        training.train(arguments.parse(training_arguments(), [sys.argv[1]], ""))

    runtime.prepare()
    runtime.run(main)
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("reduce", ["another process of this run has ended", "rank 1 cannot go on"]),
        ("loss", ["the loss is nan at step 3", ""]),
        ("journal", ["No space left on device", ""]),
    ],
)
def test_what_goes_wrong_on_one_rank_is_told_in_one_line(tiny_model, data, tmp_path, what, expected):
    script = tmp_path / "fails.py"
    script.write_text(textwrap.dedent(FAILS_ON_ONE_RANK))
    given = {
        "model_name_or_path": tiny_model, "dataset_name_or_path": data, "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4, "embedding_negatives_cross_device": False, "evaluation_strategy": "no",
        "save_strategy": "no", "report_to": "none", "logging_steps": 1,
    }  # fmt: skip
    (tmp_path / "given.json").write_text(json.dumps(given))
    done = run_script(script, tmp_path / "given.json", what, tmp_path / "stderr", nproc=2)
    assert done.returncode != 0
    for rank, message in enumerate(expected):
        lines = (tmp_path / f"stderr.{rank}").read_text()
        assert "Traceback" not in lines, lines
        told = [line for line in lines.splitlines() if "error:" in line]
        assert len(told) == (message != "") and message in "".join(told), lines


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*/emb_argument.json")), ids=lambda p: p.parent.name)
def test_every_shipped_config_is_accepted(path):
    parse(training_arguments(), [str(path)], "")


PADDLENLP = {
    "model_name_or_path": "", "dataset_name_or_path": "", "output_dir": "", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1, "eval_accumulation_steps": 1, "max_steps": 2,
    "learning_rate": 1e-05, "warmup_steps": 20, "logging_steps": 1, "evaluation_strategy": "no",
    "save_strategy": "steps", "save_steps": 20, "save_total_limit": 20, "max_query_len": 1024,
    "max_passage_len": 1024, "group_size": 1, "bf16": False, "fp16_opt_level": "O0", "do_train": True,
    "do_eval": False, "disable_tqdm": True, "load_best_model_at_end": False, "eval_with_do_generation": False,
    "metric_for_best_model": "accuracy", "recompute": True, "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1, "sharding": "stage1", "zero_padding": False, "unified_checkpoint": True,
    "use_flash_attention": True, "amp_custom_black_list": "elementwise_div", "release_grads": True,
    "loss_type": "contrastive", "query_template": "{text}", "passage_template": "{text}",
}  # fmt: skip


def test_paddlenlps_own_keys_are_taken(tiny_model, data, tmp_path):
    paths = {"model_name_or_path": tiny_model, "dataset_name_or_path": data, "output_dir": str(tmp_path / "out")}
    result = training.train(build(training_arguments(), **PADDLENLP | paths))
    assert result.steps == 2


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_do_eval_without_dev_rows_evaluates_nothing(run, data, strategy):
    rows = str(Path(data) / "train.json")
    result = run(dataset_name_or_path=rows, do_eval=True, evaluation_strategy=strategy, max_steps=2, logging_steps=1)
    assert result.steps == 2 and result.metrics == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1e-5}, "unknown argument 'lerning_rate'; did you mean learning_rate?"),
        ({"warmup_step": 1}, "did you mean warmup_steps?"),
        ({"loss_type": "contrastiv"}, "did you mean contrastive?"),
        ({"device": "banana"}, "device is 'banana'; expected one of cpu, gpu"),
        ({"fp16_opt_level": "O9"}, "fp16_opt_level is 'O9'; expected one of O0, O1, O2"),
        ({"do_train": False}, "do_train is False; not supported here: run_embedding.py trains"),
        ({"minimum_eval_times": 3}, "minimum_eval_times is 3; not supported here: eval_steps says"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree is 2; not supported here"),
        ({"ignore_save_lr_and_optim": True}, "not supported here: a killed training goes on with its optimizer"),
        (
            {"ignore_load_lr_and_optim": True},
            "ignore_load_lr_and_optim is True; not supported here: a checkpoint is gone on from with its optimizer",
        ),
        ({"dataset_weights": [1, 2]}, "dataset_weights has 2 numbers for 1 data sets"),
        ({"embedding_matryoshka_weights": [1.0]}, "expected as many as embedding_matryoshka_dims, 0"),
        ({"loss_type": "kl", "group_size": 1}, "kl compares passages"),
        ({"bf16": True, "fp16": True}, "fp16 and bf16 are both true"),
        ({"load_best_model_at_end": True, "evaluation_strategy": "no"}, "need an evaluation_strategy"),
        (
            {"load_best_model_at_end": True, "evaluation_strategy": "steps"},
            "evaluation_strategy is steps, but save_strategy is epoch; expected save_strategy steps too",
        ),
        ({"bf16": "yes"}, "bf16 is 'yes'; expected true or false or null"),
        ({"max_steps": -5}, "max_steps is -5; expected at least -1"),
        ({"max_steps": 0}, "max_steps is 0; expected at least 1, or -1 for as many as num_train_epochs says"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps is 0; expected at least 1"),
        ({"save_steps": -1}, "save_steps is -1; expected at least 0"),
        ({"warmup_steps": -4}, "warmup_steps is -4; expected at least 0"),
        ({"eval_steps": -4}, "eval_steps is -4; expected at least 0"),
        (
            {"report_to": "tensorbord"},
            "report_to holds 'tensorbord'; expected 'all' or 'none' alone, or some of visualdl, ",
        ),
        ({"report_to": ["visualdl", "missing"]}, "report_to is 'missing', which needs no_such_package; it is not"),
    ],
)
def test_bad_arguments(options, message, monkeypatch):
    monkeypatch.setitem(_REPORTS, "missing", "no_such_package")
    with pytest.raises(ArgumentError) as caught:
        build(training_arguments(), **options)
    assert message in str(caught.value)


def test_null_is_none_for_paddlenlps_arguments(tmp_path):
    (tmp_path / "a.json").write_text('{"eval_steps": null, "save_total_limit": null, "run_name": null}')
    given = parse(training_arguments(), [str(tmp_path / "a.json")], "")
    assert given.save_total_limit is None and given.trainer_options() == {}


def test_no_report_is_a_word_of_a_flag_too():
    for text in ("none", "visualdl"):
        given = parse(training_arguments(), ["--report_to", text], "")
        assert given.report_to in (text, [text]) and given.trainer_options() == {"report_to": given.report_to}


def test_more_passages_a_query_than_there_are_are_refused(run):
    with pytest.raises(ValueError, match="group_size is 1,000; the data has only 60 passages"):
        run(group_size=1000)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_tokenizer_of_another_model_is_refused(run, tiny_model, tmp_path, monkeypatch, sampled):
    """Before the weights are loaded, where the preflight's sample shows it."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"card": config["vocab_size"] + 5}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if sampled:
        monkeypatch.setattr(TrainableEncoder, "__init__", None)
    else:
        monkeypatch.setattr(batches, "_SAMPLE_TEXTS", 1)
    with pytest.raises(ValueError, match="expected the model's own tokenizer"):
        run(tokenizer_name_or_path=str(folder))


def test_refusals_import_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['run_embedding.py', '--lerning_rate', '1']; sys.path.insert(0, '.')\n"
        "import run_embedding\n"
        "try: run_embedding.main()\n"
        "except ValueError as error: assert 'learning_rate' in str(error)\n"
        "assert not {'numpy', 'paddle', 'paddlenlp'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, env=dict(os.environ))
