"""The classes beside a project's own ``utils``."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_jsonl

PROGRAM = """
import sys
import utils
from paddle_embedding_toolkit import Clean_Query, Embedding_Evaluation, MiningNegativeSamples, build_encoders

assert utils.OWN == 7
result = Clean_Query(input_data_path="in.jsonl", output_data_path="out.jsonl", embeddings_path="v.npy").clean()
assert len(result.kept_rows) == 3
assert not [name for name in sys.modules if name.startswith("utils.")]
"""


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT / "utils") for path in (ROOT / "utils").rglob("*.py")}
    names = {".".join(("paddle_embedding_toolkit", *folder.parts)) for folder in folders}
    assert {*setup["packages"]} == names and setup["package-dir"] == {"paddle_embedding_toolkit": "utils"}


def test_a_project_with_a_utils_of_its_own_imports_the_classes(tmp_path):
    """Nothing in the package may name itself ``utils``."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "utils", tmp_path / "site" / "paddle_embedding_toolkit", ignore=ignore)
    project = tmp_path / "project"
    (project / "utils").mkdir(parents=True)
    (project / "utils" / "__init__.py").write_text("OWN = 7")
    (project / "program.py").write_text(PROGRAM)
    write_jsonl(project / "in.jsonl", [{"query": f"query {i}"} for i in range(3)])
    np.save(project / "v.npy", np.eye(3, dtype=np.float32))
    command = [sys.executable, "program.py"]
    subprocess.run(command, cwd=project, env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}, check=True)
