"""Scripts under the launcher: the number of processes, and kills, must not change the answer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_rows, run_script, script_command, script_env, write_jsonl

from utils.encoding import engines

OUTPUTS = ("clean.json", "clean.json.removed.jsonl")


@pytest.fixture(scope="module")
def cleaning_flags(tmp_path_factory, tiny_model):
    source = write_jsonl(tmp_path_factory.mktemp("launch") / "in.json", make_rows(2500, seed=3))
    return ["--model_path", tiny_model, "--input_data_path", source, "--similarity_threshold", "0.985",
            "--batch_tokens", "256"]  # fmt: skip


@pytest.fixture(scope="module")
def expected(cleaning_flags, tmp_path_factory):
    """The bytes that one unbroken process writes."""
    folder = tmp_path_factory.mktemp("expected")
    done = run_script("clean_query.py", *cleaning_flags, "--output_data_path", folder / "clean.json")
    assert done.returncode == 0, done.stderr
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


@pytest.mark.parametrize("nproc", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(nproc, cleaning_flags, expected, tmp_path):
    flags = [*cleaning_flags, "--output_data_path", tmp_path / "clean.json"]
    done = run_script("clean_query.py", *flags, nproc=nproc, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path) == expected


def test_options_that_send_more_between_ranks(cleaning_flags, tmp_path):
    """Rejected rows, a reference and merged positives, on two ranks as on one."""
    rows = [json.dumps(row).encode() for row in make_rows(200, seed=4)]
    rows[7] = b"{broken"
    (tmp_path / "in.json").write_bytes(b"\n".join(rows))
    reference = write_jsonl(tmp_path / "dev.json", make_rows(5, seed=4))
    flags = [*cleaning_flags, "--input_data_path", tmp_path / "in.json", "--reference_data_path", reference,
             "--on_bad_row", "skip", "--merge_positives", "true", "--output_data_path"]  # fmt: skip
    for nproc in (1, 2):
        (tmp_path / str(nproc)).mkdir()
        done = run_script("clean_query.py", *flags, tmp_path / str(nproc) / "clean.json", nproc=nproc, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in (*OUTPUTS, "clean.json.rejected.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert b'"leakage"' in (tmp_path / "1" / OUTPUTS[1]).read_bytes()


def test_a_bad_input_ends_every_process(cleaning_flags, tmp_path):
    flags = [*cleaning_flags, "--input_data_path", "none.json", "--output_data_path", tmp_path / "clean.json"]
    done = run_script("clean_query.py", *flags, nproc=2, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "error: none.json: no such file" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_then_a_rerun_gives_the_same_bytes(victim, cleaning_flags, expected, tmp_path):
    flags = [*cleaning_flags, "--output_data_path", tmp_path / "clean.json"]
    launcher = start(flags, nproc=2, cwd=tmp_path)
    ranks = wait_for_ranks(launcher, 2)
    wait_for_work(tmp_path)
    kill(ranks[victim])
    assert launcher.wait(60) != 0
    assert not (tmp_path / "clean.json").exists()
    done = run_script("clean_query.py", *flags)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == expected


def test_a_killed_launcher_takes_its_ranks_along(cleaning_flags, expected, tmp_path):
    flags = [*cleaning_flags, "--output_data_path", tmp_path / "clean.json"]
    launcher = start(flags, nproc=2, cwd=tmp_path)
    ranks = wait_for_ranks(launcher, 2)
    wait_for_work(tmp_path)
    kill(launcher.pid)
    launcher.wait(10)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)
    assert run_script("clean_query.py", *flags).returncode == 0
    assert contents(tmp_path) == expected


def start(flags, nproc: int, cwd: Path) -> subprocess.Popen:
    command = script_command("clean_query.py", *flags, nproc=nproc)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=cwd, env=script_env(), **quiet)


def wait_for_ranks(launcher: subprocess.Popen, count: int) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pids = [int(pid) for pid in children.read_text().split()]
        if len(pids) == count:
            return pids
        time.sleep(0.05)
    raise AssertionError("the launcher started no ranks")


def wait_for_work(folder: Path) -> None:
    """Until the first batches are on disk."""
    deadline = time.monotonic() + 60
    while not list(folder.glob("clean.json.work/*/journal")):
        assert time.monotonic() < deadline, "no embeddings were written"
        time.sleep(0.01)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(engines.device() == "gpu", reason="devices are there")
def test_the_readme_names_what_paddles_launcher_says_without_devices(tmp_path):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--devices", "0,1", "--log_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(ROOT / "clean_query.py"), "--help"],
        cwd=tmp_path, env=script_env(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert done.returncode != 0
    for name in ("README.md", "README.zh-CN.md", "docs/training.md"):
        assert f"`{last}`" in (ROOT / name).read_text(encoding="utf-8")
