"""No file of weights or of a training's state makes any loader run what it asks for."""

import builtins
import io
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import make_rows, make_tiny_bert, write_jsonl

from utils.arguments.scripts import build
from utils.arguments.training import TrainArguments
from utils.encoding import cross_encoder
from utils.models import checkpoint, paddlenlp, pdparams, torch_files
from utils.models.weight_files import read_weights
from utils.training.job import train


class _Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class _WithState(_Call):
    def __reduce__(self):
        return dict, (), {"attribute": self.call and _Call(*self.call)}


def payloads(victim: Path) -> dict[str, bytes]:
    """Pickles that make a file when they are loaded by a reader that allows them to."""
    command, code = f"touch {victim}", f"open({str(victim)!r}, 'w').close()"
    calls = {
        "system": (os.system, (command,)), "popen": (os.popen, (command,)),
        "run": (subprocess.run, (["touch", str(victim)],)), "eval": (eval, (code,)), "exec": (builtins.exec, (code,)),
        "import": (builtins.__import__, ("antigravity",)), "open": (open, (str(victim), "w")),
        "path": (Path.touch, (victim,)), "copy": (shutil.copy, (__file__, str(victim))),
        "named eval": (eval, (code, {"data": 1})), "getattr": (getattr, (victim, "touch")),
        "bytes": (io.FileIO, (str(victim), "w")),
    }  # fmt: skip
    found = {name: pickle.dumps({"w": _Call(*call)}, protocol=2) for name, call in calls.items()}
    found["state"] = pickle.dumps({"w": _WithState(os.system, (command,))}, protocol=2)
    found["key"] = pickle.dumps({("a", _Call(os.system, (command,))): 1}, protocol=2)
    found["protocol 4"] = pickle.dumps({"w": _Call(os.system, (command,))}, protocol=4)
    found["old opcodes"] = b"cos\nsystem\n(S'" + command.encode() + b"'\ntR."
    found["instance"] = b"(S'" + command.encode() + b"'\nios\nsystem\n."
    found["torch"] = b"ctorch\nload\n(S'" + str(victim).encode() + b"'\ntR."
    found["numpy"] = b"cnumpy.testing._private.utils\nruncstring\n(S'" + code.encode() + b"'\n}tR."
    found["dotted"] = b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.dump\x93."
    return found


NAMES = sorted(payloads(Path("victim")))


def hostile(path: Path, content: bytes) -> None:
    """Puts a pickle where each format has its own."""
    if path.suffix != ".bin":
        path.write_bytes(content)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model_state.pdparams"])
def test_weights(tiny_model, tmp_path, file, name):
    victim, folder = tmp_path / "victim", tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    hostile(folder / file, payloads(victim)[name])
    with pytest.raises(ValueError, match=rf"{file}: (holds|no weights)") as caught:
        read_weights(checkpoint.resolve(str(folder)))
    assert "\n" not in str(caught.value) and not victim.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model_state.pdparams"])
def test_a_reranker(tmp_path, file):
    victim, folder = tmp_path / "victim", tmp_path / "model"
    make_tiny_bert(folder, labels=1)
    (folder / "model.safetensors").unlink()
    for name in ("system", "eval", "old opcodes"):
        hostile(folder / file, payloads(victim)[name])
        with pytest.raises(ValueError, match="cannot load this reranker"):
            cross_encoder.Reranker(str(folder), 32).score([("a", "b")])
    assert not victim.exists()


def test_what_paddlenlp_loads_after_a_download(tmp_path):
    """Only a block of ``checked_files`` stands between a fetched file and Paddle's own loaders."""
    paddlenlp.import_paddlenlp()
    import paddle
    from paddlenlp.transformers import conversion_utils

    victim = tmp_path / "victim"
    for file, holder, load in (
        ("model_state.pdparams", paddle, "load"), ("pytorch_model.bin", conversion_utils, "load_torch")
    ):  # fmt: skip
        hostile(tmp_path / file, payloads(victim)["system"])
        with paddlenlp.checked_files(), pytest.raises(ValueError, match=file):
            getattr(holder, load)(str(tmp_path / file))
    assert not victim.exists()


@pytest.mark.parametrize("file", ["model_state.pdparams", "optimizer.pdopt", "scheduler.pdopt"])
def test_a_checkpoint_to_go_on_from(tiny_model, tmp_path, file):
    data, victim = write_jsonl(tmp_path / "train.jsonl", make_rows(8)), tmp_path / "victim"
    options = {
        "model_name_or_path": tiny_model, "dataset_name_or_path": data, "max_steps": 2, "save_steps": 1,
        "save_strategy": "steps", "per_device_train_batch_size": 4, "group_size": 1, "evaluation_strategy": "no",
    }  # fmt: skip
    train(build(TrainArguments, output_dir=str(tmp_path / "out"), **options))
    hostile(tmp_path / "out" / "checkpoint-1" / file, payloads(victim)["system"])
    options["resume_from_checkpoint"] = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-1"):
        train(build(TrainArguments, output_dir=str(tmp_path / "again"), **options))
    assert not victim.exists()


def test_the_payloads_do_run_where_nothing_forbids_them(tmp_path):
    """Or the tests above could not fail."""
    victim = tmp_path / "victim"
    pickle.loads(payloads(victim)["system"])  # noqa: S301 - this file's own
    assert victim.exists()
    for read in (torch_files.read, pdparams.read):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
