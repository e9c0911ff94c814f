"""Problems in 16 bits that are long enough for the loops over whole tiles.

A kernel has one tile size for each device and dtype, and walks over whole tiles in a loop of its
own, without masks: training spends nearly all its time there, and a problem that is shorter than a
tile never enters it. So sizes are made from the launch table of the device at hand: three of the
largest tile (a second and a third step of every loop) and five rows, which are no whole tile. On a
CPU the tiles are those of Triton's interpreter, small ones.

Shapes: T queries, S keys, H query heads, G key/value heads, K head width, N rows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.attention_cases import ALONE, BF16, FP16, FP32, Case
from nanolm.tools.kernel_check.attention_trials import bias_leaf, make_bias
from nanolm.tools.kernel_check.op_trials import cross_entropy_trial, norm_trial, symmetric_trial
from nanolm.tools.kernel_check.trial import Trial

STEPS, MORE = 3, 5
"""Whole tiles along every axis, and rows behind them."""

GROUPS: dict[str, Any] = {"n_rows": 1, "n_heads": 2, "n_kv_heads": 1}
LONG = {
    # Every pair of dtype, width, causality and groups, and not all of their combinations.
    "whole tiles in bfloat16": Case(**ALONE, dtype=BF16, width=64),
    "whole tiles in bfloat16, causal": Case(**ALONE, dtype=BF16, width=64, causal=True),
    "whole tiles in bfloat16, groups": Case(**GROUPS, dtype=BF16, width=128, causal=True),
    "whole tiles in float16": Case(**ALONE, dtype=FP16, width=128),
    "whole tiles in float16, causal": Case(**ALONE, dtype=FP16, width=128, causal=True),
    "whole tiles in float16, groups": Case(**GROUPS, dtype=FP16, width=64),
    # A bias takes registers, and so has tiles of its own. Its table is float32, as in training: of
    # a 16-bit one torch adds up the gradient, thousands of pairs a bucket, in 16 bits too.
    "whole tiles in bfloat16, T5's bias": Case(
        **ALONE, dtype=BF16, width=64, bias="bucket", bias_dtype=FP32
    ),
}
"""Attention by name, for `whole_tiles` to give a size."""


def has_triton() -> bool:
    """Whether there is a Triton whose launch tables say what a tile is."""
    return importlib.util.find_spec("triton") is not None


def largest_tile(case: Case, device: str) -> int:
    """Queries or keys of the largest tile that the device's attention kernels take for a case."""
    if not has_triton():  # then no kernel here has tiles; one that has is tried on a short problem
        return 32
    from nanolm.kernels.attention.call import Call, flatten  # noqa: PLC0415  (imports Triton)
    from nanolm.kernels.launch import KINDS  # noqa: PLC0415

    one = dataclasses.replace(case, n_queries=1, n_keys=1)
    q, k = (torch.empty(1, 1, n, case.width, dtype=case.dtype, device=device) for n in heads(one))
    leaf = bias_leaf(one)
    leaf = leaf if leaf is None else leaf.to(device)
    bias = make_bias(one, leaf, case.dtype, device)
    mask = Mask(causal=case.causal, window=case.window)
    call = Call(*flatten(q, k, k, mask, bias, scale=case.scale, softcap=case.softcap))
    return max(max(tile.m, tile.n) for tile in map(call.tile, KINDS))


def heads(case: Case) -> tuple[int, int]:
    """(H, G)."""
    return case.n_heads, case.n_kv_heads


def whole_tiles(case: Case, device: str) -> Case:
    """The case with T and S of three of the device's largest tiles, and five."""
    length = STEPS * largest_tile(case, device) + MORE
    return dataclasses.replace(case, n_queries=length, n_keys=length)


def long_trials(op: str, device: str) -> list[Trial]:
    """The trials of an op whose kernel loops, in bfloat16 and in float16."""
    if op not in LONG_TRIALS:
        return []
    return [LONG_TRIALS[op](dtype, device) for dtype in (BF16, FP16)]


def long_norm(dtype: torch.dtype, device: str) -> Trial:
    """So many wide rows that a program of the backward pass takes three and some a fourth: it adds
    its share of the gradients of weight and bias in a loop."""
    width = 1030
    rows, programs = 1, 8
    if has_triton():
        from nanolm.kernels.launch import processors, row_launch  # noqa: PLC0415

        rows, programs = row_launch(width).rows, 2 * processors(torch.device(device))
    n_rows = STEPS * rows * programs + MORE
    return norm_trial(
        "layernorm", n_rows, width, bias=True, residual=True, dtype=dtype, device=device
    )


def long_cross_entropy(dtype: torch.dtype, device: str) -> Trial:
    """Three whole blocks of logits a row, and five."""
    block = 4096
    if has_triton():
        from nanolm.kernels.cross_entropy import BLOCK  # noqa: PLC0415

        block = BLOCK
    return cross_entropy_trial(
        7, STEPS * block + MORE, bias=True, softcap=None, label_smoothing=0.1, z_loss=1e-2,
        dtype=dtype, device=device,
    )  # fmt: skip


def long_product(dtype: torch.dtype, device: str) -> Trial:
    """Three tiles of rows and five, so that tiles have mirror images; likewise columns."""
    tile = 32
    if has_triton():
        from nanolm.kernels.launch import product_launch  # noqa: PLC0415

        launch = product_launch(torch.device(device), dtype)
        tile = max(launch.m, launch.n)
    return symmetric_trial(STEPS * tile + MORE, STEPS * tile + MORE, dtype=dtype, device=device)


LONG_TRIALS: dict[str, Callable[[torch.dtype, str], Trial]] = {
    "norm": long_norm,
    "linear_cross_entropy": long_cross_entropy,
    "symmetric_product": long_product,
}
"""Rotary and glu have no loop and `linear` is torch's own."""
