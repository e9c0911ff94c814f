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
from nanolm.ops.matching import with_ranges


@triton.jit
def probe_kernel(
    out, masks, batch, shape,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """One program: its four numbers."""
    own = tl.program_id(0)
    if OF_KEYS:
        a, b, c, d = key_range(masks, batch, own * M, shape, CAUSAL, M, N)
    else:
        a, b, c, d = query_range(masks, batch, own * N, shape, CAUSAL, M, N)
    tl.store(out + own * 4, a)
    tl.store(out + own * 4 + 1, b)
    tl.store(out + own * 4 + 2, c)
    tl.store(out + own * 4 + 3, d)


def ranges_of(
    mask: Mask, n_queries: int, n_keys: int, m: int, n: int, *, of_keys: bool, batch: int = 0,
    n_programs: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """[programs, 4]: the range of keys of each m queries, or that of queries of each n keys, of one
    row of the batch and its first programs. (Of documents and order it matters only that they are
    there.)"""
    fields = (
        *(mask.window, mask.key_lengths, mask.documents, mask.documents, mask.prefix_lengths),
        *(mask.order, mask.order, *(with_ranges(mask).ranges or (None, None))),
    )
    n_programs = n_programs or (triton.cdiv(n_queries, m) if of_keys else triton.cdiv(n_keys, n))
    out = torch.zeros(n_programs, 4, dtype=torch.int32)
    probe_kernel[(n_programs,)](
        out, Masks(*fields), batch, Shape(n_queries, n_keys, 1), CAUSAL=mask.causal, M=m, N=n,
        OF_KEYS=of_keys,
    )  # fmt: skip
    return out.tolist()
