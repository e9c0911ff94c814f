"""What each kernel must cost at least: FLOPs, bytes, and the time that these take on three GPUs.

    time >= max(FLOPs / peak FLOP/s, bytes / peak bytes/s)

Bytes are those that must cross HBM once. For attention they are those of FlashAttention-2 at its
tile sizes, where keys and values are read once per tile of queries; caches may save some of it. The
traffic that the kernels really ask for is counted by the sanitizer and held within 1.25 x of this
by tests/test_kernel_roofline.py.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tokens,
D model width, V vocabulary, F feed-forward width; e bytes an element.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call costs."""

    flops: float
    bytes: float

    def seconds(self, gpu: str) -> tuple[float, str]:
        """(lower bound on the time, "compute" or "memory")."""
        flops, bandwidth = GPUS[gpu]
        compute, memory = self.flops / flops, self.bytes / bandwidth
        return max(compute, memory), "compute" if compute > memory else "memory"


# Dense bf16 FLOP/s and HBM bytes/s, from the vendors' data sheets (A100 80 GB SXM, H100 SXM,
# MI300X).
GPUS = {"A100": (312e12, 2.039e12), "H100": (989e12, 3.35e12), "MI300X": (1307e12, 5.3e12)}


def attention(
    n_rows: int, n_queries: int, n_keys: int, n_heads: int, width: int, *, m: int, share: float = 1,
    e: int = 2,
) -> Cost:  # fmt: skip
    """Forward; `share` is the part of the tiles that the mask leaves (1/2 for causal)."""
    pairs = n_rows * n_heads
    flops = 4 * pairs * n_queries * n_keys * width * share
    reads = math.ceil(n_queries / m) * 2 * n_keys * width * share
    return Cost(flops, pairs * (e * (2 * n_queries * width + reads) + 4 * n_queries))


def norm(n_rows: int, width: int, *, residual: bool, e: int = 2) -> Cost:
    """Forward: x (and the residual) in, the norm (and the sum) out, one number a row."""
    passes = 4 if residual else 2
    return Cost(8 * n_rows * width, e * n_rows * width * passes + 4 * n_rows + e * width)


def rotary(n_tokens: int, n_heads: int, width: int, e: int = 2) -> Cost:
    """x in, out; cos and sin of every token."""
    return Cost(3 * n_tokens * n_heads * width, n_tokens * (2 * e * n_heads * width + 4 * width))


def glu(n_rows: int, width: int, e: int = 2) -> Cost:
    """Two halves in, one out."""
    return Cost(6 * n_rows * width, 3 * e * n_rows * width)


def cross_entropy(n_tokens: int, vocab_size: int, e: int = 2) -> Cost:
    """The kernel between the two products: logits read twice, their gradient written once."""
    return Cost(10 * n_tokens * vocab_size, 3 * e * n_tokens * vocab_size + 24 * n_tokens)


def linear_cross_entropy(n_tokens: int, width: int, vocab_size: int, e: int = 2) -> Cost:
    """The whole op: three products and the kernel between them."""
    kernel = cross_entropy(n_tokens, vocab_size, e)
    products = 6 * n_tokens * width * vocab_size
    matrices = e * (3 * n_tokens * width + 2 * vocab_size * width) + 4 * vocab_size * width
    logits = 3 * e * n_tokens * vocab_size  # written once, their gradient read twice
    return Cost(kernel.flops + products, kernel.bytes + matrices + logits)


def symmetric_product(n_rows: int, n_columns: int, e: int = 2) -> Cost:
    """Half of the product's FLOPs."""
    return Cost(n_rows**2 * n_columns, e * (n_rows * n_columns + n_rows**2))


TYPICAL = {
    "attention, 8 x 4096 x 16 x 128, causal": attention(8, 4096, 4096, 16, 128, m=128, share=0.5),
    "its backward pass": Cost(
        2.5 * attention(8, 4096, 4096, 16, 128, m=128, share=0.5).flops,
        3 * attention(8, 4096, 4096, 16, 128, m=64, share=0.5).bytes,
    ),
    "attention, 32 x 512 x 12 x 64": attention(32, 512, 512, 12, 64, m=128),
    "norm + residual, 32768 x 2048": norm(32768, 2048, residual=True),
    "rotary, 32768 x 16 x 128": rotary(32768, 16, 128),
    "glu, 32768 x 5504": glu(32768, 5504),
    "cross-entropy, 8192 x 2048 x 50304": linear_cross_entropy(8192, 2048, 50304),
    "symmetric product, 2048 x 8192": symmetric_product(2048, 8192),
}
