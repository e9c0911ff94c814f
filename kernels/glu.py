"""SwiGLU and GeGLU: act(gate) * up in one pass, with the gradient in one pass.

    silu(g) = g s(g)                 silu'(g) = s(g) (1 + g (1 - s(g))),     s = sigmoid
    gelu(g) = g Phi(g)               gelu'(g) = Phi(g) + g phi(g),           Phi = normal CDF

Nothing is kept but the input: the backward pass computes the activation again, which costs less
than reading it (Shazeer 2020 for the layer).

Shapes: N rows, F feed-forward width; the input is [N, 2F], the gate first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanolm.kernels.launch import accumulator, device_guard
from nanolm.kernels.operators import differentiable

INV_SQRT2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
BLOCK = 1024


@triton.jit
def activation(gate, KIND: tl.constexpr):
    """(act(gate), act'(gate))."""
    if KIND == "swiglu":
        sigmoid = tl.sigmoid(gate)
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        cdf = 0.5 * (1 + tl.erf(gate * INV_SQRT2))
        return gate * cdf, cdf + gate * INV_SQRT_2PI * tl.exp(-0.5 * gate * gate)


@triton.jit
def glu_forward_kernel(
    gate_up, out, width,
    KIND: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK features of one row."""
    n_blocks = tl.cdiv(width, BLOCK)
    row = tl.cast(tl.program_id(0) // n_blocks, tl.int64)
    column = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(ACCUMULATE)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0)
    value, _ = activation(gate, KIND)
    result = value * up.to(ACCUMULATE)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward_kernel(
    gate_up, grad_out, grad, width,
    KIND: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK features of one row, both halves of their gradient."""
    n_blocks = tl.cdiv(width, BLOCK)
    row = tl.cast(tl.program_id(0) // n_blocks, tl.int64)
    column = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(ACCUMULATE)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(ACCUMULATE)
    given = tl.load(grad_out + row * width + column, mask=inside, other=0.0).to(ACCUMULATE)
    # Computed again from the input: the layer is bound by memory, and an exponential is cheaper
    # than reading a kept tensor.
    value, slope = activation(gate, KIND)
    tl.store(grad + at, (given * up * slope).to(grad.dtype.element_ty), mask=inside)
    tl.store(grad + at + width, (given * value).to(grad.dtype.element_ty), mask=inside)


def launch(kernel: Any, n_rows: int, width: int, dtype: torch.dtype, kind: str, *args: Any) -> None:
    """Starts one program per row and block of features."""
    block = min(BLOCK, triton.next_power_of_2(width))
    n_programs = n_rows * triton.cdiv(width, block)
    if n_programs > 0:
        with device_guard(args[0]):
            kernel[(n_programs,)](
                *args, width, KIND=kind, ACCUMULATE=accumulator(dtype), BLOCK=block
            )


@torch.library.custom_op("nanolm::glu", mutates_args=())
def glu_op(gate_up: Tensor, kind: str) -> Tensor:
    """[N, 2F], contiguous -> [N, F]."""
    out = fake_glu(gate_up, kind)
    launch(glu_forward_kernel, *out.shape, gate_up.dtype, kind, gate_up, out)
    return out


@glu_op.register_fake
def fake_glu(gate_up: Tensor, kind: str) -> Tensor:
    """The output, not computed."""
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.custom_op("nanolm::glu_backward", mutates_args=())
def glu_backward_op(gate_up: Tensor, grad_out: Tensor, kind: str) -> Tensor:
    """The gradient of gate_up."""
    grad = gate_up.new_empty(gate_up.shape)
    launch(glu_backward_kernel, *grad_out.shape, gate_up.dtype, kind, gate_up, grad_out, grad)
    return grad


@glu_backward_op.register_fake
def fake_glu_backward(gate_up: Tensor, grad_out: Tensor, kind: str) -> Tensor:
    """The gradient, not computed."""
    return gate_up.new_empty(gate_up.shape)


def save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps the input only."""
    ctx.save_for_backward(inputs[0])
    ctx.kind = inputs[1]


def backward(ctx: Any, grad_out: Tensor) -> tuple:
    """The gradient of gate_up."""
    return glu_backward_op(ctx.saved_tensors[0], grad_out.contiguous(), ctx.kind), None


differentiable_glu = differentiable(glu_op, backward, save_for_backward)


def glu(gate_up: Tensor, *, kind: str) -> Tensor:
    """[..., 2F] -> [..., F]; the gate is the first half."""
    rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    return differentiable_glu(rows, kind).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
