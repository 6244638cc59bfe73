"""Weights in PyTorch's older format, against the same in safetensors, and in other types."""

import json
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from utils.encoding.engines import PaddleEngine
from utils.models import checkpoint, loading, paddlenlp, torch_files, weight_files
from utils.models.weight_files import read_weights, write_weights
from utils.training import export

LAYER_NORM = "encoder.layer.1.output.LayerNorm"


class _Storage:
    def __init__(self, kind: str, values: np.ndarray, key: str):
        self.view, self.values = values, values if values.base is None else values.base
        self.kind, self.key = kind, key


class _Tensor:
    def __init__(self, storage: _Storage):
        self.storage = storage

    def __reduce__(self):
        view, whole = self.storage.view, self.storage.values
        strides = tuple(stride // whole.itemsize for stride in view.strides)
        offset = (view.ctypes.data - whole.ctypes.data) // whole.itemsize
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (self.storage, offset, view.shape, strides, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return "storage", getattr(sys.modules["torch"], obj.kind), obj.key, "cpu", obj.values.size
        return None


def save_torch(path: Path, state: dict[str, np.ndarray], monkeypatch) -> None:
    """Writes what torch.save would; bfloat16 are given as their bits, uint16."""
    torch, torch_utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"):
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        """Only its name is written."""

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch_utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage", "int64": "LongStorage"}
    storages = {
        name: _Storage(kinds[values.dtype.name], values, str(i)) for i, (name, values) in enumerate(state.items())
    }
    with monkeypatch.context() as patched, zipfile.ZipFile(path, "w") as archive:
        patched.setitem(sys.modules, "torch", torch)
        patched.setitem(sys.modules, "torch._utils", torch_utils)
        with archive.open("archive/data.pkl", "w") as stream:
            _Pickler(stream, protocol=2).dump({name: _Tensor(storage) for name, storage in storages.items()})
        for storage in storages.values():
            archive.writestr(f"archive/data/{storage.key}", storage.values.tobytes())


@pytest.fixture
def torch_model(tmp_path, tiny_model, monkeypatch):
    """A function that stores the tiny model as pytorch_model.bin, its weights changed by another function."""

    def make(change=lambda state: state) -> checkpoint.Checkpoint:
        folder = tmp_path / "torch"
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        state = {name: np.array(values) for name, values in read_weights(checkpoint.resolve(tiny_model)).items()}
        save_torch(folder / "pytorch_model.bin", change(state), monkeypatch)
        return checkpoint.resolve(str(folder))

    return make


def vectors(model: checkpoint.Checkpoint) -> np.ndarray:
    ids = np.random.default_rng(0).integers(5, 30, (3, 16))
    return PaddleEngine(model, "float32", "cpu").forward(
        ids, np.array([16, 9, 4]), np.full((3, 16), 1 / 16, np.float32)
    )


def old_names(state: dict) -> dict:
    return {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): w for name, w in state.items()}


@pytest.mark.parametrize("change", [dict, old_names])
def test_a_model_in_the_older_format_is_the_same_model_and_its_folder_stays_as_it_is(torch_model, tiny_model, change):
    model = torch_model(change)
    before = sorted(path.name for path in model.folder.iterdir())
    expected = read_weights(checkpoint.resolve(tiny_model))
    found = read_weights(model)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    np.testing.assert_array_equal(vectors(model), vectors(checkpoint.resolve(tiny_model)))
    assert sorted(path.name for path in model.folder.iterdir()) == before


def test_a_weight_that_is_not_there_is_named(torch_model):
    model = torch_model(lambda state: {name: w for name, w in state.items() if not name.startswith(LAYER_NORM)})
    with pytest.raises(ValueError, match=LAYER_NORM):
        vectors(model)


def test_other_types_in_the_older_format(torch_model):
    half, brain = np.arange(6, dtype=np.float16).reshape(2, 3), np.array([0x3F80, 0xC040], np.uint16)
    found = read_weights(torch_model(lambda state: {"half": half, "brain": brain, "ids": np.arange(4)}))
    assert found["half"].tolist() == half.tolist() and found["brain"].tolist() == [1.0, -3.0]
    assert set(found) == {"half", "brain"} and found["half"].dtype == found["brain"].dtype == np.float32


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[:, 2:5],  # columns of a wider matrix
        lambda whole: whole[1::2],
        lambda whole: whole.T,
        lambda whole: np.swapaxes(whole.reshape(4, 2, 3), 0, 2),
        lambda whole: whole[2:3, 1],
        lambda whole: whole[:0],
    ],
)
def test_a_view_of_a_larger_storage_is_read_as_that_view(tmp_path, view, monkeypatch):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    path = tmp_path / "pytorch_model.bin"
    save_torch(path, {"w": view(whole), "whole": whole}, monkeypatch)
    found = torch_files.read(path)
    np.testing.assert_array_equal(found["w"], view(whole))
    np.testing.assert_array_equal(found["whole"], whole)


@pytest.mark.parametrize(("offset", "size", "stride"), [(0, (9, 9), (9, 1)), (-4, (2,), (1,)), (20, (5,), (1,))])
def test_a_view_beyond_its_storage_is_refused(offset, size, stride):
    with pytest.raises(ValueError, match="a tensor "):
        torch_files._tensor(np.arange(24, dtype=np.float32), offset, size, stride)


@pytest.mark.parametrize(
    "says",
    [
        {"data_offsets": [0]},
        {"data_offsets": [0, 8, 8]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": "08"},
        {"data_offsets": [8, 0]},
        {"shape": [-1, -2]},
        {"shape": "2"},
        {"shape": 2},
        {"shape": [2.0]},
        {"shape": [10**30]},
        {"shape": [3]},
        {"dtype": ["F32"]},
    ],
)
def test_a_header_that_says_what_cannot_be_is_named_with_its_file(tmp_path, says):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | says}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors: .*damaged"):
        weight_files._mapped(path)


def test_a_damaged_file_of_the_older_format_is_named(torch_model):
    model = torch_model()
    (path,) = model.weight_files()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: no weights of PyTorch's, or a damaged file"):
        read_weights(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_is_loaded_in_the_type_that_a_gpu_computes_in(tiny_model, dtype):
    model = checkpoint.resolve(tiny_model)
    exact, rounded = (loading.load_model(model, kind).state_dict() for kind in ("float32", dtype))
    for name, values in rounded.items():
        assert str(values.dtype) == f"paddle.{dtype}"
        if not name.startswith("pooler."):
            np.testing.assert_allclose(values.astype("float32").numpy(), exact[name].numpy(), rtol=2**-8, atol=1e-7)


def test_a_model_makes_its_masks_in_its_own_type(tiny_model, monkeypatch):
    """A mask in float32 would make float32 of scores in bfloat16, which are not multiplied by values in bfloat16."""
    import paddle

    engine, seen = PaddleEngine(checkpoint.resolve(tiny_model), "bfloat16", "cpu"), []

    def model(ids, attention_mask):
        seen.append(paddle.get_default_dtype())
        return paddle.ones([*ids.shape, 4])

    monkeypatch.setattr(engine, "_model", model)
    engine.forward(np.ones((1, 3), np.int64), np.array([3]), np.full((1, 3), 1 / 3, np.float32))
    assert seen == ["bfloat16"] and paddle.get_default_dtype() == "float32"


@pytest.mark.parametrize("kind", ["albert", "squeezebert"])
def test_a_model_with_whole_numbers_among_its_weights_is_loaded_from_either_format(tmp_path, kind):
    import paddle

    config = {"model_type": kind, "architectures": [{"albert": "AlbertModel", "squeezebert": "SqueezeBertModel"}[kind]]}
    config |= {"vocab_size": 30, "hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("a\n")
    kept = tmp_path / "model_state.pdparams"
    kept.touch()
    model = paddlenlp.new_model(checkpoint.resolve(str(tmp_path)), "float32")
    state = model.state_dict()
    assert not state["embeddings.position_ids"].is_floating_point()
    paddle.save(state, str(kept))
    found = [loading.load_model(checkpoint.resolve(str(tmp_path))).state_dict()]
    if kind == "albert":  # PyTorch's form of the other is none that is supported
        export.check_torch_weights(model, checkpoint.resolve(str(tmp_path)))
        kept.unlink()
        write_weights(loading.to_torch(model, state), tmp_path / "model.safetensors")
        found.append(loading.load_model(checkpoint.resolve(str(tmp_path))).state_dict())
    for own in found:
        assert all((own[name] == values).all() for name, values in state.items())
