"""AMX, the matrix instructions of some x86-64 processors, for loops that numba compiles.

The processor has eight tiles, numbered from 0, each of 16 rows of 64 bytes. One instruction multiplies two of
them: bfloat16 [16, 32] by bfloat16 [32, 16], added to float32 [16, 16]. The right-hand one lies in memory as
16 rows of pairs: row p holds, column by column, the values of its rows 2 p and 2 p + 1. (Intel, Architecture
Instruction Set Extensions Programming Reference, chapter 3.)

Tiles belong to a thread. A compiled function calls ``configure`` before it uses them and ``release`` when it is
done. Tile numbers are constants; addresses and strides are in bytes. Compile nothing that calls these where
``is_usable()`` is False: the compiler would end the process.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...process import runtime
from ..compiled import inlined, may_use

logger = logging.getLogger(__name__)

# With what compiled loops use beside the tiles (``vectors``), of which a virtual machine may hide some: Linux's names.
_NEEDED = ("amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_NEEDED_BY_LLVM = ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")

# Linux wants a process to ask for the registers of tiles once (arch/x86/include/uapi/asm/prctl.h).
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA = 158, 0x1023, 18
# What `configure` loads: palette 1, and for each of the eight tiles the bytes of a row and the number of rows.
WHOLE_TILES = np.zeros(64, np.uint8)
WHOLE_TILES[0] = 1
WHOLE_TILES[16:32].view(np.uint16)[:] = 64
WHOLE_TILES[48:56] = 16

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_ADDRESS = _BYTE.as_pointer()


def is_usable() -> bool:
    """True if the processor has these instructions and AVX-512, and numba and Linux let this process use them."""
    return runtime.cpu_has(*_NEEDED) and _is_allowed()


@cache
def _is_allowed() -> bool:
    if not may_use(*_NEEDED_BY_LLVM):
        logger.info("the processor has AMX, but numba is told (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES) that it has not")
        return False
    if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA) == 0:
        return True
    logger.info("the processor has AMX, but Linux does not let this process use it")
    return False


def _instruction(name: str, n_tiles: int = 0, n_addresses: int = 0, n_strides: int = 0) -> Callable:
    """What generates a call of LLVM's intrinsic, whose arguments are tile numbers, then addresses, then strides."""
    kinds = [_BYTE] * n_tiles + [_ADDRESS] * n_addresses + [_LONG] * n_strides

    def generate(context, builder, signature, arguments):
        tiles = [ir.Constant(_BYTE, number.literal_value) for number in signature.args[:n_tiles]]
        addresses = [builder.inttoptr(a, _ADDRESS) for a in arguments[n_tiles : n_tiles + n_addresses]]
        kind = ir.FunctionType(ir.VoidType(), kinds)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
        builder.call(function, [*tiles, *addresses, *arguments[n_tiles + n_addresses :]])
        return context.get_dummy_value()

    return generate


@intrinsic
def configure(typing, address):
    """Make all tiles whole; ``address`` is that of ``WHOLE_TILES``."""
    return types.void(types.intp), _instruction("ldtilecfg", n_addresses=1)


@intrinsic
def release(typing):
    """Forget all tiles."""
    return types.void(), _instruction("tilerelease")


@intrinsic(prefer_literal=True)
def zero(typing, tile):
    """Set a tile to 0."""
    return types.void(tile), _instruction("tilezero", 1)


@intrinsic(prefer_literal=True)
def load(typing, tile, address, stride):
    """A tile from 16 rows of 64 bytes, ``stride`` bytes apart."""
    return types.void(tile, types.intp, types.intp), _instruction("tileloadd64", 1, 1, 1)


@intrinsic(prefer_literal=True)
def store(typing, tile, address, stride):
    """The reverse."""
    return types.void(tile, types.intp, types.intp), _instruction("tilestored64", 1, 1, 1)


@intrinsic(prefer_literal=True)
def multiply(typing, sums, left, right):
    """Add the product of two tiles of bfloat16 to a tile of float32."""
    return types.void(sums, left, right), _instruction("tdpbf16ps", 3)


# A block is the four tiles 0 to 3, side by side and below each other: 32 by 32 sums, float32. The others serve it.
_inlined = inlined()


@_inlined
def clear_block():
    """Set it to 0."""
    zero(0)
    zero(1)
    zero(2)
    zero(3)


@_inlined
def add_product(left, from_row, right, from_tile):
    """Add a product of bfloat16 [32, 32] by [32, 32] to it.

    Args:
        left: an address, rows ``from_row`` bytes apart.
        right: that of a right-hand tile, whose neighbour for the next 16 columns is ``from_tile`` bytes on.
    """
    load(4, left, from_row)
    load(5, left + 16 * from_row, from_row)
    load(6, right, 64)
    load(7, right + from_tile, 64)
    multiply(0, 4, 6)
    multiply(1, 4, 7)
    multiply(2, 5, 6)
    multiply(3, 5, 7)


@_inlined
def load_block(address, stride):
    """Set it to float32 [32, 32], rows ``stride`` bytes apart."""
    load(0, address, stride)
    load(1, address + 64, stride)
    load(2, address + 16 * stride, stride)
    load(3, address + 16 * stride + 64, stride)


@_inlined
def store_block(address, stride):
    """The reverse."""
    store(0, address, stride)
    store(1, address + 64, stride)
    store(2, address + 16 * stride, stride)
    store(3, address + 16 * stride + 64, stride)
