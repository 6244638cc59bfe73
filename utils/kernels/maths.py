"""Mathematics that compiled loops share, of single float32 values."""

import numpy as np

from .compiled import MATHS, inlined

_F = np.float32
_inlined = inlined(MATHS)


@_inlined
def exp(x):
    """exp(x) to 1e-7 of its value, never below exp(-87): a power of two times a polynomial (Cephes, Moshier)."""
    x = _F(-87.0) if x < _F(-87.0) else x
    power = np.floor(x * _F(1.44269504) + _F(0.5))
    rest = (x - power * _F(0.693359375)) + power * _F(2.12194440e-4)
    series = _F(1.9875691500e-4)
    series = series * rest + _F(1.3981999507e-3)
    series = series * rest + _F(8.3334519073e-3)
    series = series * rest + _F(4.1665795894e-2)
    series = series * rest + _F(1.6666665459e-1)
    series = series * rest + _F(5.0000001201e-1)
    series = series * rest * rest + rest + _F(1.0)
    # A float32 whose exponent is the power.
    bits = np.int32((np.int32(power) + np.int32(127)) << np.int32(23))
    return series * bits.view(np.float32)


@_inlined
def ordered(bits):
    """The bits of a float32 as an integer that compares as it does, and back; compilers vectorise only its maximum."""
    return np.int32(bits ^ (np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_inlined
def highest(row, length):
    """The largest of the first ``length`` values."""
    highest = np.int32(-(2**31))
    for j in range(length):
        highest = max(highest, ordered(_F(row[j]).view(np.int32)))
    return np.int32(ordered(highest)).view(np.float32)
