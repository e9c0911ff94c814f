"""Fast paths that need no kernel of ours: PyTorch's own fused functions.

These serve CPUs, and devices for which no Triton kernel is chosen.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanolm.ops.bias import AlibiBias, Bias
from nanolm.ops.contract import AttentionSpec, kernel
from nanolm.ops.masks import Mask


@kernel("attention")
class SdpaAttention:
    """torch.nn.functional.scaled_dot_product_attention, which fuses on CPU and CUDA."""

    name = "sdpa"
    varies_on = {"cuda": "torch's fused backward passes may add dQ in another order each time"}

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.softcap is not None:
            return "scaled_dot_product_attention has no soft-cap"
        return None

    def run(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        mask: Mask,
        *,
        bias: Bias | None = None,
        scale: float,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attention, [B, T, H, K]; a query that may see no key gives 0."""
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        n_queries, n_keys = q_BHTK.shape[2], k_BGSK.shape[2]
        grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
        kinds = mask.kinds()
        plain = bias is None and (not kinds or (kinds == {"causal"} and n_queries in (1, n_keys)))
        allowed = None if plain else self.scores_mask(mask, bias, n_queries, n_keys, q_BHTK)
        causal = plain and mask.causal
        if n_queries == 1:  # one query sees all keys; a branch, since under compile n is symbolic
            causal = False
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=allowed,
            is_causal=causal,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=grouped,
        )
        return out_BHTK.transpose(1, 2)

    def scores_mask(
        self, mask: Mask, bias: Bias | None, n_queries: int, n_keys: int, like: Tensor
    ) -> Tensor:
        """The mask, or mask and bias, as SDPA takes it: bool or float [B or 1, H or 1, T, S]."""
        allowed = mask.dense(n_queries, n_keys, like.device)
        if bias is None:
            return allowed
        values = bias.dense(n_queries, n_keys).masked_fill(~allowed, -torch.inf)
        if isinstance(bias, AlibiBias) and torch.finfo(like.dtype).bits < 32 and n_keys > 0:
            # 16 bits do not tell a distance of 600 from one of 601. A softmax does not see what
            # all keys of a query have in common, so the nearest visible one is given 0.
            top = values.detach().amax(dim=-1, keepdim=True)
            values = values - top.masked_fill(top == -torch.inf, 0.0)
        return values.to(like.dtype)


@kernel("attention")
class CudnnAttention(SdpaAttention):
    """scaled_dot_product_attention with cuDNN's kernel where torch can use it (NVIDIA Hopper).

    There it is the faster one for training shapes, on older and newer GPUs the slower. torch
    takes another of its kernels where cuDNN has none: for a bias, or a mask as numbers.
    """

    name = "sdpa_cudnn"
    ORDER = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.device != "cuda" or torch.version.hip is not None:
            return "cuDNN's attention is for NVIDIA GPUs"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"cuDNN's attention multiplies 16-bit numbers, and this is {spec.dtype}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            return f"cuDNN's attention pays on Hopper only, not on {torch.cuda.get_device_name()}"
        return super().why_not(spec)

    def run(self, *args: Any, **options: Any) -> Tensor:
        """As sdpa."""
        with sdpa_kernel(list(self.ORDER), set_priority=True):
            return super().run(*args, **options)


@kernel("norm")
class TorchNorm:
    """torch's fused layer_norm and rms_norm."""

    name = "torch"

    def why_not(self, spec: Any) -> str | None:
        return None

    def run(
        self,
        x: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None,
        *,
        kind: str,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), both in the dtype of the sum."""
        total = x if residual is None else x + residual
        # torch takes no parameters that are narrower than x, and rounds the gradients of wider
        # ones; under autocast it gives float32 whatever x is.
        wide = torch.promote_types(total.dtype, weight_D.dtype)
        if total.device.type == "cpu":  # there it adds up 16-bit gradients of a weight in 16 bits
            wide = torch.promote_types(wide, torch.float32)
        weight, bias = weight_D.to(wide), None if bias_D is None else bias_D.to(wide)
        if kind == "layernorm":
            out = F.layer_norm(total.to(wide), weight.shape, weight, bias, eps)
        else:
            out = F.rms_norm(total, weight.shape, weight, eps)
            out = out if bias is None else out + bias
        return out.to(total.dtype), total
