"""Attention as a PyTorch operator: the kernels behind `torch.ops.nanolm.attention`.

`attention` is what TritonAttention.run (kernels/candidates.py) calls. As an operator it can be
compiled, checkpointed, exported, autocast and counted by FlopCounterMode. Its arguments are
described in attention/call.py.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanolm.kernels.attention.backward import (
    attention_delta_kernel,
    attention_key_value_kernel,
    attention_query_kernel,
)
from nanolm.kernels.attention.bias_gradient import (
    attention_bucket_bias_kernel,
    attention_dense_bias_kernel,
)
from nanolm.kernels.attention.call import (
    SCHEMA,
    Call,
    Options,
    Tensors,
    empty_outputs,
    flatten,
    product_flops,
    view,
)
from nanolm.kernels.attention.forward import attention_forward_kernel
from nanolm.kernels.launch import device_guard, wide_dtype
from nanolm.kernels.operators import differentiable, register_autocast
from nanolm.ops.bias import Bias
from nanolm.ops.masks import Mask


@torch.library.custom_op(
    "nanolm::attention", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
def attention_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T])."""
    call = Call(q, k, v, *rest)
    out, lse = empty_outputs(q)
    tile = call.tile("forward")
    n_programs = triton.cdiv(call.n_queries, tile.m) * call.n_rows * call.n_heads
    call.start(
        attention_forward_kernel, n_programs,
        *call.inputs, view(out), lse, *call.problem, **tile.tiled(),
    )  # fmt: skip
    return out, lse


attention_op.register_fake(empty_outputs)
register_autocast("nanolm::attention", 3)


@torch.library.custom_op(
    "nanolm::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool needs_bias, "
        f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs_bias: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty unless needs_bias)."""
    call = Call(q, k, v, *rest)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if grad_q.numel() == 0 or grad_k.numel() == 0:
        grad_q, grad_k, grad_v = (x.zero_() for x in (grad_q, grad_k, grad_v))
        bias_shape = cast(Tensor, call.tensors.bias).shape if needs_bias else 0
        return grad_q, grad_k, grad_v, q.new_zeros(bias_shape)
    inputs = (*call.inputs, view(grad_out), lse, launch_delta(call, out, grad_out, grad_lse))
    tile = call.tile("key_value")
    call.start(
        attention_key_value_kernel, triton.cdiv(call.n_keys, tile.n) * call.n_rows * call.n_groups,
        *inputs, view(grad_k), view(grad_v), *call.problem, call.options.scale, **tile.tiled(),
    )  # fmt: skip
    tile = call.tile("query")
    call.start(
        attention_query_kernel, triton.cdiv(call.n_queries, tile.m) * call.n_rows * call.n_heads,
        *inputs, view(grad_q), *call.problem, call.options.scale, **tile.tiled(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v, launch_bias(call, inputs) if needs_bias else q.new_empty(0)


def launch_delta(call: Call, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """delta [B, H, T]: dO . out - d lse."""
    delta = out.new_empty((call.n_rows, call.n_heads, call.n_queries), dtype=wide_dtype(out.dtype))
    n_programs = triton.cdiv(call.n_queries, 32) * call.n_rows * call.n_heads
    with device_guard(out):
        attention_delta_kernel[(n_programs,)](
            view(out), view(grad_out), None if grad_lse is None else grad_lse.contiguous(), delta,
            call.shape, WIDTH=call.width, COLUMNS=call.columns,
            ACCUMULATE=call.constants["ACCUMULATE"], M=32,
        )  # fmt: skip
    return delta


def launch_bias(call: Call, inputs: tuple) -> Tensor:
    """The gradient of a dense or bucket bias, in its shape and dtype."""
    tile, bias, delta = call.tile("bias"), cast(Tensor, call.tensors.bias), inputs[-1]
    if call.options.bias_kind == "dense":
        grad = torch.empty_like(bias, dtype=delta.dtype, memory_format=torch.contiguous_format)
        n_tiles = triton.cdiv(call.n_queries, tile.m) * triton.cdiv(call.n_keys, tile.n)
        call.start(
            attention_dense_bias_kernel, n_tiles * bias.shape[0] * bias.shape[1],
            *inputs, grad, *call.problem, call.n_rows, *bias.shape[:2], **tile.tiled(),
        )  # fmt: skip
        return grad.to(bias.dtype)
    side = min(tile.m, tile.n)
    n_diagonals = triton.cdiv(call.n_queries, side) + triton.cdiv(call.n_keys, side) - 1
    n_buckets = bias.shape[0]
    grad = delta.new_empty((n_diagonals, call.n_rows, call.n_heads, n_buckets))
    call.start(
        attention_bucket_bias_kernel, n_diagonals * call.n_rows * call.n_heads,
        *inputs, call.tensors.buckets, grad, *call.problem, n_buckets, M=side, **tile.options(),
    )  # fmt: skip
    return grad.sum(dim=(0, 1)).t().to(bias.dtype).contiguous()


@attention_backward_op.register_fake
def empty_gradients(
    grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, needs_bias: bool,
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the right shape, not computed."""
    grad_bias = q.new_empty(0)
    if needs_bias and bias is not None:
        grad_bias = bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keeps inputs, out and lse: O(T K) memory, no weights."""
    n_tensors = 3 + len(Tensors._fields)
    ctx.save_for_backward(*inputs[:n_tensors], *output)
    ctx.options = inputs[n_tensors:]
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    """Gradients in the operator's argument order."""
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_bias = ctx.needs_input_grad[3]
    grad_q, grad_k, grad_v, grad_bias = attention_backward_op(
        grad_out, grad_lse, out, lse, needs_bias, *inputs, *ctx.options
    )
    n_rest = len(Tensors._fields) - 1 + len(Options._fields)
    return grad_q, grad_k, grad_v, grad_bias if needs_bias else None, *[None] * n_rest


differentiable_attention = differentiable(attention_op, backward, save_for_backward, 3)


@register_flop_formula(torch.ops.nanolm.attention)
def forward_flops(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    """Two products a head."""
    return product_flops(q_shape, k_shape)


@register_flop_formula(torch.ops.nanolm.attention_backward)
def backward_flops(*shapes: Any, **_: Any) -> int:
    """Five products where the forward pass has two, as PyTorch counts its own flash backward."""
    return product_flops(*shapes[5:7]) * 5 // 2


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T]) by the Triton kernels; both are differentiable.

    `seed`, int64 [1], keys dropout; without it one is drawn from torch's generator, so that
    torch.manual_seed and activation checkpointing have their usual effect. `precision`, of float32
    products, is "ieee" or "tf32x3". Raises ValueError for inputs that do not fit together.
    """
    if dropout > 0 and seed is None:
        seed = torch.randint(2**62, (1,), device=q_BTHK.device)
    return differentiable_attention(
        *flatten(
            q_BTHK, k_BSGK, v_BSGK, mask, bias, scale=scale, softcap=softcap, dropout=dropout,
            seed=seed if dropout > 0 else None, precision=precision,
        )
    )  # fmt: skip
