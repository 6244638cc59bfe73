"""Weights in Paddle's own format, read without importing Paddle (seconds) and without running what a pickle says."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

# Of a large array, kept in parts so that old pickles could hold it: where it says so.
_IN_PARTS = "UnpackBigParamInfor@@"


def read(path: Path) -> dict[str, np.ndarray]:
    """The floating-point weights of a file of ``paddle.save``, as float32.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds more than arrays, numbers and text.
    """
    return floats(read_state(path))


def read_state(path: Path) -> dict:
    """All that a file of ``paddle.save`` holds: a model's, an optimizer's or a schedule's state, tensors as arrays.

    The same as ``paddle.load(path, return_numpy=True)``, which runs what the file asks for.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds more than arrays, numbers and text.
    """
    try:
        with open(path, "rb") as stream:
            state = _Reader(stream, encoding="latin1").load()
        for name, parts in state.pop(_IN_PARTS, {}).items():
            state[name] = np.concatenate([state.pop(part) for part in parts["slices"]]).reshape(parts["OriginShape"])
    except OSError:
        raise
    except UnknownError as error:
        raise ValueError(f"{path}: holds {error}, which is not read here; expected arrays and numbers alone") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle ends in whatever its bytes happen to ask for
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no weights of Paddle's, or a damaged file ({reason})") from None
    return _without_names(state)


def _without_names(kept):
    """Paddle 2.1 and later keep a tensor as (its variable's name, its values)."""
    if isinstance(kept, tuple) and len(kept) == 2 and isinstance(kept[1], np.ndarray):
        return kept[1]
    return {name: _without_names(value) for name, value in kept.items()} if isinstance(kept, dict) else kept


def are_equal(path: Path, other: Path) -> bool:
    """Whether two files hold the same weights; their bytes differ by the numbers that Paddle gives to parameters.

    False if the other cannot be read.
    """
    try:
        others = read(other)
    except (OSError, ValueError):
        return False
    own = read(path)
    return own.keys() == others.keys() and all(np.array_equal(own[name], others[name]) for name in own)


def floats(state: dict) -> dict[str, np.ndarray]:
    """The floating-point arrays of a file that Paddle or PaddleNLP has read, as float32."""
    weights = {name: values for name, values in state.items() if isinstance(values, np.ndarray)}
    for name, values in weights.items():
        if values.dtype == np.uint16:  # how Paddle keeps bfloat16 in NumPy
            weights[name] = (values.astype(np.uint32) << 16).view(np.float32)
    return {name: values.astype(np.float32, copy=False) for name, values in weights.items() if values.dtype.kind == "f"}


class UnknownError(pickle.UnpicklingError):
    """Says what a file holds that is not allowed."""


class _Reader(pickle.Unpickler):
    """Arrays and numbers in dictionaries and tuples, and nothing else."""

    def find_class(self, module: str, name: str):
        return allowed(module, name)


def allowed(module: str, name: str):
    """The function or class of this name, if unpickling may call it.

    Raises:
        UnknownError: it may not.
    """
    if (module, name) in _HARMLESS:
        return _HARMLESS[module, name]
    raise UnknownError(" ".join(f"{module}.{name}".split())[:200])


def _value(name: str, values: dict):
    """What Paddle writes as ``eval("data", {"data": values})``."""
    return values[name]


def _bytes(text: str, encoding: str) -> bytes:
    """How Python 2's protocol keeps bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


# How NumPy keeps an array, one in protocol 5, and a number; its second version has another name for the place.
_OF_NUMPY = {
    ("multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numeric", "_frombuffer"): np.zeros(0).__reduce_ex__(5)[0],
    ("multiarray", "scalar"): np.float32(0).__reduce__()[0],
}
_HARMLESS = {
    (f"{core}.{module}", name): function
    for core in ("numpy.core", "numpy._core")
    for (module, name), function in _OF_NUMPY.items()
} | {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,
    ("builtins", "bytes"): bytes,
    ("__builtin__", "bytes"): bytes,
    ("builtins", "eval"): _value,
    ("__builtin__", "eval"): _value,
    ("_codecs", "encode"): _bytes,
}
