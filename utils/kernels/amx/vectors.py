"""AVX-512, the vector instructions of some x86-64 processors, for loops that the compiler makes too little of.

Most functions go over a row in memory, which is given by its address; sixteen float32 fill a register. Compile
nothing that calls these where ``amx.is_usable()`` is False: processors with AMX have all that is used here.
(Intel, Software Developer's Manual, volume 2.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _INT, _SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_WIDTH = 16
_REGISTER = ir.VectorType(_FLOAT, _WIDTH)
# Registers that are gone through at a time: two of float32 make one of bfloat16.
_AT_ONCE = 2
# 2**r for r from 0 to 1, of which the largest relative error is the least: 8e-5.
_POWER_OF_2 = (0.999925245, 0.695832847, 0.226069391, 0.078023007)
_LOWEST_POWER = -100.0
# Half of the error function of x / sqrt(2), over x, in powers of x**2: of odd functions that reach 0.5 at the end, and
# stay there, the one whose product with x is nowhere farther than 6e-5 from the GELU's.
_HALF_ERF_END = 4.25
_HALF_ERF = (
    0.398655865, -0.0659153701, 0.0095634952, -1.03674998e-3, 8.2063983e-5, -4.57545775e-6, 1.68946515e-7,
    -3.68632169e-9, 3.58356501e-11,
)  # fmt: skip
_FLOOR, _ROUND_AS_SET = 9, 4  # what VREDUCEPS takes off; and no other rounding than the process's


class _Bfloat16(ir.Type):
    """LLVM's type of that name, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16)

    def __hash__(self) -> int:
        return hash(_Bfloat16)


def _full_of(builder: ir.IRBuilder, value: float | ir.Value) -> ir.Value:
    """A register with the same number in each place."""
    if not isinstance(value, ir.Value):
        return ir.Constant(_REGISTER, [value] * _WIDTH)
    places = ir.VectorType(_INT, _WIDTH)
    first = builder.insert_element(ir.Constant(_REGISTER, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(places, [0] * _WIDTH))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@contextmanager
def _in_steps(builder: ir.IRBuilder, n: ir.Value) -> Iterator[Callable[[ir.Value, int, int], ir.Value]]:
    """A loop over rows of ``n`` numbers, a multiple of 32, by 32; gives what makes the address of some of them.

    Called with a row's address, the bytes of a number, and how many of the 32 to pass.
    """
    step = n.type(_AT_ONCE * _WIDTH)
    with cgutils.for_range_slice(builder, n.type(0), n, step, n.type) as (place, _):

        def address_of(row: ir.Value, size: int, passed: int = 0) -> ir.Value:
            return builder.add(row, builder.mul(builder.add(place, place.type(passed)), place.type(size)))

        yield address_of


def _loaded(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type = _REGISTER) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


def _larger(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    """The larger of each pair; ``other`` where one of them is not a number. It is one instruction."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _halves_joined(builder: ir.IRBuilder, register: ir.Value, join) -> ir.Value:
    """All of a register's numbers joined to one, float."""
    width = _WIDTH
    while width > 1:
        width //= 2
        places = ir.VectorType(_INT, width)
        low, high = (
            builder.shuffle_vector(register, register, ir.Constant(places, list(range(start, start + width))))
            for start in (0, width)
        )
        register = join(builder, low, high)
    return builder.extract_element(register, _INT(0))


def _added(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return builder.fadd(one, other)


@intrinsic
def largest(typing, row, n):
    """The largest of ``n`` float32, a positive multiple of 32; what is not a number does not count."""

    def generate(context, builder, signature, arguments):
        row, n = arguments
        found = [cgutils.alloca_once_value(builder, _full_of(builder, -3e38)) for _ in range(_AT_ONCE)]
        with _in_steps(builder, n) as address_of:
            for number, best in enumerate(found):
                value = _loaded(builder, address_of(row, 4, number * _WIDTH))
                builder.store(_larger(builder, value, builder.load(best)), best)
        best = _larger(builder, *(builder.load(best) for best in found))
        return _halves_joined(builder, best, _larger)

    return types.float32(types.intp, types.intp), generate


@intrinsic
def powers_of_2(typing, row, n, less, rounded):
    """2**(x - less) of ``n`` float32, a multiple of 32, rounded to bfloat16 at ``rounded``; returns their sum.

    Before rounding they are good to 8e-5 of their value, and never below 2**-100.
    """

    def generate(context, builder, signature, arguments):
        row, n, less, rounded = arguments
        less = _full_of(builder, less)
        sums = [cgutils.alloca_once_value(builder, _full_of(builder, 0.0)) for _ in range(_AT_ONCE)]
        with _in_steps(builder, n) as address_of:
            powers = []
            for number, total in enumerate(sums):
                value = _loaded(builder, address_of(row, 4, number * _WIDTH))
                powers.append(_power_of_2(builder, builder.fsub(value, less)))
                builder.store(builder.fadd(builder.load(total), powers[-1]), total)
            _store(builder, _bfloat16_of(builder, *powers), address_of(rounded, 2))
        total = builder.fadd(*(builder.load(total) for total in sums))
        return _halves_joined(builder, total, _added)

    return types.float32(types.intp, types.intp, types.float32, types.intp), generate


@intrinsic
def powers_of_2_added(typing, row, other, rounded, totals):
    """2**x of 32 float32 plus as many others, rounded to bfloat16 at ``rounded``, and added up to 16 at ``totals``."""

    def generate(context, builder, signature, arguments):
        row, other, rounded, totals = arguments
        total, powers = _loaded(builder, totals), []
        for offset in (0, 4 * _WIDTH):
            pair = (_loaded(builder, builder.add(own, own.type(offset))) for own in (row, other))
            powers.append(_power_of_2(builder, builder.fadd(*pair)))
        _store(builder, builder.fadd(total, builder.fadd(*powers)), totals)
        _store(builder, _bfloat16_of(builder, *powers), rounded)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@intrinsic
def total(typing, row):
    """What 16 float32 add up to."""

    def generate(context, builder, signature, arguments):
        return _halves_joined(builder, _loaded(builder, arguments[0]), _added)

    return types.float32(types.intp), generate


@intrinsic
def scaled(typing, row, n, factor, rounded):
    """``n`` float32, a multiple of 32, times ``factor``, rounded to bfloat16 at ``rounded``."""

    def generate(context, builder, signature, arguments):
        row, n, factor, rounded = arguments
        factor = _full_of(builder, factor)
        with _in_steps(builder, n) as address_of:
            values = [_loaded(builder, address_of(row, 4, number * _WIDTH)) for number in range(_AT_ONCE)]
            products = (builder.fmul(value, factor) for value in values)
            _store(builder, _bfloat16_of(builder, *products), address_of(rounded, 2))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp), generate


@intrinsic
def paired(typing, row, other, n, pairs, step):
    """Two rows of ``n`` 16-bit numbers, a multiple of 32, in turn: 16 pairs at ``pairs``, then ``step`` bytes on."""

    def generate(context, builder, signature, arguments):
        row, other, n, pairs, step = arguments
        halves, whole = ir.VectorType(_SHORT, _WIDTH), ir.VectorType(_INT, _WIDTH)
        to = cgutils.alloca_once_value(builder, pairs)
        with _in_steps(builder, n) as address_of:
            for number in range(_AT_ONCE):
                low, high = (
                    builder.zext(_loaded(builder, address_of(own, 2, number * _WIDTH), halves), whole)
                    for own in (row, other)
                )
                shifted = builder.shl(high, ir.Constant(whole, [16] * _WIDTH))
                _store(builder, builder.or_(low, shifted), builder.load(to))
                builder.store(builder.add(builder.load(to), step), to)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), generate


@intrinsic
def transposed(typing, row, step, to):
    """16 rows of 16 32-bit numbers, ``step`` bytes apart, as columns: 16 rows at ``to``, one after another.

    Four times, each row of the upper half is interleaved with one of the lower half.
    """

    def generate(context, builder, signature, arguments):
        row, step, to = arguments
        kind = ir.VectorType(_INT, _WIDTH)
        places = [i // 2 + _WIDTH * (i % 2) for i in range(2 * _WIDTH)]
        halves = [
            ir.Constant(kind, places[:_WIDTH]),
            ir.Constant(kind, [place + _WIDTH // 2 for place in places[:_WIDTH]]),
        ]
        rows = [_loaded(builder, builder.add(row, builder.mul(step, step.type(i))), kind) for i in range(_WIDTH)]
        for _ in range(4):
            pairs = zip(rows[: _WIDTH // 2], rows[_WIDTH // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
        for i, column in enumerate(rows):
            _store(builder, column, builder.add(to, to.type(4 * _WIDTH * i)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _epilogue(what: Callable[[ir.IRBuilder, ir.Value], ir.Value], rounds: bool) -> Callable:
    """What generates ``what`` of 32 float32 plus as many others."""

    def generate(context, builder, signature, arguments):
        row, other, to = arguments
        registers = []
        for offset in (0, 4 * _WIDTH):
            pair = (_loaded(builder, builder.add(own, own.type(offset))) for own in (row, other))
            registers.append(what(builder, builder.fadd(*pair)))
        if rounds:
            _store(builder, _bfloat16_of(builder, *registers), to)
        else:
            for number, register in enumerate(registers):
                _store(builder, register, builder.add(to, to.type(4 * _WIDTH * number)))
        return context.get_dummy_value()

    return generate


_EPILOGUE = types.void(types.intp, types.intp, types.intp)


@intrinsic
def add(typing, row, other, to):
    """32 float32 of each of two rows, added up at ``to``."""
    return _EPILOGUE, _epilogue(lambda builder, x: x, rounds=False)


@intrinsic
def add_rounded(typing, row, other, to):
    """The same, rounded to bfloat16."""
    return _EPILOGUE, _epilogue(lambda builder, x: x, rounds=True)


@intrinsic
def add_gelu_rounded(typing, row, other, to):
    """The same of their GELU, which is good to 6e-5 before rounding."""
    return _EPILOGUE, _epilogue(_gelu, rounds=True)


@intrinsic
def reaching(typing, row, more, cuts):
    """Which of 32 float32, plus ``more``, are at least their cuts: a bit for each, the lowest one for the first."""

    def generate(context, builder, signature, arguments):
        row, more, cuts = arguments
        more, bits = _full_of(builder, more), []
        for offset in (0, 4 * _WIDTH):
            values, cut = (_loaded(builder, builder.add(own, own.type(offset))) for own in (row, cuts))
            reach = builder.fcmp_ordered(">=", builder.fadd(values, more), cut)
            bits.append(builder.zext(builder.bitcast(reach, _SHORT), _INT))
        return builder.or_(bits[0], builder.shl(bits[1], _INT(_WIDTH)))

    return types.uint32(types.intp, types.float32, types.intp), generate


@intrinsic
def lowest_bit(typing, bits):
    """The place of the lowest bit that is set, if any is."""

    def generate(context, builder, signature, arguments):
        return builder.zext(builder.cttz(arguments[0], ir.IntType(1)(1)), ir.IntType(64))

    return types.intp(types.uint32), generate


def _gelu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x times the normal distribution's share below x."""
    near = _larger(builder, _full_of(builder, -_HALF_ERF_END), x)  # what is no number stays
    near = builder.fneg(_larger(builder, _full_of(builder, -_HALF_ERF_END), builder.fneg(near)))
    share = _fma(builder, near, _series(builder, _HALF_ERF, builder.fmul(near, near)), _full_of(builder, 0.5))
    return builder.fmul(x, share)


def _series(builder: ir.IRBuilder, coefficients: tuple[float, ...], x: ir.Value) -> ir.Value:
    """A polynomial, the constant coefficient first."""
    total = _full_of(builder, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = _fma(builder, total, x, _full_of(builder, coefficient))
    return total


def _fma(builder: ir.IRBuilder, one: ir.Value, other: ir.Value, more: ir.Value) -> ir.Value:
    return _call(builder, "llvm.fma.v16f32", _REGISTER, one, other, more)


def _power_of_2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x, which is 2**floor(x), put into the exponent, times that of what is left."""
    x = _larger(builder, _full_of(builder, _LOWEST_POWER), x)  # what is no number stays
    none, all_places = _full_of(builder, 0.0), _SHORT(0xFFFF)
    rest = _call(
        builder, "llvm.x86.avx512.mask.reduce.ps.512", _REGISTER, x, _INT(_FLOOR), none, all_places, _INT(_ROUND_AS_SET)
    )
    series = _series(builder, _POWER_OF_2, rest)
    return _call(
        builder, "llvm.x86.avx512.mask.scalef.ps.512", _REGISTER, series, x, none, all_places, _INT(_ROUND_AS_SET)
    )


def _bfloat16_of(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two registers of float32 rounded into one."""
    return _call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(_Bfloat16(), 32), high, low)
