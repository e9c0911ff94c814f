"""x x^T, of which only the lower triangle of tiles is computed and written twice.

A third to a half of the arithmetic of Muon's Newton-Schulz iteration (Jordan et al. 2024). The
product is symmetric: of n x n tiles n (n + 1) / 2 are computed, which is all of one tile, three
quarters of two tiles a side, and towards half of many.

Shapes: B matrices, M rows, N columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanolm.kernels.launch import accumulator, device_guard, product_launch
from nanolm.kernels.operators import differentiable, register_autocast


@triton.jit
def symmetric_product_kernel(
    x, out, n_rows, n_columns, stride_matrix, stride_row, stride_column,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program: tile (i, j) with i >= j of one matrix, and its mirror image."""
    n_tiles = tl.cdiv(n_rows, M)
    i = tl.program_id(0) // n_tiles % n_tiles
    j = tl.program_id(0) % n_tiles
    # The upper triangle is the lower one's mirror image: its programs leave at once.
    if i < j:
        return
    matrix = tl.cast(tl.program_id(0) // (n_tiles * n_tiles), tl.int64)
    base = x + matrix * stride_matrix
    row = i * M + tl.arange(0, M)
    column = j * M + tl.arange(0, M)
    total = tl.zeros([M, M], ACCUMULATE)
    # Along the columns in steps of K: both tiles of a step fit into shared memory, and the next
    # step's are loaded while this one is multiplied.
    for start in range(0, n_columns, K):
        k = start + tl.arange(0, K)[None, :]
        along = tl.cast(k, tl.int64) * stride_column
        left = base + tl.cast(row, tl.int64)[:, None] * stride_row + along
        right = base + tl.cast(column, tl.int64)[:, None] * stride_row + along
        a = tl.load(left, mask=(row[:, None] < n_rows) & (k < n_columns), other=0.0)
        b = tl.load(right, mask=(column[:, None] < n_rows) & (k < n_columns), other=0.0)
        total += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    result = total.to(out.dtype.element_ty)
    out += matrix * n_rows * n_rows
    inside = (row[:, None] < n_rows) & (column[None, :] < n_rows)
    tl.store(out + tl.cast(row, tl.int64)[:, None] * n_rows + column[None, :], result, mask=inside)
    if i > j:
        mirror = out + tl.cast(column, tl.int64)[:, None] * n_rows + row[None, :]
        tl.store(
            mirror, tl.trans(result), mask=(column[:, None] < n_rows) & (row[None, :] < n_rows)
        )


@torch.library.custom_op("nanolm::symmetric_product", mutates_args=())
def symmetric_product_op(x: Tensor, precision: str) -> Tensor:
    """[B, M, N], any strides -> [B, M, M]."""
    out = fake_symmetric_product(x, precision)
    n_matrices, n_rows, n_columns = x.shape
    launch = product_launch(x.device, x.dtype)
    n_programs = n_matrices * triton.cdiv(n_rows, launch.m) ** 2
    if n_programs > 0:
        with device_guard(x):
            symmetric_product_kernel[(n_programs,)](
                x, out, n_rows, n_columns, *x.stride(),
                PRECISION=precision if x.dtype == torch.float32 else "ieee",
                ACCUMULATE=accumulator(x.dtype), M=launch.m, K=launch.n, **launch.options(),
            )  # fmt: skip
    return out


@symmetric_product_op.register_fake
def fake_symmetric_product(x: Tensor, precision: str) -> Tensor:
    """The product, not computed."""
    return x.new_empty((x.shape[0], x.shape[1], x.shape[1]))


def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
    """(G + G^T) x."""
    (x,) = ctx.saved_tensors
    return (grad_out + grad_out.mT) @ x, None


def save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps the matrices."""
    ctx.save_for_backward(inputs[0])


register_autocast("nanolm::symmetric_product", 1)
differentiable_product = differentiable(symmetric_product_op, backward, save_for_backward, 1)


@register_flop_formula(torch.ops.nanolm.symmetric_product)
def product_flops(x_shape: Any, *_: Any, **__: Any) -> int:
    """Those of the plain product: a formula counts what is asked for, not what is saved."""
    n_matrices, n_rows, n_columns = x_shape
    return 2 * n_matrices * n_rows**2 * n_columns


def symmetric_product(x_MN: Tensor, precision: str = "ieee") -> Tensor:
    """[..., M, N] -> [..., M, M]; `precision`, of float32 products, is "ieee" or "tf32x3"."""
    n_rows = x_MN.shape[-2]
    out = differentiable_product(x_MN.reshape(-1, *x_MN.shape[-2:]), precision)
    return out.view(*x_MN.shape[:-2], n_rows, n_rows)
