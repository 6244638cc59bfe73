"""Thousands of seeded random generators, each the one that NumPy makes of the same words, at a tenth of the cost.

``numpy.random.default_rng(words)`` takes some 20 microseconds, most of them to stir the words. NumPy promises that
``SeedSequence`` will always stir them in the same way (O'Neill's seed_seq_fe, 2015), so that is done here for all at
once.
"""

from collections.abc import Iterator

import numpy as np
from numpy.random import PCG64, Generator
from numpy.random.bit_generator import ISeedSequence

# The words of a seed, and those of PCG64's state.
_POOL, _STATE = 4, 8
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_SHIFT = np.uint32(16)


def generators(words: np.ndarray) -> Iterator[Generator]:
    """``default_rng(row)`` for each row of ``words``, uint32 [n, 4]."""
    seed = _Stirred()
    for seed.state in _stirred(words):
        yield Generator(PCG64(seed))


class _Stirred(ISeedSequence):
    """A seed whose state is known."""

    state: np.ndarray

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        assert (n_words, np.dtype(dtype)) == (_STATE // 2, np.uint64)  # what PCG64 asks for
        return self.state


def _stirred(words: np.ndarray) -> np.ndarray:
    """``SeedSequence(row).generate_state(4, uint64)`` for each row, uint64 [n, 4]."""
    assert words.dtype == np.uint32 and words.shape[1] == _POOL
    hashed = _Hash(_INIT_A, _MULT_A)
    pool = [hashed(column) for column in words.T]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                mixed = _MIX_LEFT * pool[target] - _MIX_RIGHT * hashed(pool[source])
                pool[target] = mixed ^ (mixed >> _SHIFT)
    hashed = _Hash(_INIT_B, _MULT_B)
    state = np.stack([hashed(pool[i % _POOL]) for i in range(_STATE)], axis=1)
    low, high = state[:, ::2].astype(np.uint64), state[:, 1::2].astype(np.uint64)
    return low | high << np.uint64(32)


class _Hash:
    """A hash of words whose constant changes with every call."""

    def __init__(self, constant: int, factor: int):
        self._constant, self._factor = constant, factor

    def __call__(self, words: np.ndarray) -> np.ndarray:
        words = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor % 2**32
        words = words * np.uint32(self._constant)
        return words ^ (words >> _SHIFT)
