"""Random numbers that are a function of their key, for many keys at once.

    key <- mix(key xor word) for each word of (purpose, seed, epoch, ...);   draw k of a key = mix(key + (k + 1) GOLDEN)

mix is the finalizer of SplitMix64 (Steele, Lea, Flood 2014, the constants of Vigna's public-domain code): a bijection of 64-bit numbers.
numpy's own generators take microseconds to seed, once a puzzle; this takes nanoseconds and never changes with numpy. Any of the words may
be an array, then there is one stream for each of its elements.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers that leaves no pattern: elementwise, any shape."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def draws(count: int, *words: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """[n, count] random 64-bit numbers: row i belongs to the i-th element of the words that are arrays [n] (n = 1 if none is)."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = mix((key ^ np.asarray(word).astype(np.uint64)) + GOLDEN)
    return mix(key[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def permutations(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A permutation along the last axis from random numbers of its length."""
    return np.argsort(numbers, axis=-1, kind="stable")
