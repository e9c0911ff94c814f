"""Rotary position encoding: pairs of features rotated by an angle that the caller gives per token.

    (a, b) -> (a cos - b sin, b cos + a sin)

for the pairs (x_i, x_{i+R}), i < R (Su et al. 2021, section 3.2.2, where neighbours are paired;
the halves are GPT-NeoX's, Black et al. 2022). A rotation's transpose is its inverse, so the
backward pass is the same kernel with -sin.

Shapes: B batch, T tokens, H heads, K head width, R rotated pairs (2R <= K); angles [B or 1, T, R].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanolm.kernels.launch import accumulator, device_guard
from nanolm.kernels.operators import differentiable
from nanolm.kernels.tiles import View


@triton.jit
def rotary_kernel(
    x, out, cos, sin, n_tokens, n_heads, angle_rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, PAIR_COLUMNS: tl.constexpr,
    INVERSE: tl.constexpr, ACCUMULATE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: one token, all its heads; its angles are read once."""
    # All heads of a token in one program, since they are rotated by the same angles.
    batch = tl.program_id(0) // n_tokens
    token = tl.program_id(0) % n_tokens
    pair = tl.arange(0, PAIR_COLUMNS)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    angle = (tl.cast(batch % angle_rows, tl.int64) * n_tokens + token) * PAIRS + pair
    c = tl.load(cos + angle, mask=pair < PAIRS, other=0.0).to(ACCUMULATE)
    s = tl.load(sin + angle, mask=pair < PAIRS, other=0.0).to(ACCUMULATE)
    if INVERSE:
        s = -s
    start = tl.cast(batch, tl.int64) * x.stride_b + tl.cast(token, tl.int64) * x.stride_t
    source = x.pointer + start + tl.cast(head, tl.int64) * x.stride_h
    stride = tl.cast(x.stride_k, tl.int64)
    target = out + (tl.cast(tl.program_id(0), tl.int64) * n_heads + head) * WIDTH
    inside = (head < n_heads) & (pair < PAIRS)
    first = tl.load(source + pair * stride, mask=inside, other=0.0).to(ACCUMULATE)
    second = tl.load(source + (pair + PAIRS) * stride, mask=inside, other=0.0).to(ACCUMULATE)
    kind = out.dtype.element_ty
    tl.store(target + pair, (first * c - second * s).to(kind), mask=inside)
    tl.store(target + PAIRS + pair, (second * c + first * s).to(kind), mask=inside)
    if 2 * PAIRS < WIDTH:
        rest = 2 * PAIRS + tl.arange(0, COLUMNS)[None, :]
        left = (head < n_heads) & (rest < WIDTH)
        tl.store(target + rest, tl.load(source + rest * stride, mask=left), mask=left)


@torch.library.custom_op("nanolm::rotary", mutates_args=())
def rotary_op(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x [B, T, H, K], any strides, rotated by contiguous angles [B or 1, T, R]."""
    out = x.new_empty(x.shape)
    n_rows, n_tokens, n_heads, width = x.shape
    if x.numel() == 0:
        return out
    n_pairs = cos.shape[-1]
    with device_guard(x):
        rotary_kernel[(n_rows * n_tokens,)](
            View(x, *x.stride()), out, cos, sin, n_tokens, n_heads, cos.shape[0],
            WIDTH=width, COLUMNS=triton.next_power_of_2(width), PAIRS=n_pairs,
            PAIR_COLUMNS=triton.next_power_of_2(n_pairs), INVERSE=inverse,
            ACCUMULATE=accumulator(x.dtype), HEADS=triton.next_power_of_2(n_heads),
        )  # fmt: skip
    return out


@rotary_op.register_fake
def fake_rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The output, not computed."""
    return x.new_empty(x.shape)


def save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps the angles."""
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def backward(ctx: Any, grad_out: Tensor) -> tuple:
    """The inverse rotation."""
    return rotary_op(grad_out, *ctx.saved_tensors, not ctx.inverse), None, None, None


differentiable_rotary = differentiable(rotary_op, backward, save_for_backward)


def rotary(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """x with its first 2R features of every head rotated; angles [B or 1, T, R]."""
    return differentiable_rotary(x_BTHK, cos_BTR.contiguous(), sin_BTR.contiguous(), False)
