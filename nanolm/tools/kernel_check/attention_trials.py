"""Trials of attention: the tensors, mask and bias of a case, and how they are compared.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.ops.bias import AlibiBias, Bias, BucketBias, DenseBias
from nanolm.ops.contract import AttentionSpec
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.attention_corners import UNUSUAL, apart
from nanolm.tools.kernel_check.trial import Trial, reference, upstream

LAYOUTS = ("sliced", "heads_first", "contiguous")
"""Of v, q and k where they lie unlike each other: the seeds of q, k and v are 1, 2 and 3."""


def random(shape: tuple[int, ...], case: Case, seed: int) -> Tensor:
    """Normal numbers [B, T, H, K] in the case's dtype and layout."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
    layout = LAYOUTS[seed % 3] if case.layout == "unlike" else case.layout
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # every other feature, of rows with a gap between them
        wide = x.new_zeros(shape[0], shape[1] + 3, shape[2], 2 * shape[3])
        wide[:, : shape[1], :, ::2] = x
        return wide[:, : shape[1], :, ::2]
    return x


def make_mask(case: Case) -> Mask:
    """The case's mask; numbers are drawn, so that no block boundary is special."""
    rng = np.random.default_rng(7)
    n_rows, n_queries, n_keys = case.n_rows, case.n_queries, case.n_keys
    fields: dict[str, Any] = {"causal": case.causal, "window": case.window}
    if case.lengths:
        lengths = rng.integers(1, n_keys + 1, n_rows)
        lengths[-1] = 0 if n_rows > 1 else lengths[-1]  # a row that sees nothing
        fields["key_lengths"] = torch.tensor(lengths)
    if case.documents:
        keys = np.sort(rng.integers(0, 4, (n_rows, n_keys)), axis=1)
        at = (np.arange(n_queries) + n_keys - n_queries).clip(min=0)
        fields["documents"] = torch.tensor(keys[:, at])
        fields["key_documents"] = torch.tensor(keys)
    # A prefix says nothing of a layer that is not causal, in which it may stand all the same.
    if case.prefix:
        fields["prefix_lengths"] = torch.tensor(rng.integers(0, n_keys + 1, n_rows))
    if case.order != "none":
        orders = np.stack([rng.permutation(max(n_queries, n_keys)) for _ in range(n_rows)])
        fields["order"] = torch.tensor(orders[:, :n_queries])
        fields["key_order"] = torch.tensor(orders[:, :n_keys])
        fields["strict"] = case.order == "strict"
    if case.numbers in UNUSUAL:
        fields |= unusual(case)
    numbers = {name: x.to(case.integers) for name, x in fields.items() if isinstance(x, Tensor)}
    if case.numbers == "gaps":
        numbers = {name: apart(x) for name, x in numbers.items()}
    return Mask(**fields | numbers)


def unusual(case: Case) -> dict[str, Tensor | None]:
    """The numbers of all keys, and of the last queries where these are fewer; else without numbers
    of the keys' own."""
    name, numbers = UNUSUAL[case.numbers](case.n_rows, case.n_keys)
    own = None if case.n_queries == case.n_keys else numbers
    return {name: numbers[:, case.n_keys - case.n_queries :], f"key_{name}": own}


def bias_leaf(case: Case) -> Tensor | None:
    """The bias's parameters, or None."""
    generator = torch.Generator().manual_seed(5)
    dtype = case.bias_dtype or case.dtype
    if case.bias in ("none", "alibi"):
        return None
    if case.bias == "learned_alibi":
        return slopes(case.n_heads).to(dtype)
    if case.bias == "bucket":
        return torch.randn(12, case.n_heads, generator=generator).to(dtype)
    rows = case.n_rows if case.bias in ("dense", "dense_by_row", "dense_of_keys") else 1
    heads = case.n_heads if case.bias in ("dense", "dense_by_head", "dense_expanded") else 1
    queries = 1 if case.bias == "dense_of_keys" else case.n_queries
    values = torch.randn(rows, heads, queries, case.n_keys, generator=generator).to(dtype)
    if case.bias == "dense_of_places":
        return values[0, 0]
    if case.bias == "dense_hiding":  # a few whole rows, and a few keys of the others
        values[:, :, ::3] = torch.finfo(dtype).min
        values[:, :, :, ::4] = torch.finfo(dtype).min
    return values


def slopes(n_heads: int) -> Tensor:
    """float32 [H]: numbers that 16 bits cannot hold."""
    return 0.7 * 2.0 ** -torch.arange(1, n_heads + 1)


def make_bias(case: Case, leaf: Tensor | None, dtype: torch.dtype, device: Any) -> Bias | None:
    """The bias on top of its parameters."""
    if case.bias == "none":
        return None
    if case.bias == "alibi":
        return AlibiBias(slopes(case.n_heads).to(case.bias_dtype or dtype).to(device, dtype))
    assert leaf is not None  # the other kinds have parameters, see `bias_leaf`
    if case.bias == "learned_alibi":
        return AlibiBias(leaf)
    if case.bias == "bucket":
        return BucketBias(leaf, not case.causal, 30)
    if case.bias == "dense_expanded":
        return DenseBias(leaf.expand(case.n_rows, -1, -1, -1))
    return DenseBias(leaf)


def spec_of(case: Case, device: str) -> AttentionSpec:
    """What a kernel is asked at build time."""
    mask = make_mask(case)
    kind: Any = "dense" if case.bias.startswith("dense") else case.bias
    return AttentionSpec(
        dtype=case.dtype,
        device=device,
        phase=case.phase,
        n_heads=case.n_heads,
        n_kv_heads=case.n_kv_heads,
        head_dim=case.width,
        causal=case.causal,
        window=case.window,
        masks=mask.kinds() - {"causal", "window"},
        bias=None if kind == "none" else kind,
        softcap=case.softcap,
        cross=case.n_queries != case.n_keys,
    )


def to_device(mask: Mask, device: Any) -> Mask:
    """The mask with its tensors moved."""
    moved: dict[str, Any] = {
        field.name: value.to(device)
        for field in dataclasses.fields(mask)
        if isinstance(value := getattr(mask, field.name), Tensor)
    }
    return dataclasses.replace(mask, **moved)


def sums_of_terms(case: Case, mask: Mask, leaves: dict[str, Tensor]) -> dict[str, float]:
    """The largest sum of absolute terms of out, P v, and of each gradient: dq = scale sum_s P_ts
    (dP_ts - delta_t) k_s, where |P dP| |k| stands for a term, since delta is the mean of dP. One
    key alone cancels, and so do weights of which one is nearly 1.
    """
    q, k, v = (leaves[name] for name in "qkv")
    bias = make_bias(case, leaves.get("bias"), torch.float64, q.device)
    scale, repeats = case.scale, case.n_heads // case.n_kv_heads
    weights_BHTS, _ = reference("attention").weights(
        q, k, mask, bias=bias, scale=scale, softcap=case.softcap
    )
    grad_BTHK = upstream({"out": q}, frozenset())["out"].double()
    k, v = (x.transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (k, v))
    terms_BHTS = weights_BHTS * (grad_BTHK.transpose(1, 2) @ v.mT).abs()
    sums = {
        "out": weights_BHTS @ v.abs(),
        "dv": weights_BHTS.mT @ grad_BTHK.transpose(1, 2).abs(),
        "dq": scale * terms_BHTS @ k.abs(),
        "dk": scale * terms_BHTS.mT @ q.transpose(1, 2).abs(),
        "dbias": terms_BHTS,
    }
    return {name: float(x.max()) if x.numel() else 0.0 for name, x in sums.items()}


def largest_score(case: Case, leaves: dict[str, Tensor]) -> float:
    """The largest |q . k| * scale. A weight is off by as much as its exponent, which float32 rounds
    by 2^-24 of the score, float64 by 2^-53."""
    q, k = (leaves[name].detach().double().transpose(1, 2) for name in "qk")
    k = k.repeat_interleave(case.n_heads // case.n_kv_heads, dim=1)
    scores = (q @ k.mT).abs()
    return case.scale * float(scores.max()) if scores.numel() else 0.0


def trial_of(
    case: Case, device: str = "cpu", *, mask: Mask | None = None, lse: bool = False
) -> Trial:
    """The trial of a case; `mask` replaces its own, `lse` asks for the log-sum-exp too."""
    sizes = (case.n_rows, case.n_keys, case.n_kv_heads, case.width)
    leaves = {
        "q": random((case.n_rows, case.n_queries, case.n_heads, case.width), case, 1),
        "k": random(sizes, case, 2),
        "v": random(sizes, case, 3),
    }
    for name in "qk":
        leaves[name].mul_(case.size)
    leaf = bias_leaf(case)
    if leaf is not None:
        leaves["bias"] = leaf
    leaves = {name: x.to(device) for name, x in leaves.items()}
    used = to_device(make_mask(case) if mask is None else mask, device)

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        q = given["q"]
        # The definition is given the same numbers in float64.
        wide = torch.float64 if q.dtype == torch.float64 else case.bias_dtype or torch.float32
        bias = make_bias(case, given.get("bias"), wide, q.device)
        options = {"return_lse": True} if lse else {}
        result = kernel.run(
            q, given["k"], given["v"], used,
            bias=bias, scale=case.scale, softcap=case.softcap, **options,
        )  # fmt: skip
        return {"out": result.out, "lse": result.lse} if lse else {"out": result}

    exponent = 2.0**-53 if case.dtype == torch.float64 else 2.0**-24
    return Trial(
        case.features(),
        spec_of(case, device),
        leaves,
        run,
        autocast=case.autocast,
        dtypes={"out": case.autocast or case.dtype},
        terms=None if lse else functools.partial(sums_of_terms, case, used),
        rounding=exponent * largest_score(case, leaves),
        constants={name: x for name, x in vars(used).items() if isinstance(x, Tensor)},
    )
