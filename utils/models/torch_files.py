"""Weights in files of ``torch.save``, read without PyTorch and without running what a pickle says.

Such a file is a zip archive: ``data.pkl`` describes tensors as views (offset, size, stride) of storages, whose raw
values are archive members of their own.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from . import pdparams

# PyTorch's storages and their values; bfloat16 as its bits.
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip


def read(path: Path) -> dict[str, np.ndarray]:
    """The floating-point weights of a file of ``torch.save``, as float32; views where they were views.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, in the format before PyTorch 1.6, or holds more than tensors, numbers and text.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            state = _Unpickler(archive).load()
        return pdparams.floats(dict(state))
    except OSError:
        raise
    except pdparams.UnknownError as error:
        raise ValueError(f"{path}: holds {error}, which is not read here; expected tensors and numbers alone") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle ends in whatever its bytes happen to ask for
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no weights of PyTorch's, or a damaged file ({reason})") from None


class _Unpickler(pickle.Unpickler):
    """Tensors, numbers and text in containers, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile):
        (pickled,) = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        self._archive, self._folder = archive, pickled.removesuffix("data.pkl")
        self._storages: dict[str, np.ndarray] = {}
        if f"{self._folder}byteorder" in archive.namelist() and self._member("byteorder") != b"little":
            raise ValueError("its values are not little-endian")
        super().__init__(archive.open(pickled), encoding="utf-8")

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        return pdparams.allowed(module, name)

    def persistent_load(self, pid) -> np.ndarray:
        kind, dtype, key, _, n_values = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"a reference to {kind!r:.40}")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._member(f"data/{key}"), dtype)
        if len(self._storages[key]) != n_values:
            raise ValueError(f"storage {key} holds {len(self._storages[key])} values; expected {n_values}")
        return self._storages[key]

    def _member(self, name: str) -> bytes:
        """A member of the archive. PyTorch compresses none, and a compressed one could be of any size."""
        entry = self._archive.getinfo(self._folder + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed")
        return self._archive.read(entry)


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    """The view of a storage that a tensor is; offset and stride count values.

    Raises:
        ValueError: it reaches beyond the storage.
    """
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {tuple(size)} and stride {tuple(stride)}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise ValueError(f"a tensor that needs {last + 1} values of {len(storage)}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps, writeable=False)


def _parameter(data: np.ndarray, *_) -> np.ndarray:
    return data


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
}
