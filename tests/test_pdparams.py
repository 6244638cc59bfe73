"""Paddle's files read without Paddle, against paddle.load."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from utils.models import pdparams


def _state() -> dict:
    import paddle

    paddle.seed(0)
    model = paddle.nn.Sequential(paddle.nn.Linear(3, 2), paddle.nn.LayerNorm(2))
    extra = {"half": paddle.randn([2, 2]).astype("float16"), "brain": paddle.to_tensor([1.5, -3.0], dtype="bfloat16")}
    return dict(model.state_dict()) | extra | {"ids": paddle.to_tensor([1, 2]), "empty": paddle.zeros([0, 3])}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", ["tensors", "arrays"])
def test_the_same_as_paddle_reads(tmp_path, protocol, kind):
    import paddle

    path, state = tmp_path / "model_state.pdparams", _state()
    expected = {name: tensor.astype("float32").numpy() for name, tensor in state.items() if name != "ids"}
    if kind == "arrays":
        state = {name: tensor.numpy() for name, tensor in state.items()}
    paddle.save(state, str(path), protocol=protocol)
    found = pdparams.read(path)
    assert found.keys() == expected.keys() == paddle.load(str(path), return_numpy=True).keys() - {"ids"}
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values)


def test_a_large_array_in_parts(tmp_path):
    """What Paddle makes of more than a gigabyte in an old pickle."""
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    state = {"w@@.0": whole.ravel()[:7], "w@@.1": whole.ravel()[7:], "b": np.ones(2, np.float32)}
    state["UnpackBigParamInfor@@"] = {"w": {"OriginShape": (3, 4), "slices": ["w@@.0", "w@@.1"]}}
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps(state, protocol=2))
    found = pdparams.read(path)
    assert found.keys() == {"w", "b"}
    np.testing.assert_array_equal(found["w"], whole)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_numpy_keeps_beside_and_in_any_protocol(tmp_path, protocol):
    import paddle

    path = tmp_path / "model_state.pdparams"
    columns = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    state = {"w": np.arange(3, dtype=np.float32), "columns": columns, "epoch": np.int64(3), "loss": np.float32(0.5)}
    content = pickle.dumps(state, protocol=protocol)
    second = content.replace(b"numpy.core.", b"numpy._core.") if protocol == 2 else content
    for written in (content, second):
        path.write_bytes(written)
        found = pdparams.read(path)
        assert found.keys() == {"w", "columns"}
        np.testing.assert_array_equal(found["w"], state["w"])
        np.testing.assert_array_equal(found["columns"], columns)
    path.write_bytes(content)
    assert paddle.load(str(path), return_numpy=True).keys() == state.keys()


class _Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_what_a_file_asks_for_is_not_run(tmp_path):
    path, victim = tmp_path / "model_state.pdparams", tmp_path / "victim"
    evil = [_Evil(victim.write_text, ("x",)), _Evil(eval, (f"open({str(victim)!r}, 'w')",))]
    for value in [*evil, _Evil(eval, (f"open({str(victim)!r}, 'w')", {"data": 1}))]:
        path.write_bytes(pickle.dumps({"w": value}, protocol=4))
        with pytest.raises(
            ValueError, match=r"no weights of Paddle's, or a damaged file|holds .*\.getattr, which is not read here"
        ):
            pdparams.read(path)
        assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x04N.", b"\x80"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: no weights of Paddle's, or a damaged file \("):
        pdparams.read(path)
    import paddle

    paddle.save(_state(), str(path))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        pdparams.read(path)


def test_reading_does_not_import_paddle(tmp_path):
    import paddle

    path = tmp_path / "model_state.pdparams"
    paddle.save(_state(), str(path))
    code = "import sys; from pathlib import Path; from utils.models import pdparams; "
    code += f"pdparams.read(Path({str(path)!r})); "
    code += "assert not any(name.startswith('paddle') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
