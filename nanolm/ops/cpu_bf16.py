"""bfloat16 on a CPU that cannot multiply it: the same numbers, multiplied as float32.

Without AVX512-BF16 or AMX a bfloat16 matrix product runs at a quarter of float32's speed (25
against 100 GFLOP/s on a core of a Cascade Lake). The product of two bfloat16 numbers is exact in
float32, and hardware that multiplies bfloat16 adds up in float32 too; so these kernels round their
inputs to bfloat16, multiply in float32, and round the result: what autocast means, at the speed of
float32. What is kept for the backward pass stays bfloat16.

They are chosen where precision is bf16, the device is a CPU and it lacks the instructions. The
matrix unit's order of summation aside, a model trains as it would on one that has them; gradients
of weights are kept in float32 instead of being rounded on their way.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.chunked_cross_entropy import ChunkedCrossEntropy
from nanolm.ops.contract import AttentionSpec, CrossEntropySpec, Spec, kernel
from nanolm.ops.pytorch import SdpaAttention
from nanolm.ops.reference import CrossEntropyOutput

BF16 = torch.bfloat16


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; asked of x86 only."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def why_not_wide(spec: Spec) -> str | None:
    """The reason that all kernels here share."""
    if spec.device != "cpu" or spec.dtype != BF16:
        return "it is for bf16 on a CPU"
    return "this CPU multiplies bf16 itself" if multiplies_bf16() else None


def autocasts() -> bool:
    """Whether products are to be taken in bfloat16 now."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == BF16


def rounded(x: Tensor) -> Tensor:
    """x as float32 with bfloat16's values."""
    return x.to(BF16).float()


class WideLinear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W; dW = dy^T x; db = sum of dy. x [..., I], W [O, I], b [O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        narrow = x.to(BF16)
        ctx.save_for_backward(narrow, weight_OI)
        ctx.dtype, ctx.has_bias = x.dtype, bias_O is not None
        bias = None if bias_O is None else rounded(bias_O)
        return F.linear(narrow.float(), rounded(weight_OI), bias).to(BF16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight_OI = ctx.saved_tensors
        grad_NO, needs = grad.float().flatten(0, -2), ctx.needs_input_grad
        grad_x = None
        if needs[0]:
            grad_x = (grad_NO @ rounded(weight_OI)).to(ctx.dtype).view(narrow.shape)
        grad_weight = grad_NO.mT @ narrow.float().flatten(0, -2) if needs[1] else None
        grad_bias = grad_NO.sum(dim=0) if ctx.has_bias and needs[2] else None
        return grad_x, grad_weight, grad_bias


@kernel("linear")
class WideLinearKernel:
    """Linear layers."""

    name = "wide"

    def why_not(self, spec: Spec) -> str | None:
        return why_not_wide(spec)

    def run(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """As the reference under autocast."""
        if not autocasts():
            return F.linear(x, weight_OI, bias_O)
        with torch.autocast("cpu", enabled=False):
            return WideLinear.apply(x, weight_OI, bias_O)


@kernel("attention")
class WideAttention(SdpaAttention):
    """Attention as sdpa, in float32: nothing between the two products is rounded to bfloat16."""

    name = "wide"

    def why_not(self, spec: AttentionSpec) -> str | None:
        return why_not_wide(spec) or super().why_not(spec)

    def run(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any, **rest: Any) -> Tensor:
        """As sdpa."""
        if not autocasts():
            return super().run(q_BTHK, k_BSGK, v_BSGK, mask, **rest)
        with torch.autocast("cpu", enabled=False):
            q, k, v = (rounded(x) for x in (q_BTHK, k_BSGK, v_BSGK))
            return super().run(q, k, v, mask, **rest).to(BF16)


@kernel("linear_cross_entropy")
class WideCrossEntropy(ChunkedCrossEntropy):
    """The chunked loss; its logits and their gradients are not rounded at all."""

    name = "wide"

    def why_not(self, spec: CrossEntropySpec) -> str | None:
        return why_not_wide(spec) or super().why_not(spec)

    def run(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        **rest: Any,
    ) -> CrossEntropyOutput:
        """As chunked."""
        if not autocasts():
            return super().run(hidden_ND, weight_VD, bias_V, targets_N, **rest)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias_V is None else rounded(bias_V)
            return super().run(rounded(hidden_ND), rounded(weight_VD), bias, targets_N, **rest)
