"""Which split a document belongs to: decided by the hash of its text, never by its place.

A document keeps its split when the corpus grows, is reordered or is read by other workers:

    u = mix(digest, seed) in [0, 2^64);   val: u < v · 2^64;   test: u >= (1 - t) · 2^64

In a small corpus nobody might fall below v; so the bound moves to the smallest (for test: largest)
u there is, and a split that was asked for is never empty while there are documents enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2
HASHES = 1 << 64


def mix(digests: np.ndarray, seed: int) -> np.ndarray:
    """uint64[n] -> uint64[n]: splitmix64's finaliser (Steele et al. 2014) on digest + seed."""
    step = np.uint64((0x9E3779B97F4A7C15 * (2 * seed + 1)) % HASHES)
    with np.errstate(over="ignore"):
        value = digests + step
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Split:
    """The bounds: u <= last_val is validation, u >= first_test is test, the rest trains."""

    seed: int
    last_val: int
    first_test: int

    def of(self, digests: np.ndarray) -> np.ndarray:
        """High digest halves uint64[n] -> 0 (train), 1 (val) or 2 (test), int8[n]."""
        values = mix(digests, self.seed)
        where = np.full(len(values), TRAIN, np.int8)
        if self.last_val >= 0:
            where[values <= np.uint64(self.last_val)] = VAL
        if self.first_test < HASHES:
            where[values >= np.uint64(self.first_test)] = TEST
        return where


def hash_range(digests: np.ndarray, seed: int) -> tuple[int, int]:
    """Smallest and largest u of some documents; (2^64 - 1, 0) when there are none."""
    if not len(digests):
        return HASHES - 1, 0
    values = mix(digests, seed)
    return int(values.min()), int(values.max())


def choose_split(
    ranges: Iterable[tuple[int, int]], val_fraction: float, test_fraction: float, seed: int
) -> Split:
    """Fix the bounds for a corpus, given the `hash_range` of each of its parts."""
    smallest, largest = HASHES - 1, 0
    for low, high in ranges:
        smallest, largest = min(smallest, low), max(largest, high)
    last_val, first_test = -1, HASHES
    if val_fraction > 0:
        last_val = max(int(val_fraction * HASHES) - 1, smallest)
    if test_fraction > 0:
        first_test = min(HASHES - int(test_fraction * HASHES), largest)
    return Split(seed, last_val, first_test)
