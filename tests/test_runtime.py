"""What the process may use of the machine."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from utils.files import report
from utils.process import runtime


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    limit = runtime._cpu_limit.__wrapped__(str(tmp_path))
    assert limit == expected
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(runtime, "_cpu_limit", lambda: limit)
    assert runtime.cpu_threads() == (expected or 16)


SCRIPT = """
from utils.process import runtime
def main():
    open({path!r}, "w").write("rows")
    runtime.tell("told" * 100_000)
runtime.run(main)
"""


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&- <&-", "| true", "> /dev/full"])
def test_a_job_is_done_whether_or_not_anybody_listens(tmp_path, redirected):
    script, output = tmp_path / "job.py", tmp_path / "out"
    script.write_text(SCRIPT.format(path=str(output)))
    command = f"set -o pipefail; {shlex.quote(sys.executable)} {script} {redirected}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    told = b"No space left on device" if "full" in redirected else b""
    assert done.returncode == 0 and told in done.stderr and (told or not done.stderr)
    assert output.read_text() == "rows"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"PADDLE_TRAINER_ID": "1"}, "rank 1 (PADDLE_TRAINER_ID) of 1 (PADDLE_TRAINERS_NUM)"),
        ({"PADDLE_TRAINERS_NUM": "2"}, "PADDLE_TRAINER_ENDPOINTS is not set"),
        ({"PADDLE_TRAINERS_NUM": "0"}, "rank 0 (PADDLE_TRAINER_ID) of 0 (PADDLE_TRAINERS_NUM)"),
        ({"PADDLE_TRAINERS_NUM": "abc"}, "PADDLE_TRAINERS_NUM is 'abc' in the environment"),
        ({"PADDLE_TRAINER_ID": "-1"}, "PADDLE_TRAINER_ID is '-1' in the environment"),
        ({"PADDLE_LOCAL_SIZE": "4"}, "4 of them here (PADDLE_LOCAL_SIZE)"),
    ],
)
def test_what_is_left_of_a_launchers_variables_is_named(given, expected):
    done = subprocess.run(
        [sys.executable, str(ROOT / "clean_query.py")], env=os.environ | given, capture_output=True, text=True
    )
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


WORKER = """
import sys, time
from pathlib import Path
from utils.process import runtime
def main():
    runtime.prepare()
    {first}
    Path({ready!r}).write_text("ready")
    time.sleep(60)
runtime.run(main)
"""
TWO_RANKS = {
    "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:1,127.0.0.1:2",
    "PADDLE_TRAINERS_NUM": "2",
    "PADDLE_TRAINER_ID": "1",
}


@pytest.mark.parametrize("first", ["", "runtime.import_paddle()"], ids=["plain", "paddle"])
@pytest.mark.parametrize("environment", [{}, TWO_RANKS], ids=["alone", "launched"])
def test_termination_is_told_in_one_line_but_by_no_worker(tmp_path, first, environment):
    ready = tmp_path / "ready"
    (tmp_path / "job.py").write_text(WORKER.format(ready=str(ready), first=first))
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_for(ready)
    job.send_signal(signal.SIGTERM)
    told = "".join(job.communicate(timeout=10))
    if environment:
        assert (job.returncode, told) == (128 + signal.SIGTERM, "")
    else:
        line = "job.py: interrupted; the same command goes on where this run stopped\n"
        assert (job.returncode, told) == (128 + signal.SIGTERM, line)


ORPHAN = """
import os, sys, time
from pathlib import Path
from utils.process import runtime
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
Path({begun!r}).write_text(str(os.getpid()))
runtime.prepare()
Path({alive!r}).write_text("")
"""


def test_a_worker_whose_launcher_is_gone_already_ends(tmp_path):
    begun, alive, job = tmp_path / "begun", tmp_path / "alive", tmp_path / "job.py"
    job.write_text(ORPHAN.format(begun=str(begun), alive=str(alive)))
    for more, lives in (({}, True), ({"PADDLE_RANK_IN_NODE": "1"}, False)):  # only the launcher sets it
        command = f"{shlex.quote(sys.executable)} {job} $$ &"
        subprocess.run(["sh", "-c", command], env=os.environ | TWO_RANKS | more | {"PYTHONPATH": str(ROOT)}, check=True)
        wait_for(begun)
        pid = begun.read_text()
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        assert alive.exists() == lives
        for path in (begun, alive):
            path.unlink(missing_ok=True)


def test_a_launcher_is_known_by_paddle_behind_whatever_started_us(tmp_path):
    """Here the launcher is a process that has mapped a file of that name, and a shell lies between."""
    library = tmp_path / "libpaddle.so"
    library.write_bytes(bytes(4096))
    asks = "from utils.process import runtime; print(runtime._launcher_lives())"
    ask = f"{shlex.quote(sys.executable)} -c '{asks}'; true"
    code = f"""
        import mmap, subprocess
        file = open({str(library)!r})
        kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        subprocess.run(["sh", "-c", {ask!r}], check=True)
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_data_holds_for_a_terminal_is_shown_as_escapes():
    hostile = "a\x1b]0;title\x07b\x1b[2Jc\x9bd\u202ee\x7ff\u200b\u206a\ufeff\r"
    escaped = r"a\x1b]0;title\x07b\x1b[2Jc\x9bd\u202ee\x7ff\u200b\u206a\ufeff\r"
    assert runtime.shown(hostile) == escaped
    assert runtime.shown("line\n\ttab 中文 é 🙂") == "line\n\ttab 中文 é 🙂"
    assert escaped in report.table([("name", hostile)], hostile)
    assert report.shortened("x\x1b[2J", 80) == r"x\x1b[2J"
    record = logging.LogRecord("utils", logging.INFO, "", 0, "%s", (hostile,), None)
    assert report._Formatter("%(message)s").format(record) == escaped


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_fork_of_a_process_that_has_run_a_job_is_refused(tmp_path, method):
    """It would wait for threads that it does not have; a process that starts afresh works."""
    script = tmp_path / "job.py"
    script.write_text(
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.process import runtime\n"
        "def job():\n"
        "    try:\n"
        "        runtime.prepare()\n"
        "    except ValueError as error:\n"
        "        print(error, flush=True)\n"
        "    else:\n"
        "        print('works', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    job()\n"
        f"    worker = multiprocessing.get_context({method!r}).Process(target=job)\n"
        "    worker.start(), worker.join()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first == "works"
    assert second.startswith("this process is a fork of one that has run a job") == (method == "fork")
