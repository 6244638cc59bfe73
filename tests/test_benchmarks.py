"""The benchmarks on processors with and without bfloat16 products, their processes replaced."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare
import training_step

from utils.kernels import onednn


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs compare.py; a process that multiplies in bfloat16 without the processor's help takes too long."""

    def run(has_bfloat16: bool, too_slow=()) -> tuple[str, list[tuple[str, dict]]]:
        asked = []

        def process(self, ours: bool, job: str, arguments: dict) -> dict:
            asked.append((job, arguments))
            name = f"{'ours' if ours else 'rival'} {job}"
            kinds = [arguments.get("dtype"), *arguments.get("kinds", ())]
            if name in too_slow or ("bfloat16" in kinds and not has_bfloat16):
                raise subprocess.TimeoutExpired("it", self.limit)
            if job == "peak":
                return {"speeds": {f"torch {kind}": 1e9 for kind in arguments["kinds"]}, "versions": {"torch": "1"}}
            np.save(arguments["output"], np.ones((3, 4), np.float32))
            kind = "bfloat16" if arguments["dtype"] != "float32" and has_bfloat16 else "float32"
            return {"seconds": 1.0, "memory": 1 << 20, "flops": {"seconds": 1e8}, "arithmetic": f"torch {kind}"}

        monkeypatch.setattr(compare, "has_bfloat16", lambda: has_bfloat16)
        monkeypatch.setattr(compare.Bench, "_process", process)
        monkeypatch.setattr(compare, "_printed", lambda *command: str(tmp_path))
        monkeypatch.setattr(compare, "numpy_peak", lambda: 1e9)
        flags = ["--rivals", sys.executable, "--output", str(tmp_path), "--texts", "3", "--rounds", "2"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags, "--jobs", "minilm", "e5"])
        compare.main()
        return capsys.readouterr().out, asked

    return run


def test_without_bfloat16_products_what_needs_them_is_left_out_and_named(bench):
    table, asked = bench(has_bfloat16=False)
    assert [arguments["kinds"] for job, arguments in asked if job == "peak"] == [["float32"]] * 2
    assert not [arguments for _, arguments in asked if arguments.get("dtype") == "bfloat16"]
    lines = [line for line in table.splitlines() if "encode, " in line]
    assert [compare.NO_BFLOAT16 in line for line in lines] == [False, True, False, False, False]
    assert all("1.00 (1.00 to 1.00)" in line and "10%" in line for line in lines if compare.NO_BFLOAT16 not in line)
    assert "`auto` is float32" in table


def test_with_bfloat16_products_everything_runs(bench):
    table, asked = bench(has_bfloat16=True)
    assert [arguments["kinds"] for job, arguments in asked if job == "peak"] == [["float32", "bfloat16"]] * 2
    assert "left out" not in table and "`auto` is float32" not in table
    assert table.count("1.00 (1.00 to 1.00)") == 5


def test_a_benchmark_in_which_every_rival_is_too_slow_ends_well(bench):
    table, _ = bench(has_bfloat16=True, too_slow={"rival encode"})
    assert table.count("not done after 1800 s") == 5


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_training_steps_are_compared_in_what_the_processor_has(has_bfloat16, monkeypatch, capsys):
    class Side:
        def __init__(self, python, name, model, dropout, bfloat16):
            assert has_bfloat16 or not bfloat16  # or the process ends with status 1

        def seconds(self) -> float:
            return 1.0

        def close(self) -> None:
            pass

    monkeypatch.setattr(training_step, "Side", Side)
    monkeypatch.setattr(compare, "has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--model", "m", "--torch", "t", "--rounds", "2"])
    training_step.main()
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split(": ")[0].rpartition(" ")[2] for line in lines]
    assert kinds == (["float32", "bf16"] * 2 if has_bfloat16 else ["float32", "float32", "bf16"])
    assert has_bfloat16 or lines[-1] == f"bf16: {compare.NO_BFLOAT16}"


def test_the_processor_is_asked():
    assert compare.has_bfloat16() == onednn.bfloat16_is_fast()
