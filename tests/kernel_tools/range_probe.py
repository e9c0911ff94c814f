"""A kernel that writes down what `key_range` and `query_range` tell each program.

Imported when it is used and not before: the kernels that it asks may be mutants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanolm.kernels.attention.ranges import key_range, query_range
from nanolm.kernels.attention.scores import Masks, Shape
from nanolm.ops.masks import Mask


@triton.jit
def probe_kernel(
    out, masks, shape,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """One program: its four numbers."""
    own = tl.program_id(0)
    if OF_KEYS:
        a, b, c, d = key_range(masks, 0, own * M, shape, CAUSAL, False, M, N)
    else:
        a, b, c, d = query_range(masks, 0, own * N, shape, CAUSAL, False, M, N)
    tl.store(out + own * 4, a)
    tl.store(out + own * 4 + 1, b)
    tl.store(out + own * 4 + 2, c)
    tl.store(out + own * 4 + 3, d)


def ranges_of(
    mask: Mask, n_queries: int, n_keys: int, m: int, n: int, *, of_keys: bool
) -> list[list[int]]:
    """[programs, 4]: the range of keys of each m queries, or that of queries of each n keys."""
    fields = (mask.window, mask.key_lengths, None, None, mask.prefix_lengths, None, None)
    n_programs = triton.cdiv(n_queries, m) if of_keys else triton.cdiv(n_keys, n)
    out = torch.zeros(n_programs, 4, dtype=torch.int32)
    probe_kernel[(n_programs,)](
        out, Masks(*fields), Shape(n_queries, n_keys, 1), CAUSAL=mask.causal, M=m, N=n,
        OF_KEYS=of_keys,
    )  # fmt: skip
    return out.tolist()
