"""Vocabulary projection and cross-entropy, a chunk of tokens at a time.

    loss_n = (1 - e) (lse - z_t) + e mean_v(lse - z_v) + c lse^2,     z = softcap(h W^T + b)
    d loss_n / d z_v = p_v (1 + 2 c lse) - (1 - e) [v = t] - e / V,   p = exp(z - lse)

The products with W are PyTorch's. Between them one kernel reads each row of logits twice: once for
its maximum, sum of exponentials, target and argmax, once to overwrite it with its gradient, which
goes straight into the gradients of h and W (as in Liger kernel, Hsu et al. 2024). So the loss and
its gradient come from one pass over the chunks, only one chunk of logits ever exists, and the
backward pass merely multiplies by the scalar that arrives.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nanolm.kernels.launch import device_guard, wide_dtype
from nanolm.kernels.operators import differentiable, register_autocast
from nanolm.kernels.tiles import tanh

BLOCK = 4096  # logits that a program looks at at once
LOGITS = 2**26  # logits of a chunk, at most
TOKENS = 128  # tokens of a chunk are a multiple of these: of the rows of a product's tile
IGNORED = -100


@triton.jit
def load_logits(logits, column, n_columns, softcap, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """(capped logits, slope of the cap) of some columns, -inf outside."""
    z = tl.load(logits + column, mask=column < n_columns, other=float("-inf")).to(WIDE)
    slope = z  # not used
    if SOFTCAP:
        bent = tanh(z / softcap)
        slope = 1 - bent * bent
        z = tl.where(column < n_columns, bent * softcap, float("-inf"))
    return z, slope


@triton.jit
def cross_entropy_kernel(
    logits, targets, loss, nll, correct, lse, n_columns, stride, softcap, smoothing, z_loss,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of logits, replaced by the gradient of its loss if GRADIENT."""
    row = tl.program_id(0)
    logits += tl.cast(row, tl.int64) * stride
    smoothing = tl.full([], smoothing, WIDE)  # beside an integer a plain number is float32
    target = tl.load(targets + row)
    keep = target != -100
    wrong = keep & ((target < 0) | (target >= n_columns))
    m = tl.full([], float("-inf"), WIDE)
    l = tl.zeros([], WIDE)
    total = tl.zeros([], WIDE)
    chosen = tl.zeros([], WIDE)
    best = tl.full([], -1, tl.int32)
    # A row of logits (50,257 for GPT-2) is too long for a program's registers, so it is read twice.
    # First loop: maximum and sum together, the sum made smaller whenever the maximum grows, so that
    # neither needs a loop of its own.
    for start in range(0, n_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, _ = load_logits(logits, column, n_columns, softcap, SOFTCAP, WIDE)
        block_max = tl.max(z, axis=0)
        # Of equal logits the first, as torch.argmax has it.
        first = tl.min(tl.where(z == block_max, column, 2147483647), axis=0)
        best = tl.where(block_max > m, first, best)
        m_new = tl.maximum(m, block_max)
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), axis=0)
        m = m_new
        total += tl.sum(tl.where(column < n_columns, z, 0.0), axis=0)
        chosen += tl.sum(tl.where(column == target, z, 0.0), axis=0)
    row_lse = m + tl.log(l)
    row_nll = tl.where(wrong, float("nan"), row_lse - chosen)
    smooth = row_lse - total / n_columns
    row_loss = (1 - smoothing) * row_nll + smoothing * smooth + z_loss * row_lse * row_lse
    tl.store(loss + row, tl.where(keep, row_loss, 0.0))
    tl.store(nll + row, tl.where(keep, row_nll, 0.0))
    tl.store(lse + row, tl.where(keep, row_lse, 0.0))
    tl.store(correct + row, tl.where(keep & (best == target), 1.0, 0.0))
    if GRADIENT:
        # All threads must have read a logit before one of them overwrites it.
        tl.debug_barrier()
        # Second loop: the lse is known only at the end of the first. The gradient takes the place
        # of the logits, which nobody needs again.
        for start in range(0, n_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z, slope = load_logits(logits, column, n_columns, softcap, SOFTCAP, WIDE)
            grad = tl.exp(z - row_lse) * (1 + 2 * z_loss * row_lse) - smoothing / n_columns
            grad -= tl.where(column == target, 1 - smoothing, 0.0)
            if SOFTCAP:
                grad *= slope
            grad = tl.where(wrong, float("nan"), grad)
            grad = tl.where(keep, grad, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + column, grad, mask=column < n_columns)


def chunk_of(n_columns: int) -> int:
    """Tokens whose logits exist at a time."""
    return max(1, LOGITS // n_columns // TOKENS) * TOKENS


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32, or float64, also with 16-bit operands.

    On a GPU the product adds to `total` as it writes: no matrix of its size comes into being, and
    none is read and written again.
    """
    if not a.is_cuda:
        total += a.to(total.dtype) @ b.to(total.dtype)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@torch.library.custom_op("nanolm::linear_cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll, correct, lse, and the gradients that are needed, else empty tensors).

    Products are computed in hidden's dtype; weight and bias may have a wider one, in which their
    gradients are then returned unrounded.
    """
    narrow = weight.to(hidden.dtype)
    narrow_bias = None if bias is None else bias.to(hidden.dtype)
    needs = (needs_hidden, needs_weight, needs_bias)
    outputs = fake_cross_entropy(
        hidden, weight, bias, targets, softcap, label_smoothing, z_loss, *needs
    )
    _, nll, correct, lse, grad_hidden, grad_weight, grad_bias = outputs
    loss_N = torch.empty_like(nll)
    grad_weight.zero_()
    grad_bias.zero_()
    n_tokens, n_columns = hidden.shape[0], weight.shape[0]
    # Chunks bound the logits that exist at a time to LOGITS numbers; 2**26 of them keep the
    # products large enough for their full speed.
    chunk = chunk_of(n_columns)
    for start in range(0, n_tokens, chunk):
        part = slice(start, min(start + chunk, n_tokens))
        logits = F.linear(hidden[part], narrow, narrow_bias)
        with device_guard(hidden):
            cross_entropy_kernel[(logits.shape[0],)](
                logits, targets[part], loss_N[part], nll[part], correct[part], lse[part],
                n_columns, logits.stride(0), softcap or 1.0, label_smoothing, z_loss,
                SOFTCAP=softcap is not None, GRADIENT=any(needs),
                WIDE=tl.float64 if nll.dtype == torch.float64 else tl.float32,
                BLOCK=min(BLOCK, triton.next_power_of_2(n_columns)), num_warps=8,
            )  # fmt: skip
        if needs_hidden:
            torch.mm(logits, narrow, out=grad_hidden[part])
        if needs_weight:
            accumulate(grad_weight, logits.t(), hidden[part])
        if needs_bias:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
    return loss_N.sum(), nll, correct, lse, grad_hidden, grad_weight, grad_bias


@cross_entropy_op.register_fake
def fake_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the right shape, not computed; gradients of parameters in float32."""
    wide = wide_dtype(hidden.dtype)
    n_tokens = hidden.shape[0]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(n_tokens, dtype=wide),
        hidden.new_empty(n_tokens, dtype=torch.float32),
        hidden.new_empty(n_tokens, dtype=wide),
        hidden.new_empty(hidden.shape if needs_hidden else (0, 0)),
        weight.new_empty(weight.shape if needs_weight else (0, 0), dtype=wide),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=wide),
    )


def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps the gradients that the forward pass has taken."""
    hidden, weight, bias, *_ = inputs
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.needs = inputs[-3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    """The kept gradients times the loss's."""
    grads = [None, None, None]
    if grad_loss is not None:
        for index, grad in enumerate(ctx.saved_tensors):
            if ctx.needs[index]:
                grads[index] = (grad * grad_loss).to(ctx.dtypes[index])
    return *grads, *[None] * 7


register_autocast("nanolm::linear_cross_entropy", 1)
differentiable_cross_entropy = differentiable(cross_entropy_op, backward, save_for_backward, 1)


@register_flop_formula(torch.ops.nanolm.linear_cross_entropy)
def product_flops(hidden_shape: Any, weight_shape: Any, *rest: Any, **_: Any) -> int:
    """One product of [N, D] by [D, V] for the logits and one for each large gradient taken."""
    needs_hidden, needs_weight, _ = rest[-3:]
    n_tokens, width = hidden_shape
    return 2 * n_tokens * width * weight_shape[0] * (1 + needs_hidden + needs_weight)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll_N, correct_N, lse_N) as nanolm.ops.reference.CrossEntropyOutput."""
    grad = torch.is_grad_enabled()
    needs = [x is not None and x.requires_grad and grad for x in (hidden_ND, weight_VD, bias_V)]
    outputs = differentiable_cross_entropy(
        hidden_ND.contiguous(), weight_VD, bias_V, targets_N.contiguous(),
        softcap, label_smoothing, z_loss, *needs,
    )  # fmt: skip
    return outputs[:4]
