"""Which attention weights dropout keeps: the definition that the Triton kernels are tested against.

Philox-4x32-10 (Salmon et al. 2011, section 3.3) keyed by the seed, with (s, t, head, batch) as its
counter, but for bits 0 and 3 of s and bit 3 of t, which are left out of it: these choose one of the
four words (2 x bit 3 of t + bit 3 of s) and half of it (the upper one where s is odd). 16 bits are
compared with p * 2^16, rounded.

Shapes: B batch, H heads, T queries, S keys.
"""

from __future__ import annotations

import numpy as np

ROUND_A, ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
WORD = np.uint64(0xFFFFFFFF)


def philox(seed: int, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray) -> np.ndarray:
    """The four output words, uint32, for each counter: [4, ...]."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    for _ in range(10):
        product_b, product_a = c2 * ROUND_B, c0 * ROUND_A
        c0 = (product_b >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (product_a >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = product_b & WORD, product_a & WORD
        k0, k1 = (k0 + KEY_A) & 0xFFFFFFFF, (k1 + KEY_B) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def decisions(seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """int [B, H, T, S]: the 16 bits by which each entry is kept or dropped."""
    b, h, t, s = np.ogrid[tuple(slice(n) for n in shape)]
    zero = np.zeros(shape, dtype=np.uint64)
    counter_s, counter_t = s // 16 * 4 + s % 8 // 2, t // 16 * 8 + t % 8
    words = philox(seed, zero + counter_s, zero + counter_t, zero + h, zero + b)
    chosen = np.choose((t // 8 % 2 * 2 + s // 8 % 2) + zero.astype(np.int64), words)
    return np.where(s % 2 == 1, chosen >> 16, chosen & 0xFFFF)


def keep_mask(seed: int, dropout: float, shape: tuple[int, int, int, int]) -> np.ndarray:
    """bool [B, H, T, S]: which entries survive."""
    return decisions(seed, shape) >= round(dropout * 2**16)
