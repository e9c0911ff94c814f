"""Keyed permutation: a shuffle of range(size) that is never stored.

Shuffling 10^12 rows must cost neither memory nor start-up time, and must be the same on every
machine. So the shuffled order is a *function*: a generalised Feistel network. Write an index as
left * b + right with a, b close to sqrt(size) and a b >= size, then in each of eight rounds

    (left, right) -> (right, left + F_key(right) mod the range of left)

which is a bijection for any round function F. A result in the little gap between size and a b goes
through the network again until it is inside (*cycle walking*; fewer than one in sqrt(size) do).
`Permutation` turns the running number of a row into the block that it reads; it is the second step
of a batch's journey (mixture -> permutation -> stream -> loader). `fold_key` makes one 64-bit word
of a tuple of integers, for every keyed choice in `nanolm.data`.

Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4
(cycle walking) and 5 (the network). The mixing constants are those of SplitMix64 (Steele, Lea,
Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

ROUNDS = 8
MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_A = 0xBF58476D1CE4E5B9
MIX_B = 0x94D049BB133111EB


def mix64(word: int) -> int:
    """Scramble a 64-bit word bijectively (the finaliser of SplitMix64)."""
    word = ((word ^ (word >> 30)) * MIX_A) & MASK64
    word = ((word ^ (word >> 27)) * MIX_B) & MASK64
    return word ^ (word >> 31)


def fold_key(*parts: int) -> int:
    """Fold integers (seed, corpus, epoch, …) into one 64-bit word; their order matters."""
    word = mix64(len(parts))
    for part in parts:
        word = mix64((word + GOLDEN + mix64(int(part) & MASK64)) & MASK64)
    return word


class Permutation:
    """A bijection of range(size), chosen by `key`; O(1) memory and O(1) time per index.

    `size` is between 1 and 2^62, `key` any tuple of integers. Raises ValueError for another size.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation's size must be between 1 and 2^62, not {size}")
        self.size = size
        left = math.isqrt(size - 1) + 1
        # The two ranges swap with every round; an even number of rounds restores them.
        self._ranges = np.uint64(left), np.uint64(-(-size // left))
        word = fold_key(*key)
        self._round_keys = [np.uint64(mix64((word + r * GOLDEN) & MASK64)) for r in range(ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of `indices` (any shape, integers in range(size)) as int64 of the same shape.

        Raises IndexError for an index outside range(size).
        """
        return self._walk(indices, self._forward)

    def inverse(self, images: np.ndarray) -> np.ndarray:
        """The indices whose images these are: inverse(permutation(i)) == i."""
        return self._walk(images, self._backward)

    def _walk(self, indices: np.ndarray, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.size):
            raise IndexError(f"index outside range({self.size})")
        words = network(indices.reshape(-1).astype(np.uint64))
        limit = np.uint64(self.size)
        while (outside := np.flatnonzero(words >= limit)).size:
            words[outside] = network(words[outside])
        return words.astype(np.int64).reshape(indices.shape)

    def _forward(self, words: np.ndarray) -> np.ndarray:
        low, high = self._ranges
        left = words // high
        right = words - left * high
        for round_key in self._round_keys:
            moved = left + _scramble(right, round_key, low)
            # An unsigned difference below zero wraps to a huge number: this is moved mod low.
            left, right = right, np.minimum(moved, moved - low)
            low, high = high, low
        return left * high + right

    def _backward(self, words: np.ndarray) -> np.ndarray:
        low, high = self._ranges
        left = words // high
        right = words - left * high
        for round_key in reversed(self._round_keys):
            moved = right - _scramble(left, round_key, high)
            left, right = np.minimum(moved, moved + high), left
            low, high = high, low
        return left * high + right


def _scramble(words: np.ndarray, key: np.uint64, below: np.uint64) -> np.ndarray:
    """The round function: a pseudo-random number in range(below <= 2^31) for each word (uint64)."""
    words = words + key
    words *= np.uint64(MIX_A)
    words ^= words >> np.uint64(32)
    words *= np.uint64(MIX_B)
    words >>= np.uint64(32)
    words *= below
    words >>= np.uint64(32)
    return words
