"""What a person is told of the time that a job takes."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from utils.encoding.embed import _work
from utils.files.report import Pace


@pytest.mark.parametrize("compiling", [0.0, 40.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 1.5])
def test_at_a_fifth_of_a_run_the_estimate_is_within_a_third(compiling, spread):
    """Texts of lengths that vary by much, the longest first, on a machine whose time goes by operations."""
    rng = np.random.default_rng(3)
    lengths = np.sort(np.clip(rng.lognormal(3.5, spread, 20_000), 3, 512).astype(int))[::-1]
    rounds = [lengths[start : start + 100] for start in range(0, len(lengths), 100)]
    layers, width = 12, 384
    took = [layers * (24 * width**2 * own + 4 * width * own.astype(float) ** 2).sum() / 1e11 for own in rounds]
    times = np.cumsum(took) * rng.uniform(0.9, 1.1, len(took)) + compiling
    works = [_work(own, width) for own in rounds]
    pace = Pace(sum(works), 0.0)
    for work, now in zip(works, times, strict=True):
        pace.update(work, now)
        if now - compiling >= 0.2 * (times[-1] - compiling):
            break
    assert pace.seconds_left() == pytest.approx(times[-1] - now, rel=1 / 3)


def test_the_first_update_counts_until_there_is_a_second():
    pace = Pace(10, 0.0)
    assert pace.seconds_left() == float("inf")
    pace.update(1, 5.0)
    assert pace.seconds_left() == 45.0
    pace.update(1, 6.0)
    assert pace.seconds_left() == 8.0
    pace.update(2, 8.0)
    assert pace.seconds_left() == 6.0


COMPILES = """
from utils.process import runtime
runtime.prepare()
from utils.files import report
report.set_up_logging()
from utils.kernels.compiled import compiled
import numpy as np
inner = compiled()(lambda x: x + 1)
outer = compiled()(lambda x: inner(x) * 2)
runtime.run(lambda: print(outer(1), outer(2), outer(1.5)))
"""


def test_compiling_is_told_of_once_and_how_long_it_took(tmp_path):
    (tmp_path / "job.py").write_text(COMPILES)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py")], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "4 6 5.0\n"
    first, last = done.stderr.splitlines()
    assert first.startswith("compiling loops for this processor: once")
    assert last.startswith("of this run, compiling loops took ") and float(last.split()[-2]) > 0
