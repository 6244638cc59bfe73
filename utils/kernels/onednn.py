"""Single matrix products by oneDNN, the library that Paddle's CPU package brings, through its C interface.

What Paddle itself cannot be asked for: products of NumPy's own memory, on one thread of ours beside others,
in bfloat16 with a float32 result. On processors with AMX these take a fifth of the time of a float32 product.

bfloat16 arrays are uint16 here: the upper half of a float32.
"""

import contextlib
import ctypes
import importlib.util
import logging
import math
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..process import runtime
from .compiled import compiled

logger = logging.getLogger(__name__)

# Constants of oneDNN's C interface, version 3 (dnnl_types.h, dnnl_common_types.h).
_VERSION = 3
_CPU, _DEFAULT_STREAM, _ANY_ORDER = 1, 1, 1
_TYPES = {np.dtype(np.uint16): 2, np.dtype(np.float32): 3}
_SOURCE, _WEIGHTS, _RESULT, _BIAS = 1, 33, 17, 41
_QUERY_WEIGHTS = 131
ACTIVATIONS = {"none": None, "relu": 0x20, "gelu": 0x31, "gelu_new": 0x2B, "gelu_pytorch_tanh": 0x2B}

# Products that a thread keeps prepared: a search needs a handful, an encoder a few for each length of text.
_PREPARED = 512
# A line of the cache, and of a matrix tile. Where rows begin within one, each access takes two.
_ALIGNMENT = 64
# Rows that a matrix is packed to be multiplied with; its order was seen to be the same for any number.
_PACKED_FOR = 256


@cache
def is_usable() -> bool:
    """True if ``matmul`` works here; said once in the log if it does not."""
    try:
        _library()
    except (OSError, AttributeError, ValueError) as error:
        logger.info("oneDNN's C interface cannot be used: %s", error)
        return False
    return True


def bfloat16_is_fast() -> bool:
    """True if the processor multiplies bfloat16 natively, and ``matmul`` works here."""
    return (runtime.cpu_has("avx512_bf16") or runtime.cpu_has("amx_bf16")) and is_usable()


def matmul(
    left: np.ndarray,
    right: "np.ndarray | Packed",
    result: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "none",
) -> None:
    """``result`` becomes the activation of left times right plus bias, on this thread alone.

    Args:
        left, right: [m, k] and [k, n], or [b, m, k] and [b, k, n], uint16 (bfloat16) or float32; C-contiguous,
            or the last two axes swapped of such an array. A matrix that many are multiplied by is better packed.
        result: [m, n] or [b, m, n], float32 or uint16; C-contiguous.
        bias: float32 [n].
        activation: one of ``ACTIVATIONS``.
    """
    arrays = {_SOURCE: left, _WEIGHTS: right, _RESULT: result}
    if bias is not None:
        arrays[_BIAS] = bias.reshape((1,) * (left.ndim - 1) + bias.shape)
    key = (activation, *(_Layout.of(array) for array in arrays.values()))
    prepared = _here().get(key)
    if prepared is None:
        if len(_here()) == _PREPARED:
            _here().clear()
        prepared = _here()[key] = _product(activation, dict(zip(arrays, key[1:], strict=True)))
    prepared(arrays.values())


def empty(shape: int | tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """As NumPy's, but beginning with a line of the cache: products of such arrays take up to a third less time."""
    shape = (shape,) if isinstance(shape, int) else shape
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -_address(room) % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def to_bfloat16(values: np.ndarray, rounded: np.ndarray | None = None) -> np.ndarray:
    """Float32 of any shape rounded to the nearest bfloat16, ties to even; uint16, as from ``empty``.

    What is too small for a normal number becomes 0, as it does inside the product.

    Args:
        rounded: where to, C-contiguous; a new array by default.
    """
    values = np.ascontiguousarray(values)
    rounded = empty(values.shape, np.uint16) if rounded is None else rounded
    _round(values.reshape(-1).view(np.uint32), rounded.reshape(-1))
    return rounded


@compiled()
def _round(bits, rounded):
    for j in range(len(bits)):
        exponent = np.uint32(bits[j] & np.uint32(0x7F800000))
        up = np.uint32(bits[j] + np.uint32(0x7FFF) + (np.uint32(bits[j] >> np.uint32(16)) & np.uint32(1)))
        if exponent == np.uint32(0x7F800000):  # infinity, or NaN, which rounding up could turn into 0
            up = np.uint32(bits[j] | (np.uint32(0x400000) if bits[j] & np.uint32(0x7FFFFF) else np.uint32(0)))
        normal = np.uint32(up & np.uint32(0x7F800000)) != np.uint32(0)
        rounded[j] = np.uint16(up >> np.uint32(16)) if normal else np.uint16(0)


class Packed:
    """A matrix in the order that the processor multiplies by, which saves bringing it there for each product.

    Args:
        values: uint16 (bfloat16) or float32 [k, n].
    """

    def __init__(self, values: np.ndarray):
        plain = _Layout.of(values)
        self.layout = plain._replace(strides=None)
        size = _library().dnnl_memory_desc_get_size(self.layout.described())
        self.values = empty(size, np.uint8)
        _reordering(plain, self.layout)((values, self.values))


class _Layout(NamedTuple):
    """How an array lies in memory: strides in bytes, or None for a packed matrix."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype

    @classmethod
    def of(cls, array: np.ndarray | Packed) -> "_Layout":
        return array.layout if isinstance(array, Packed) else cls(array.shape, array.strides, array.dtype)

    def _dense_steps(self) -> tuple[int, ...]:
        """The strides in values of an array without gaps, its last two axes swapped or not.

        With gaps between the rows, oneDNN 3.6 was seen to take one array for another, for some shapes.
        """
        m, n = self.shape[-2:]
        swapped = self.strides[-1] > self.strides[-2] and m > 1 and n > 1
        steps = ((m * n, 1, m) if swapped else (m * n, n, 1))[3 - len(self.shape) :]
        given = (stride // self.dtype.itemsize for stride in self.strides)
        dense = all(n == 1 or own == step for n, own, step in zip(self.shape, given, steps, strict=True))
        assert dense, f"an array with gaps: {self}"
        return steps

    def described(self) -> ctypes.c_void_p:
        """oneDNN's memory descriptor; a new one, but for a packed matrix."""
        if self.strides is None:
            return _packed_order(self.shape, self.dtype)
        description, numbers = ctypes.c_void_p(), ctypes.c_int64 * len(self.shape)
        steps = self._dense_steps()
        _checked(
            _library().dnnl_memory_desc_create_with_strides(
                ctypes.byref(description), len(self.shape), numbers(*self.shape), _TYPES[self.dtype], numbers(*steps)
            )
        )
        return description


class _Argument(ctypes.Structure):
    _fields_ = (("role", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Prepared:
    """What oneDNN has made ready to run on arrays of known layouts.

    Args:
        recipe: a primitive descriptor; it is let go of.
        layouts: by role.
    """

    def __init__(self, recipe: ctypes.c_void_p, layouts: dict[int, _Layout]):
        self._library = library = _library()
        self._run, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        _checked(library.dnnl_primitive_create(ctypes.byref(self._run), recipe))
        library.dnnl_primitive_desc_destroy(recipe)
        _checked(library.dnnl_stream_create(ctypes.byref(self._stream), _engine(), _DEFAULT_STREAM))
        self._memories = []
        for layout in layouts.values():
            with _description(layout) as description:
                memory = ctypes.c_void_p()
                _checked(library.dnnl_memory_create(ctypes.byref(memory), description, _engine(), None))
            self._memories.append(memory)
        arguments = (_Argument(role, memory.value) for role, memory in zip(layouts, self._memories, strict=True))
        self._arguments = (_Argument * len(layouts))(*arguments)

    def __call__(self, arrays: "Iterator[np.ndarray | Packed]") -> None:
        for memory, array in zip(self._memories, arrays, strict=True):
            address = _address(array.values if isinstance(array, Packed) else array)
            _checked(self._library.dnnl_memory_set_data_handle(memory, ctypes.c_void_p(address)))
        run = self._library.dnnl_primitive_execute
        _checked(run(self._run, self._stream, len(self._arguments), self._arguments))

    def __del__(self) -> None:
        for memory in self._memories:
            self._library.dnnl_memory_destroy(memory)
        self._library.dnnl_stream_destroy(self._stream)
        self._library.dnnl_primitive_destroy(self._run)


_local = threading.local()


def _here() -> dict:
    """This thread's prepared products: one may not run in two threads at once."""
    if not hasattr(_local, "products"):
        _local.products = {}
    return _local.products


def _product(activation: str, layouts: dict[int, _Layout]) -> _Prepared:
    recipe = ctypes.c_void_p()
    with contextlib.ExitStack() as stack:
        attributes = stack.enter_context(_attributes(activation))
        described = {role: stack.enter_context(_description(layout)) for role, layout in layouts.items()}
        stack.enter_context(_one_thread())
        left, right, result = (described[role] for role in (_SOURCE, _WEIGHTS, _RESULT))
        _checked(
            _library().dnnl_matmul_primitive_desc_create(
                ctypes.byref(recipe), _engine(), left, right, described.get(_BIAS), result, attributes
            )
        )
        return _Prepared(recipe, layouts)


def _reordering(source: _Layout, target: _Layout) -> _Prepared:
    recipe = ctypes.c_void_p()
    with _description(source) as left, _description(target) as right, _one_thread():
        _checked(
            _library().dnnl_reorder_primitive_desc_create(ctypes.byref(recipe), left, _engine(), right, _engine(), None)
        )
        return _Prepared(recipe, {_SOURCE: source, _RESULT: target})


_lock = threading.Lock()
_orders: dict[tuple[tuple[int, ...], np.dtype], ctypes.c_void_p] = {}


def _packed_order(shape: tuple[int, ...], dtype: np.dtype) -> ctypes.c_void_p:
    """The memory descriptor that oneDNN would like a matrix to have that others are multiplied by; kept for good."""
    with _lock:
        if (shape, dtype) in _orders:
            return _orders[shape, dtype]
    library, recipe, free = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    k, n = shape
    _checked(
        library.dnnl_memory_desc_create_with_tag(
            ctypes.byref(free), 2, (ctypes.c_int64 * 2)(k, n), _TYPES[dtype], _ANY_ORDER
        )
    )
    rows, sums = _Layout.of(np.empty((_PACKED_FOR, k), dtype)), _Layout.of(np.empty((_PACKED_FOR, n), dtype))
    with _description(rows) as left, _description(sums) as result, _one_thread():
        _checked(
            library.dnnl_matmul_primitive_desc_create(ctypes.byref(recipe), _engine(), left, free, None, result, None)
        )
    with _lock:
        # The recipe owns the descriptor, and is kept by not being let go of.
        order = ctypes.c_void_p(library.dnnl_primitive_desc_query_md(recipe, _QUERY_WEIGHTS, 0))
        return _orders.setdefault((shape, dtype), order)


@contextlib.contextmanager
def _description(layout: _Layout) -> Iterator[ctypes.c_void_p]:
    """A layout's memory descriptor, while it lasts."""
    description = layout.described()
    yield description
    if layout.strides is not None:
        _library().dnnl_memory_desc_destroy(description)


@contextlib.contextmanager
def _attributes(activation: str) -> Iterator[ctypes.c_void_p]:
    """oneDNN's description of what is done to each value of a product."""
    library, attributes, steps = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    _checked(library.dnnl_primitive_attr_create(ctypes.byref(attributes)))
    _checked(library.dnnl_post_ops_create(ctypes.byref(steps)))
    if (kind := ACTIVATIONS[activation]) is not None:
        _checked(library.dnnl_post_ops_append_eltwise(steps, kind, ctypes.c_float(0), ctypes.c_float(0)))
    _checked(library.dnnl_primitive_attr_set_post_ops(attributes, steps))
    yield attributes
    library.dnnl_post_ops_destroy(steps)
    library.dnnl_primitive_attr_destroy(attributes)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """While it lasts, what is prepared on this thread is prepared to run on it alone."""
    openmp = ctypes.CDLL("libgomp.so.1")  # the one that oneDNN has loaded
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(before)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN refused a matrix product with status {status}")


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


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
    for name in ("memory", "stream", "primitive", "primitive_desc", "memory_desc", "post_ops", "primitive_attr"):
        getattr(library, f"dnnl_{name}_destroy").argtypes = (ctypes.c_void_p,)
    library.dnnl_primitive_desc_query_md.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    library.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
    library.dnnl_memory_desc_get_size.argtypes = (ctypes.c_void_p,)
    library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    return library


_engines: list[ctypes.c_void_p] = []


def _engine() -> ctypes.c_void_p:
    """oneDNN's handle of the processor; one for all threads, since their memories and streams must agree."""
    with _lock:
        if not _engines:
            engine = ctypes.c_void_p()
            _checked(_library().dnnl_engine_create(ctypes.byref(engine), _CPU, ctypes.c_size_t(0)))
            _engines.append(engine)
        return _engines[0]
