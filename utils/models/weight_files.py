"""A checkpoint's weights as NumPy arrays, by name, whatever the format of their files."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Parameters = dict[str, np.ndarray]

_FLOAT_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
# What the first BERT checkpoints call the parts of a layer norm; transformers renames them, too.
_RENAMED = {".gamma": ".weight", ".beta": ".bias"}


def read_weights(model: "Checkpoint") -> Parameters:
    """All floating-point weights as float32.

    Of safetensors, what is stored as float32 is mapped from the file, and shared by all processes that read it.

    Raises:
        ValueError: a file is damaged.
    """
    files = model.weight_files()
    if files[0].suffix == ".pdparams":
        from .pdparams import read
    elif files[0].suffix == ".safetensors":
        read = _mapped
    else:
        from .torch_files import read
    return {_renamed(name): values for path in files for name, values in read(path).items()}


def write_weights(weights: Parameters, path: Path) -> None:
    """A safetensors file, as PyTorch's programs expect it.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its only way to tell of a full disk
        raise OSError(str(error).removeprefix("Error while serializing: ")) from None
    path.chmod(mode)  # it puts a file in place that nobody else may read


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _place(shape: list, start: int, stop: int) -> tuple[tuple[int, ...], int, int]:
    """What a safetensors header says of a tensor.

    Raises:
        ValueError: it is something else than sizes and offsets.
    """
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError
    return tuple(shape), start, stop


def _mapped(path: Path) -> Parameters:
    """A safetensors file: the length of a JSON header, the header, and the values, all little-endian."""
    if sys.byteorder != "little":
        raise ValueError(f"{path}: safetensors are only read on little-endian processors")
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    length = int(data[:8].view("<u8")[0]) if len(data) >= 8 else 0
    try:
        header = json.loads(bytes(data[8 : 8 + length])) if length <= len(data) - 8 else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        wanted = {
            name: (entry["dtype"], *_place(entry["shape"], *entry["data_offsets"]))
            for name, entry in entries.items()
            if entry["dtype"] in _FLOAT_TYPES  # not position_ids and their like
        }
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: no safetensors file, or a damaged one") from error
    weights = {}
    for name, (kind, shape, start, stop) in wanted.items():
        values = data[8 + length :][start:stop]
        if len(values) != math.prod(shape) * np.dtype(_FLOAT_TYPES[kind]).itemsize:
            raise ValueError(f"{path}: {name} is cut short; the file is damaged")
        values = np.require(values.view(_FLOAT_TYPES[kind]), requirements="A").reshape(shape)
        if kind == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        weights[name] = values.astype(np.float32, copy=False)
    return weights
