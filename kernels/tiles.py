"""What kernels of every op share: a [rows, columns] tile of a strided tensor, read and written.

A `View` is a tensor's pointer with its strides, so that no caller has to make a copy that is
contiguous. Offsets between rows of one tile are 32 bits wide; the way to its first row, which may
pass 2^31, is taken in 64.

Shapes: B batch, T rows of one head, H heads, K head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A [B, T, H, K] tensor of any strides."""

    pointer: Any
    stride_b: int
    stride_t: int
    stride_h: int
    stride_k: int


@triton.jit
def head_pointer(view, batch, head):
    """Where one head's [T, K] matrix begins."""
    # The head first: the other way round the dense bias's gradient, which walks along the heads,
    # spills on sm_80.
    row = view.pointer + tl.cast(head, tl.int64) * view.stride_h
    return row + tl.cast(batch, tl.int64) * view.stride_b


@triton.jit
def tile_pointers(view, base, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] to rows first, first + 1, …; the long way is taken in 64 bits."""
    base += tl.cast(first, tl.int64) * view.stride_t
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return base + row * view.stride_t + column * view.stride_k


@triton.jit
def load_tile(
    view,
    base,
    first,
    n_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """[ROWS, COLUMNS] of one head, zero outside; rows are compared with n_rows only if CHECKED."""
    pointers = tile_pointers(view, base, first, ROWS, COLUMNS)
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    # A tile that sticks out of the row, or out of the mask; others load without a comparison.
    if CHECKED:
        inside = (row < n_rows) & (column < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)
    elif WIDTH != COLUMNS:
        return tl.load(pointers, mask=column < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(
    view,
    base,
    tile,
    first,
    n_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the part of [ROWS, COLUMNS] that lies inside the matrix."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    pointers = tile_pointers(view, base, first, ROWS, COLUMNS)
    inside = (row < n_rows) & (column < WIDTH)
    tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """tanh, which Triton offers only through a library that the interpreter lacks."""
    return 2 * tl.sigmoid(2 * x) - 1
