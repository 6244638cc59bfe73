"""Single matrix products by oneDNN, the library that Paddle's CPU package brings, through its C interface.

What Paddle itself cannot be asked for: a bfloat16 product of NumPy's own memory, with a float32 result.
On processors with AMX it takes a fifth of the time of a float32 product.

bfloat16 arrays are uint16 here: the upper half of a float32.
"""

import ctypes
import importlib.util
import logging
import threading
from functools import cache
from pathlib import Path

import numpy as np

from utils import runtime
from utils.compiled import compiled

logger = logging.getLogger(__name__)

# Constants of oneDNN's C interface, version 3 (dnnl_types.h).
_VERSION = 3
_CPU, _DEFAULT_STREAM = 1, 1
_TYPES = {np.dtype(np.uint16): 2, np.dtype(np.float32): 3}
_SOURCE, _WEIGHTS, _BIAS, _RESULT = 1, 33, 41, 17
# Products that a thread keeps prepared; a search needs a handful.
_PREPARED = 64


class _Argument(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


@cache
def bfloat16_is_fast() -> bool:
    """True if the processor multiplies bfloat16 natively and ``matmul`` works here."""
    if not (runtime.cpu_has("avx512_bf16") or runtime.cpu_has("amx_bf16")):
        return False
    try:
        _library()
    except (OSError, AttributeError, ValueError) as error:
        logger.info("oneDNN's C interface cannot be used (%s); multiplying in float32", error)
        return False
    return True


def matmul(left: np.ndarray, right: np.ndarray, result: np.ndarray, bias: np.ndarray) -> None:
    """``result`` [m, n] becomes left [m, k] times right [k, n] plus bias [n], on this thread alone.

    Args:
        left, right: uint16 (bfloat16) or float32, with any strides: a transposed view costs no copy.
        result: float32 or uint16.
        bias: float32.
    """
    arrays = (left, right, bias[None], result)
    key = tuple((array.shape, array.strides, array.dtype) for array in arrays)
    prepared = _here().get(key)
    if prepared is None:
        if len(_here()) == _PREPARED:
            _here().clear()
        prepared = _here()[key] = _Product(*key)
    prepared(*arrays)


def to_bfloat16(vectors: np.ndarray) -> np.ndarray:
    """Float32 [n, d] rounded to the nearest bfloat16, ties to even; uint16 [n, d].

    What is too small for a normal number becomes 0, as it does inside the product.
    """
    rounded = np.empty(vectors.shape, np.uint16)
    _round(vectors.view(np.uint32), rounded)
    return rounded


@compiled()
def _round(bits, rounded):
    n, d = bits.shape
    for i in range(n):
        for j in range(d):
            up = np.uint32(bits[i, j] + np.uint32(0x7FFF) + (np.uint32(bits[i, j] >> np.uint32(16)) & np.uint32(1)))
            normal = np.uint32(up & np.uint32(0x7F800000)) != np.uint32(0)
            rounded[i, j] = np.uint16(up >> np.uint32(16)) if normal else np.uint16(0)


_local = threading.local()


def _here() -> dict:
    """This thread's prepared products: one may not run in two threads at once."""
    if not hasattr(_local, "products"):
        _local.products = {}
    return _local.products


class _Product:
    """A product of arrays with these shapes, strides (in bytes) and types."""

    def __init__(self, *layouts: tuple[tuple[int, ...], tuple[int, ...], np.dtype]):
        self._library = library = _library()
        described = [_described(*layout) for layout in layouts]
        recipe, self._run = ctypes.c_void_p(), ctypes.c_void_p()
        with _one_thread():
            _checked(library.dnnl_matmul_primitive_desc_create(ctypes.byref(recipe), _engine(), *described, None))
            _checked(library.dnnl_primitive_create(ctypes.byref(self._run), recipe))
        self._stream = ctypes.c_void_p()
        _checked(library.dnnl_stream_create(ctypes.byref(self._stream), _engine(), _DEFAULT_STREAM))
        self._memories = [ctypes.c_void_p() for _ in described]
        for memory, description in zip(self._memories, described, strict=True):
            _checked(library.dnnl_memory_create(ctypes.byref(memory), description, _engine(), None))
            library.dnnl_memory_desc_destroy(description)
        library.dnnl_primitive_desc_destroy(recipe)
        indices = (_SOURCE, _WEIGHTS, _BIAS, _RESULT)
        self._arguments = (_Argument * len(indices))(
            *map(_Argument, indices, (memory.value for memory in self._memories))
        )

    def __call__(self, *arrays: np.ndarray) -> None:
        for memory, array in zip(self._memories, arrays, strict=True):
            address = ctypes.c_void_p(array.__array_interface__["data"][0])
            _checked(self._library.dnnl_memory_set_data_handle(memory, address))
        _checked(self._library.dnnl_primitive_execute(self._run, self._stream, len(arrays), self._arguments))

    def __del__(self) -> None:
        for memory in self._memories:
            self._library.dnnl_memory_destroy(memory)
        self._library.dnnl_stream_destroy(self._stream)
        self._library.dnnl_primitive_destroy(self._run)


def _described(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> ctypes.c_void_p:
    """A oneDNN memory descriptor."""
    description, numbers = ctypes.c_void_p(), ctypes.c_int64 * len(shape)
    steps = (stride // dtype.itemsize for stride in strides)
    _checked(
        _library().dnnl_memory_desc_create_with_strides(
            ctypes.byref(description), len(shape), numbers(*shape), _TYPES[dtype], numbers(*steps)
        )
    )
    return description


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN refused a matrix product with status {status}")


@cache
def _library() -> ctypes.CDLL:
    """oneDNN, from Paddle's folder, without importing Paddle.

    Raises:
        OSError, AttributeError, ValueError: it is not there, or not the version that is understood here.
    """
    package = importlib.util.find_spec("paddle")
    if package is None or not package.submodule_search_locations:
        raise OSError("Paddle is not installed")
    library = ctypes.CDLL(str(Path(package.submodule_search_locations[0]) / "libs" / f"libdnnl.so.{_VERSION}"))
    library.dnnl_version.restype = ctypes.POINTER(_Version)
    if (major := library.dnnl_version().contents.major) != _VERSION:
        raise ValueError(f"its version is {major}; expected {_VERSION}")
    for name in ("dnnl_memory_destroy", "dnnl_stream_destroy", "dnnl_primitive_destroy"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    return library


_engine_lock = threading.Lock()


def _engine() -> ctypes.c_void_p:
    """oneDNN's handle of the processor; one for all threads, since their memories and streams must agree."""
    with _engine_lock:
        return _created_engine()


@cache
def _created_engine() -> ctypes.c_void_p:
    engine = ctypes.c_void_p()
    _checked(_library().dnnl_engine_create(ctypes.byref(engine), _CPU, ctypes.c_size_t(0)))
    return engine


class _one_thread:
    """While it lasts, what is prepared on this thread is prepared to run on it alone."""

    def __enter__(self) -> None:
        self._openmp = ctypes.CDLL("libgomp.so.1")  # the one that oneDNN has loaded
        self._before = self._openmp.omp_get_max_threads()
        self._openmp.omp_set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        self._openmp.omp_set_num_threads(self._before)
