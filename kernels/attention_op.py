"""Attention as a PyTorch operator: the kernels behind `torch.ops.nanolm.attention`.

`attention` is what ops_triton.TritonAttention.run calls. It turns a Mask and a Bias into flat
tensors, the only thing an operator may take, and these into the kernels' named tuples. As an
operator it can be compiled, checkpointed, exported and counted by FlopCounterMode.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanolm.bias import AlibiBias, Bias, BucketBias
from nanolm.kernels import attention_tiles as tiles
from nanolm.kernels.attention import attention_forward_kernel
from nanolm.kernels.attention_backward import (
    attention_delta_kernel,
    attention_key_value_kernel,
    attention_query_kernel,
)
from nanolm.kernels.attention_bias import attention_bucket_bias_kernel, attention_dense_bias_kernel
from nanolm.kernels.launch import (
    accumulator,
    attention_launch,
    columns_of,
    device_guard,
    wide_dtype,
)
from nanolm.masks import Mask

LOG2E = 1 / math.log(2)


class Options(NamedTuple):
    """The operator's scalars, in its order."""

    bias_kind: str
    causal: bool
    strict: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout: float


class Tensors(NamedTuple):
    """The operator's optional tensors, in its order; masks as in `nanolm.masks`, rows contiguous.

    bias     slopes [H], or table [buckets, H], or values [B or 1, H or 1, T, S]
    buckets  int32 [T + S - 1]: the bucket of each distance, 1 - T first
    seed     int64 [1], for dropout
    """

    bias: Tensor | None
    buckets: Tensor | None
    key_lengths: Tensor | None
    documents: Tensor | None
    key_documents: Tensor | None
    prefix_lengths: Tensor | None
    order: Tensor | None
    key_order: Tensor | None
    seed: Tensor | None


def view(x_BTHK: Tensor) -> tiles.View:
    """A tensor as the kernels see it, copied only if a tile's offsets would need 64 bits."""
    steps = zip(x_BTHK.shape[1:], x_BTHK.stride()[1:], strict=True)
    if any(length > 1 and stride * 256 >= 2**31 for length, stride in steps):
        x_BTHK = x_BTHK.contiguous()
    return tiles.View(x_BTHK, *x_BTHK.stride())


def kernel_bias(bias_kind: str, tensors: Tensors, n_distances: int) -> tiles.Bias:
    """The bias as the kernels read it; a T5 table is spread out by distance first."""
    bias = tensors.bias
    if bias_kind == "none":
        return tiles.Bias(None, None, None, None, None)
    if bias_kind == "dense":
        strides = [0 if n == 1 else d for n, d in zip(bias.shape, bias.stride(), strict=True)]
        return tiles.Bias(bias, *strides)
    if bias_kind == "bucket":
        bias = bias[tensors.buckets[:n_distances].long()].t()
    return tiles.Bias(bias.contiguous(), None, None, None, None)


class Call:
    """One call's arguments, converted once and passed to several kernels."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tensors: Tensors, options: Options) -> None:
        self.n_rows, self.n_queries, self.n_heads, self.width = q.shape
        self.n_keys, self.n_groups = k.shape[1:3]
        self.dtype, self.device = q.dtype, q.device
        self.columns = columns_of(self.width)
        self.shape = tiles.Shape(self.n_queries, self.n_keys, self.n_heads)
        self.masks = tiles.Masks(
            options.window,
            tensors.key_lengths,
            tensors.documents,
            tensors.key_documents,
            tensors.prefix_lengths,
            tensors.order,
            tensors.key_order,
        )
        n_distances = self.n_queries + self.n_keys - 1
        self.bias = kernel_bias(options.bias_kind, tensors, n_distances)
        softcap = options.softcap or 1.0
        self.scores = tiles.Scores(options.scale * LOG2E, softcap * LOG2E, options.scale / softcap)
        self.dropout = (
            tiles.Dropout(None, None, None)
            if tensors.seed is None
            else tiles.Dropout(
                tensors.seed, int(options.dropout * 2**31), 1 / (1 - options.dropout)
            )
        )
        self.constants = {
            "GROUP": self.n_heads // self.n_groups,
            "WIDTH": self.width,
            "COLUMNS": self.columns,
            "CAUSAL": options.causal,
            "STRICT": options.strict,
            "BIAS": options.bias_kind,
            "SOFTCAP": options.softcap is not None,
            "PRECISION": "ieee",  # the default, TF32, keeps 10 of float32's 23 bits
            "ACCUMULATE": accumulator(q.dtype),
        }

    def launch(self, kind: str) -> Any:
        """Tile sizes of one kernel."""
        return attention_launch(kind, self.device, self.columns, self.dtype)

    @property
    def arguments(self) -> tuple:
        """What every kernel takes after its tensors."""
        return self.shape, self.masks, self.bias, self.scores, self.dropout


@torch.library.custom_op("nanolm::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    buckets: Tensor | None,
    key_lengths: Tensor | None,
    documents: Tensor | None,
    key_documents: Tensor | None,
    prefix_lengths: Tensor | None,
    order: Tensor | None,
    key_order: Tensor | None,
    seed: Tensor | None,
    bias_kind: str,
    causal: bool,
    strict: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T]); Tensors and Options describe the arguments."""
    tensors = Tensors(
        bias, buckets, key_lengths, documents, key_documents, prefix_lengths, order, key_order, seed
    )
    options = Options(bias_kind, causal, strict, window, scale, softcap, dropout)
    call = Call(q, k, v, tensors, options)
    out, lse = fake_attention(q, k, v)
    launch = call.launch("forward")
    n_programs = triton.cdiv(call.n_queries, launch.m) * call.n_rows * call.n_heads
    if n_programs > 0:
        with device_guard(q):
            attention_forward_kernel[(n_programs,)](
                view(q), view(k), view(v), view(out), lse, *call.arguments,
                **call.constants, M=launch.m, N=launch.n, **launch.options(),
            )  # fmt: skip
    return out, lse


@attention_op.register_fake
def fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the right shape, not computed."""
    n_rows, n_queries, n_heads, _ = q.shape
    lse = q.new_empty((n_rows, n_heads, n_queries), dtype=wide_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("nanolm::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    buckets: Tensor | None,
    key_lengths: Tensor | None,
    documents: Tensor | None,
    key_documents: Tensor | None,
    prefix_lengths: Tensor | None,
    order: Tensor | None,
    key_order: Tensor | None,
    seed: Tensor | None,
    bias_kind: str,
    causal: bool,
    strict: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty unless needs_bias)."""
    tensors = Tensors(
        bias, buckets, key_lengths, documents, key_documents, prefix_lengths, order, key_order, seed
    )
    options = Options(bias_kind, causal, strict, window, scale, softcap, dropout)
    call = Call(q, k, v, tensors, options)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if grad_q.numel() == 0 or grad_k.numel() == 0:
        grads = (x.zero_() for x in (grad_q, grad_k, grad_v))
        return *grads, q.new_zeros(bias.shape if needs_bias else 0)
    with device_guard(q):
        delta = launch_delta(call, out, grad_out, grad_lse)
        inputs = (view(q), view(k), view(v), view(grad_out), lse, delta)
        launch = call.launch("key_value")
        n_programs = triton.cdiv(call.n_keys, launch.n) * call.n_rows * call.n_groups
        attention_key_value_kernel[(n_programs,)](
            *inputs, view(grad_k), view(grad_v), *call.arguments, scale,
            **call.constants, M=launch.m, N=launch.n, **launch.options(),
        )  # fmt: skip
        launch = call.launch("query")
        n_programs = triton.cdiv(call.n_queries, launch.m) * call.n_rows * call.n_heads
        attention_query_kernel[(n_programs,)](
            *inputs, view(grad_q), *call.arguments, scale,
            **call.constants, M=launch.m, N=launch.n, **launch.options(),
        )  # fmt: skip
        grad_bias = launch_bias(call, inputs, tensors) if needs_bias else q.new_empty(0)
    return grad_q, grad_k, grad_v, grad_bias


def launch_delta(call: Call, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """delta [B, H, T]: dO . out - d lse."""
    delta = out.new_empty((call.n_rows, call.n_heads, call.n_queries), dtype=wide_dtype(out.dtype))
    n_programs = triton.cdiv(call.n_queries, 32) * call.n_rows * call.n_heads
    attention_delta_kernel[(n_programs,)](
        view(out), view(grad_out), None if grad_lse is None else grad_lse.contiguous(), delta,
        call.shape, WIDTH=call.width, COLUMNS=call.columns,
        ACCUMULATE=call.constants["ACCUMULATE"], M=32,
    )  # fmt: skip
    return delta


def launch_bias(call: Call, inputs: tuple, tensors: Tensors) -> Tensor:
    """The gradient of a dense or bucket bias, in its shape and dtype."""
    launch, bias = call.launch("bias"), tensors.bias
    delta = inputs[-1]
    if call.constants["BIAS"] == "dense":
        grad = torch.empty_like(bias, dtype=delta.dtype, memory_format=torch.contiguous_format)
        n_own = bias.shape[0] * bias.shape[1]
        n_tiles = triton.cdiv(call.n_queries, launch.m) * triton.cdiv(call.n_keys, launch.n)
        attention_dense_bias_kernel[(n_tiles * n_own,)](
            *inputs, grad, *call.arguments, call.n_rows, bias.shape[0], bias.shape[1],
            **call.constants, M=launch.m, N=launch.n, **launch.options(),
        )  # fmt: skip
        return grad.to(bias.dtype)
    side = min(launch.m, launch.n)
    n_diagonals = triton.cdiv(call.n_queries, side) + triton.cdiv(call.n_keys, side) - 1
    n_buckets = bias.shape[0]
    grad = delta.new_empty((n_diagonals, call.n_rows, call.n_heads, n_buckets))
    attention_bucket_bias_kernel[(n_diagonals * call.n_rows * call.n_heads,)](
        *inputs, tensors.buckets, grad, *call.arguments, n_buckets,
        **call.constants, M=side, **launch.options(),
    )  # fmt: skip
    return grad.sum(dim=(0, 1)).t().to(bias.dtype).contiguous()


@attention_backward_op.register_fake
def fake_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the right shape, not computed."""
    bias, needs_bias = rest[2], rest[-1]
    grad_bias = bias.new_empty(bias.shape) if needs_bias else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keeps inputs, out and lse: O(T K) memory, no weights."""
    n_tensors = 3 + len(Tensors._fields)
    ctx.save_for_backward(*inputs[:n_tensors], *output)
    ctx.options = inputs[n_tensors:]
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    """Gradients in the operator's argument order."""
    q, k, v, *tensors, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_bias = ctx.needs_input_grad[3]
    grad_q, grad_k, grad_v, grad_bias = attention_backward_op(
        grad_out, grad_lse, q, k, v, out, lse, *tensors, *ctx.options, needs_bias
    )
    n_rest = len(Tensors._fields) - 1 + len(Options._fields)
    return grad_q, grad_k, grad_v, grad_bias if needs_bias else None, *[None] * n_rest


attention_op.register_autograd(backward, setup_context=save_for_backward)


@register_flop_formula(torch.ops.nanolm.attention)
def forward_flops(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    """Two products of [T, K] by [K, S] a head; masks do not lessen it, as in PyTorch's formulas."""
    n_rows, n_queries, n_heads, width = q_shape
    return 4 * n_rows * n_heads * n_queries * k_shape[1] * width


@register_flop_formula(torch.ops.nanolm.attention_backward)
def backward_flops(
    grad_shape: Any, lse_shape: Any, q_shape: Any, k_shape: Any, *_: Any, **__: Any
) -> int:
    """Five products where the forward pass has two, as PyTorch counts its own flash backward."""
    return forward_flops(q_shape, k_shape) * 5 // 2


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
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T]) by the Triton kernels; both are differentiable.

    `seed`, int64 [1], keys dropout; without it one is drawn from torch's generator, so that
    torch.manual_seed and activation checkpointing have their usual effect.
    Raises ValueError for inputs that do not fit together.
    """
    check(q_BTHK, k_BSGK, v_BSGK)
    tensors, kind = flatten(q_BTHK, k_BSGK, mask, bias)
    if dropout > 0 and seed is None:
        seed = torch.randint(2**62, (1,), device=q_BTHK.device)
    options = Options(kind, mask.causal, mask.strict, mask.window, scale, softcap, dropout)
    tensors = tensors._replace(seed=seed if dropout > 0 else None)
    return attention_op(q_BTHK, k_BSGK, v_BSGK, *tensors, *options)


def check(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> None:
    """Raises ValueError for shapes or dtypes that do not fit together."""
    if not q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype:
        raise ValueError(
            f"queries are {q_BTHK.dtype}, keys {k_BSGK.dtype}, values {v_BSGK.dtype}: they must "
            f"have one dtype"
        )
    if k_BSGK.shape != v_BSGK.shape:
        raise ValueError(f"keys {tuple(k_BSGK.shape)} and values {tuple(v_BSGK.shape)} differ")
    if (q_BTHK.shape[0], q_BTHK.shape[3]) != (k_BSGK.shape[0], k_BSGK.shape[3]):
        raise ValueError(f"queries {tuple(q_BTHK.shape)} do not fit keys {tuple(k_BSGK.shape)}")
    if q_BTHK.shape[2] % k_BSGK.shape[2] != 0:
        raise ValueError(f"{k_BSGK.shape[2]} key heads do not divide {q_BTHK.shape[2]} query heads")


def flatten(q_BTHK: Tensor, k_BSGK: Tensor, mask: Mask, bias: Bias | None) -> tuple[Tensors, str]:
    """A mask and a bias as flat tensors without a seed, and the bias's kind."""
    n_rows, n_queries = q_BTHK.shape[:2]
    n_keys = k_BSGK.shape[1]

    def rows(x: Tensor | None, *shape: int) -> Tensor | None:
        return None if x is None else x.expand(n_rows, *shape).contiguous()

    values, buckets, kind = None, None, "none"
    if isinstance(bias, AlibiBias):
        values, kind = bias.slopes_H, "alibi"
        if values.requires_grad:
            raise ValueError("the Triton kernel takes ALiBi slopes as constants, not as parameters")
    elif isinstance(bias, BucketBias):
        values, kind = bias.table_NH, "bucket"
        distance = torch.arange(1 - n_queries, n_keys, device=q_BTHK.device)
        buckets = bias.buckets(distance).int()
    elif bias is not None:
        values, kind = bias.dense(n_queries, n_keys), "dense"
        values = values.reshape([1] * (4 - values.ndim) + list(values.shape))
        values = values.expand(-1, -1, n_queries, n_keys)
    keys_documents = mask.documents if mask.key_documents is None else mask.key_documents
    keys_order = mask.order if mask.key_order is None else mask.key_order
    return Tensors(
        values,
        buckets,
        rows(mask.key_lengths),
        rows(mask.documents, n_queries),
        rows(keys_documents, n_keys) if mask.documents is not None else None,
        rows(mask.prefix_lengths) if mask.causal else None,
        rows(mask.order, n_queries),
        rows(keys_order, n_keys) if mask.order is not None else None,
        None,
    ), kind
