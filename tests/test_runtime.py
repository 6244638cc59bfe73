"""What the process may use of the machine."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import runtime


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
from utils import runtime
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
