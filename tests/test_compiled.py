"""Compiled loops where the disk is full, and where numba is told of another processor."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PRODUCT = """
    import resource, sys
    import numpy as np
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    from utils.kernels import search_loops as search_kernels
    ones = np.ones((2, 8), np.float32)
    rows = np.zeros(1, np.int64)
    assert search_kernels.score_pairs(ones, rows, ones, rows)[0] == 8
    from utils.kernels.amx import tiles as amx
    print(amx.is_usable())
"""


def run(limit: str, **environment: str) -> subprocess.CompletedProcess:
    code = "\n".join(line.strip() for line in PRODUCT.format(limit=limit).splitlines())
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_loops_that_are_not_to_be_compiled_are_refused():
    code = "from utils.process import runtime\nruntime.run(lambda: __import__('utils.kernels.search_loops'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "error: NUMBA_DISABLE_JIT is set; unset it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_machine_code_that_cannot_be_kept_costs_no_run(tmp_path):
    """A limit of one byte a file stands for a full disk: Python ignores the signal, and the call fails alike."""
    done = run("1", NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    kept = run("resource.RLIM_INFINITY", NUMBA_CACHE_DIR=str(tmp_path))
    assert kept.returncode == 0, kept.stderr
    assert list(tmp_path.rglob("*.nbc"))


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
def test_damaged_machine_code_is_made_again(tmp_path, kind):
    assert run("resource.RLIM_INFINITY", NUMBA_CACHE_DIR=str(tmp_path)).returncode == 0
    whole = {path: path.read_bytes() for path in tmp_path.rglob(kind)}
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    done = run("resource.RLIM_INFINITY", NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert whole and all(path.stat().st_size > len(content) // 2 for path, content in whole.items())


def test_machine_code_is_made_anew_when_any_compiled_source_changes(tmp_path, monkeypatch):
    """A function is compiled into others of other files, too."""
    from utils.kernels import compiled

    utils = ROOT / "utils"
    shutil.copytree(utils, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "kernels" / "compiled.py"))
    decorated = [
        path for path in utils.rglob("*.py") if re.search(r"^@_?(compiled|inlined)|njit", path.read_text(), re.M)
    ]
    assert len(decorated) > 5
    for path in decorated:
        before = compiled._folder_for_these_sources()
        with open(tmp_path / path.relative_to(utils), "a") as stream:
            stream.write("# another\n")
        assert compiled._folder_for_these_sources() != before


@pytest.mark.parametrize("told", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_FEATURES": "+avx2,+fma"}])
def test_amx_is_used_only_where_numba_knows_of_it(told, tmp_path):
    done = run("resource.RLIM_INFINITY", NUMBA_CACHE_DIR=str(tmp_path), **told)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
