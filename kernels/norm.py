"""LayerNorm and RMSNorm, forward and backward, with an optional residual sum before them.

    y = x + r                        (the new residual stream)
    n = (y - mean(y)) / sqrt(var(y) + eps)      RMSNorm: mean = 0, var = mean(y^2)
    out = n * w + b

A row is read once and written once: the sum, both moments and the result stay in registers. For
the backward pass, with g = dout * w and the means taken over the row,

    dy = (g - mean(g) - n mean(g n)) * rstd     RMSNorm: without mean(g)
    dw = sum_rows dout * n,  db = sum_rows dout

Each program of the backward pass keeps the sums over its own rows, and PyTorch adds the programs'
sums, so nothing is added atomically.

Shapes: N rows, D width; `COLUMNS` is D rounded up to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanolm.kernels.launch import accumulator, device_guard, processors, row_launch, wide_dtype
from nanolm.kernels.operators import differentiable


@triton.jit
def norm_forward_kernel(
    x, residual, weight, bias, out, total, mean, rstd, n_rows, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows) & (column < WIDTH)
    at = tl.cast(row, tl.int64) * WIDTH + column
    y = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        # 16-bit activations may meet a float32 stream: the sum has the wider of both dtypes.
        stream = total.dtype.element_ty
        y = y.to(stream) + tl.load(residual + at, mask=inside, other=0.0).to(stream)
        tl.store(total + at, y, mask=inside)
    y = y.to(ACCUMULATE)
    if CENTRED:
        centre = tl.sum(y, axis=1)[:, None] / WIDTH
        # In two passes over registers, centred first: mean(y^2) - mean(y)^2 would cancel where the
        # mean is large beside the spread.
        y = tl.where(inside, y - centre, 0.0)
        tl.store(mean + row, centre, mask=row < n_rows)
    scale = 1 / tl.sqrt(tl.sum(y * y, axis=1)[:, None] / WIDTH + eps)
    tl.store(rstd + row, scale, mask=row < n_rows)
    y = y * scale * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACCUMULATE)
    if bias is not None:
        y += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(ACCUMULATE)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    total, weight, mean, rstd, grad_out, grad_total, grad_x, grad_weight, grad_bias, n_rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One program: every n-th group of ROWS rows, and their share of dw and db."""
    column = tl.arange(0, COLUMNS)[None, :]
    sum_weight = tl.zeros([1, COLUMNS], ACCUMULATE)
    sum_bias = tl.zeros([1, COLUMNS], ACCUMULATE)
    step = tl.num_programs(0) * ROWS
    # A program takes many rows, in steps, and keeps their sums of dw and db: one row of partial
    # sums a program is left to add, instead of one a row of the batch.
    for first in range(tl.program_id(0) * ROWS, n_rows, step):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < n_rows) & (column < WIDTH)
        at = tl.cast(row, tl.int64) * WIDTH + column
        normed = tl.load(total + at, mask=inside, other=0.0).to(ACCUMULATE)
        if CENTRED:
            normed -= tl.load(mean + row, mask=row < n_rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < n_rows, other=0.0)
        normed = tl.where(inside, normed * scale, 0.0)
        grad = tl.load(grad_out + at, mask=inside, other=0.0).to(ACCUMULATE)
        sum_weight += tl.sum(grad * normed, axis=0)[None, :]
        sum_bias += tl.sum(grad, axis=0)[None, :]
        # Read anew for every row, from a cache: wide rows lack the registers to keep it.
        grad *= tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACCUMULATE)
        grad_y = grad - normed * (tl.sum(grad * normed, axis=1)[:, None] / WIDTH)
        if CENTRED:
            grad_y -= tl.sum(grad, axis=1)[:, None] / WIDTH
        grad_y *= scale
        if grad_total is not None:
            grad_y += tl.load(grad_total + at, mask=inside, other=0.0).to(ACCUMULATE)
        tl.store(grad_x + at, grad_y.to(grad_x.dtype.element_ty), mask=inside)
    own = tl.program_id(0) * WIDTH + column
    tl.store(grad_weight + own, sum_weight, mask=column < WIDTH)
    if grad_bias is not None:
        tl.store(grad_bias + own, sum_bias, mask=column < WIDTH)


@torch.library.custom_op("nanolm::norm", mutates_args=())
def norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, x + residual or an empty tensor, mean, rstd) of a contiguous x [N, D]; out and the sum
    have the wider dtype of x and residual."""
    out, total, mean, rstd = fake_norm(x, weight, bias, residual, centred, eps)
    n_rows, width = x.shape
    if x.numel() == 0:
        return out, total, mean, rstd
    launch = row_launch(width)
    with device_guard(x):
        norm_forward_kernel[(triton.cdiv(n_rows, launch.rows),)](
            x, residual, weight, bias, out, total, mean, rstd, n_rows, eps,
            WIDTH=width, COLUMNS=launch.columns, ROWS=launch.rows, CENTRED=centred,
            ACCUMULATE=accumulator(out.dtype), num_warps=launch.warps,
        )  # fmt: skip
    return out, total, mean, rstd


@norm_op.register_fake
def fake_norm(
    x: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the right shape, not computed."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    n_rows, wide = x.shape[0], wide_dtype(dtype)
    total = x.new_empty(x.shape if residual is not None else 0, dtype=dtype)
    mean = x.new_empty(n_rows if centred else 0, dtype=wide)
    return x.new_empty(x.shape, dtype=dtype), total, mean, x.new_empty(n_rows, dtype=wide)


@torch.library.custom_op("nanolm::norm_backward", mutates_args=())
def norm_backward_op(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and of the residual, the same), weight and bias."""
    n_rows, width = total.shape
    grad_x = total.new_empty(total.shape)
    if total.numel() == 0:
        return grad_x, torch.zeros_like(weight), weight.new_zeros(width if has_bias else 0)
    launch = row_launch(width)
    # Two programs a multiprocessor hide each other's waiting; each more would be another row of
    # partial sums.
    n_programs = min(triton.cdiv(n_rows, launch.rows), 2 * processors(total.device))
    grad_weight = mean.new_empty((n_programs, width), dtype=wide_dtype(total.dtype))
    grad_bias = torch.empty_like(grad_weight) if has_bias else None
    with device_guard(total):
        norm_backward_kernel[(n_programs,)](
            total, weight, mean, rstd, grad_out, grad_total, grad_x, grad_weight, grad_bias,
            n_rows, WIDTH=width, COLUMNS=launch.columns, ROWS=launch.rows, CENTRED=centred,
            ACCUMULATE=accumulator(total.dtype), num_warps=launch.warps,
        )  # fmt: skip
    sum_bias = weight.new_empty(0) if grad_bias is None else grad_bias.sum(0).to(weight.dtype)
    return grad_x, grad_weight.sum(0).to(weight.dtype), sum_bias


@norm_backward_op.register_fake
def fake_norm_backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the right shape, not computed."""
    bias = weight.new_empty(weight.shape if has_bias else 0)
    return total.new_empty(total.shape), weight.new_empty(weight.shape), bias


def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps the residual stream and two numbers a row."""
    x, weight, bias, residual, centred, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.has_bias, ctx.centred = bias is not None, centred
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple:
    """Gradients in the operator's argument order."""
    total, weight, mean, rstd = ctx.saved_tensors
    dtype, residual_dtype = ctx.dtypes
    grad_out = torch.zeros_like(total) if grad_out is None else grad_out.contiguous()
    if grad_total is not None:
        grad_total = None if residual_dtype is None else grad_total.contiguous()
    grad_x, grad_weight, grad_bias = norm_backward_op(
        grad_out, grad_total, total, weight, mean, rstd, ctx.has_bias, ctx.centred
    )
    return (
        grad_x.to(dtype),
        grad_weight,
        grad_bias if ctx.has_bias else None,
        None if residual_dtype is None else grad_x.to(residual_dtype),
        None,
        None,
    )


differentiable_norm = differentiable(norm_op, backward, save_for_backward)


def norm(
    x: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    *,
    kind: str,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), in x's shape and the wider dtype of x and residual."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    added = None
    if residual is not None:
        added = residual.reshape(rows.shape).contiguous()
    weight, bias = weight_D.contiguous(), None if bias_D is None else bias_D.contiguous()
    out, total, _, _ = differentiable_norm(rows, weight, bias, added, kind == "layernorm", eps)
    return out.view(x.shape), x if residual is None else total.view(x.shape)
