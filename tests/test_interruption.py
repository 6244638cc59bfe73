"""What an interrupted training says comes true."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, read_jsonl, script_command, script_env, write_jsonl

from utils.arguments.scripts import build
from utils.arguments.training import training_arguments
from utils.models.pdparams import read
from utils.process import interruption
from utils.training import job as training
from utils.training.gradients import GradientStep
from utils.training.trainer import EmbeddingTrainer


@pytest.fixture(scope="module")
def given(tiny_model, tmp_path_factory) -> dict:
    rows = make_rows(60)
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.json", rows)
    write_jsonl(folder / "dev.json", rows[:15])
    return {
        "model_name_or_path": tiny_model, "dataset_name_or_path": str(folder), "per_device_train_batch_size": 8,
        "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 4, "max_query_len": 16, "max_passage_len": 32,
        "pooling": "mean", "report_to": "none", "early_stopping_patience": 9,
    }  # fmt: skip


def train(given: dict, folder: Path, **options):
    return training.train(build(training_arguments(), **given, output_dir=str(folder), **options))


def assert_same_weights(one: Path, other: Path) -> None:
    one, other = (read(folder / "model_state.pdparams") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def send_at(step: int, monkeypatch, where=GradientStep, name="__call__", times: int = 1) -> None:
    """SIGINT comes in the call of that number."""
    original, calls = getattr(where, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)


OPTIONS = [
    {},
    {"save_strategy": "no", "lora": True},
    {"save_strategy": "steps", "save_steps": 4, "evaluation_strategy": "no", "early_stopping_patience": None},
    {"gradient_accumulation_steps": 3, "plain_accumulation": True},
    {"load_best_model_at_end": True, "save_total_limit": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_interrupted_training_goes_on_from_the_step_that_it_names(given, tmp_path, monkeypatch, options):
    """Interrupted again and again: at its first step, within an epoch, at an epoch's last and the training's last."""
    given = given | options
    whole = train(given, tmp_path / "whole")
    at = [1, 2, whole.steps // 2, whole.steps - 1, whole.steps]
    done = 0
    for step in sorted({*at}):
        with monkeypatch.context() as patched:
            send_at(step - done, patched, EmbeddingTrainer, "training_step")
            with pytest.raises(interruption.Interrupted) as found:
                train(given, tmp_path / "broken")
        expected = f"checkpoint-{step} is saved, and the same command goes on from step {step}"
        assert (str(found.value), found.value.number) == (expected, signal.SIGINT)
        done = step
    again = train(given, tmp_path / "broken")
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
    assert (again.steps, again.metrics) == (whole.steps, whole.metrics) and again.loss == pytest.approx(whole.loss)
    evaluations = [
        [entry["step"] for entry in read_jsonl(tmp_path / name / "training.jsonl") if "eval_ndcg@10" in entry]
        for name in ("whole", "broken")
    ]
    assert evaluations[0] == evaluations[1]


def test_what_is_said_where_nothing_is_saved(given, tmp_path, monkeypatch):
    """Before training, in the evaluation before it, and by a second signal within the first step."""
    nothing = "nothing was saved, so the same command starts at step 0 again"
    for where, name, times, expected in (
        (training.Job, "preflight", 1, "nothing was saved by this run; the same command starts where it did"),
        (training.Job, "evaluate", 1, nothing),
        (GradientStep, "__call__", 2, nothing),
    ):
        with monkeypatch.context() as patched:
            send_at(1, patched, where, name, times)
            with pytest.raises(interruption.Interrupted, match=expected):
                train(given, tmp_path / "out")
        assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_promise_names_the_argument_that_would_break_it(given, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        send_at(3, patched)
        with pytest.raises(
            interruption.Interrupted, match=r"^checkpoint-3 is saved, and the same command without overw"
        ):
            train(given, tmp_path / "out", overwrite_output_dir=True)
    found = train(given, tmp_path / "out")
    assert found.steps == 16


def test_a_checkpoint_by_time_takes_the_last_ones_place(given, tmp_path, monkeypatch):
    kept, save = [], EmbeddingTrainer._write_checkpoint

    def saved(self):
        save(self)
        kept.append(sorted(int(path.name[11:]) for path in (tmp_path / "out").glob("checkpoint-*")))

    monkeypatch.setattr(EmbeddingTrainer, "_write_checkpoint", saved)
    train(given, tmp_path / "out", save_minutes=1e-9)  # after every step
    assert kept == [*([step] for step in range(1, 9)), *([8, step] for step in range(9, 17))]
    kept.clear()
    train(given, tmp_path / "out", save_strategy="no", save_minutes=1e-9, overwrite_output_dir=True)
    assert kept == [[step] for step in range(1, 17)]
    kept.clear()
    train(given, tmp_path / "out", save_strategy="no", overwrite_output_dir=True)
    assert kept == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_terminated_script_comes_to_the_same_weights(given, tmp_path, n):
    """At whatever moments; what it says is in its own stderr, or in the launcher's log of rank 0."""
    given = given | {"num_train_epochs": 8, "per_device_train_batch_size": 4, "seed": 3}

    def start(folder: str) -> tuple[subprocess.Popen, Path]:
        (tmp_path / f"{folder}.json").write_text(json.dumps(given | {"output_dir": str(tmp_path / folder)}))
        command = script_command("run_embedding.py", tmp_path / f"{folder}.json", nproc=n)
        told = tmp_path / f"{folder}.told"
        if n > 1:
            command[command.index("--log_dir") + 1] = str(tmp_path / f"{folder}.log")
            told = tmp_path / f"{folder}.log" / "workerlog.0"
            told.unlink(missing_ok=True)
        with open(tmp_path / f"{folder}.told", "w") as stream:
            return subprocess.Popen(command, stderr=stream, stdout=subprocess.DEVNULL, env=script_env()), told

    job, told = start("whole")
    assert job.wait(timeout=300) == 0, told.read_text()
    steps, promised = [], None
    for patience, log in ((0, "read"), (0.3, "step"), (0.1, "step"), (0.6, "step")):
        job, told = start("broken")
        sign = "queries an epoch" if log == "read" else r"step \d+: loss"
        deadline = time.monotonic() + 120
        while not (told.exists() and re.search(sign, told.read_text())):
            assert time.monotonic() < deadline and job.poll() is None, told.read_text()
            time.sleep(0.01)
        if promised is not None:
            assert f"going on from {tmp_path / 'broken' / f'checkpoint-{promised}'}" in told.read_text()
        time.sleep(patience)
        job.terminate()
        job.wait(timeout=60)
        last = told.read_text().splitlines()[-1]
        found = re.search(r"interrupted; (?:nothing was saved|checkpoint-(\d+) is saved.*from step (\d+)$)", last)
        assert found, told.read_text()
        assert found[1] == found[2]
        promised = found[1] or promised
        steps.append(promised)
    assert steps[0] is None and steps[-1] is not None
    job, told = start("broken")
    assert job.wait(timeout=300) == 0, told.read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
