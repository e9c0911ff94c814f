"""Mixture of corpora: which corpus does global row g come from, and which of its rows is it?

With shares p_i / P (integers, sum P), rows repeat a pattern of P slots in which corpus i stands p_i
times, so that for g = q P + r

    corpus(g) = pattern[r]          rank(g) = q p_corpus + earlier slots of that corpus in pattern

No state, no loop: any row is found in O(1). The pattern is made by *earliest deadline first*: item
k of corpus i may not come before slot floor(k P / p_i) nor after ceil((k + 1) P / p_i). Such a
schedule always exists and EDF finds it; it keeps the count of every corpus within one row of its
share after every row, so within two rows over EVERY window.

Weights whose shares have a common denominator of at most 2^16 (0.7 and 0.3, 5:2:1) are exact;
others are rounded to multiples of 2^-16. `Mixture.shares` says what they became. This is the first
step of a batch's journey (mixture -> permutation -> stream -> loader).

Sources: Baruah, Cohen, Plaxton, Varvel, "Proportionate Progress", Algorithmica 15 (1996); Tijdeman,
"The chairman assignment problem", Discrete Mathematics 32 (1980).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from nanolm.errors import UserError

FINEST = 1 << 16
"""The largest period of a pattern: shares are multiples of 1/FINEST or coarser."""


class Mixture:
    """Deterministic interleaving of corpora by weight; the same for every world size.

    `weights` are positive numbers, one per corpus, that need not sum to one. `shares` holds the
    exact fractions in use. Raises UserError for weights that are not positive and finite, and for a
    corpus whose share is too small to appear at all.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.slots = _slots(weights)
        self.period = sum(self.slots)
        self.shares = [Fraction(slots, self.period) for slots in self.slots]
        self._slots = np.array(self.slots, dtype=np.int64)
        self._pattern = _earliest_deadline_first(self.slots)
        self._earlier = np.empty(self.period, dtype=np.int64)
        for corpus, slots in enumerate(self.slots):
            self._earlier[self._pattern == corpus] = np.arange(slots)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For global rows (int64): the corpus of each, and how many earlier rows came from it."""
        cycles, places = np.divmod(np.asarray(rows, dtype=np.int64), self.period)
        corpora = self._pattern[places]
        return corpora, cycles * self._slots[corpora] + self._earlier[places]


def _slots(weights: Sequence[float]) -> list[int]:
    """Integer shares of the weights, reduced; their sum is the period, at most FINEST."""
    if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
        raise UserError(
            f"data weights must be positive numbers, not {list(weights)}: give every "
            "corpus a weight above zero or leave it out"
        )
    # Through the decimal text, so that 0.1 is one tenth and not the nearest binary fraction.
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= FINEST:
        return [int(share * period) for share in shares]
    slots = [int(share * FINEST) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: slots[i] - shares[i] * FINEST)
    for corpus in by_remainder[: FINEST - sum(slots)]:
        slots[corpus] += 1
    if 0 in slots:
        raise UserError(
            f"data weight {weights[slots.index(0)]} is below 1/{FINEST} of the total "
            "and would never be read: raise it or leave that corpus out"
        )
    common = math.gcd(*slots)
    return [count // common for count in slots]


def _earliest_deadline_first(slots: list[int]) -> np.ndarray:
    """The pattern: int64 of length sum(slots), corpus i standing slots[i] times."""
    period = sum(slots)
    pattern = np.empty(period, dtype=np.int64)
    done = [0] * len(slots)
    waiting = [(0, corpus) for corpus in range(len(slots))]  # (release, corpus)
    ready: list[tuple[int, int]] = []  # (deadline, corpus)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            corpus = heapq.heappop(waiting)[1]
            deadline = -((done[corpus] + 1) * period // -slots[corpus])
            heapq.heappush(ready, (deadline, corpus))
        corpus = heapq.heappop(ready)[1]
        pattern[place] = corpus
        done[corpus] += 1
        if done[corpus] < slots[corpus]:
            heapq.heappush(waiting, (done[corpus] * period // slots[corpus], corpus))
    return pattern
