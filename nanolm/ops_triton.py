"""The Triton kernels as candidates: what they can serve, in words, without importing Triton.

`nanolm.kernels.*` holds the kernels themselves. They are imported when one of them first runs, so
that a machine without a GPU pays nothing for them; on a CPU they run only in Triton's interpreter
(TRITON_INTERPRET=1, set before anything imports triton), slowly, for tests, and only when named.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tokens,
D model width, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from nanolm.bias import Bias
from nanolm.masks import Mask
from nanolm.ops import AttentionSpec, GluSpec, NormSpec, Spec, kernel
from nanolm.ops_reference import AttentionOutput, CrossEntropyOutput

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TritonKernel:
    """What all Triton kernels have in common."""

    name = "triton"
    only_by_name_on = frozenset({"cpu"})

    def why_not(self, spec: Spec) -> str | None:
        """No Triton, no device for it, or a dtype without kernels."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if spec.device != "cuda" and not (spec.device == "cpu" and interpreted):
            return (
                f"it needs a CUDA or ROCm device, and this one is {spec.device} (on a CPU it runs "
                f"only in Triton's interpreter: TRITON_INTERPRET=1, for tests)"
            )
        if spec.dtype not in DTYPES:
            return f"it has no {spec.dtype} version"
        return self.why_not_shape(spec)

    def why_not_shape(self, spec: Any) -> str | None:
        """What of the op's own spec it cannot serve."""
        return None


@kernel("attention")
class TritonAttention(TritonKernel):
    """FlashAttention-2, forward and backward (kernels/attention.py)."""

    def why_not_shape(self, spec: AttentionSpec) -> str | None:
        """Heads wider than one tile."""
        if spec.head_dim > 256:
            return f"its heads are at most 256 wide, not {spec.head_dim}"
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
        return_lse: bool = False,
        seed: Tensor | None = None,
    ) -> Tensor | AttentionOutput:
        """Attention, [B, T, H, K]; `seed`, int64 [1], keys dropout (else torch's generator does).

        Under autocast in its dtype. (PyTorch's register_autocast fixes one dtype for ever, so the
        cast stands here.)
        """
        from nanolm.kernels.attention_op import attention  # noqa: PLC0415

        device = q_BTHK.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            q_BTHK, k_BSGK, v_BSGK = (x.to(dtype) for x in (q_BTHK, k_BSGK, v_BSGK))
        out_BTHK, lse_BHT = attention(
            q_BTHK, k_BSGK, v_BSGK, mask,
            bias=bias, scale=scale, softcap=softcap, dropout=dropout, seed=seed,
        )  # fmt: skip
        return AttentionOutput(out_BTHK, lse_BHT) if return_lse else out_BTHK


@kernel("attention")
class TritonDecodeAttention(TritonKernel):
    """One query, or a few, against a cache, split over programs (kernels/attention_decode.py)."""

    name = "triton_decode"

    def why_not_shape(self, spec: AttentionSpec) -> str | None:
        """Anything but decoding."""
        if spec.phase != "decode":
            return f"it only decodes, and this is {spec.phase}"
        if spec.head_dim > 256:
            return f"its heads are at most 256 wide, not {spec.head_dim}"
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
        return_lse: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attention without a gradient; raises ValueError when asked for dropout."""
        from nanolm.kernels.attention_decode import attention_decode  # noqa: PLC0415

        if dropout > 0:
            raise ValueError("triton_decode has no dropout: it serves decoding only")
        out_BTHK, lse_BHT = attention_decode(
            q_BTHK, k_BSGK, v_BSGK, mask, bias=bias, scale=scale, softcap=softcap
        )
        return AttentionOutput(out_BTHK, lse_BHT) if return_lse else out_BTHK


@kernel("linear_cross_entropy")
class TritonCrossEntropy(TritonKernel):
    """Chunks of logits, each replaced by its gradient in place (kernels/cross_entropy.py)."""

    def run(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        *,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropyOutput:
        """As the reference; under autocast in its dtype, with float32 gradients of W."""
        from nanolm.kernels.cross_entropy import linear_cross_entropy  # noqa: PLC0415

        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        with torch.autocast(device, enabled=False):
            return CrossEntropyOutput(
                *linear_cross_entropy(
                    hidden_ND, weight_VD, bias_V, targets_N,
                    softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
                )
            )  # fmt: skip


@kernel("norm")
class TritonNorm(TritonKernel):
    """LayerNorm and RMSNorm with the residual sum in the same pass (kernels/norm.py)."""

    def why_not_shape(self, spec: NormSpec) -> str | None:
        """Rows that no program could hold."""
        if spec.width > 16384:
            return f"its rows are at most 16384 wide, not {spec.width}"
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
        """(norm(x + residual), x + residual)."""
        from nanolm.kernels.norm import norm  # noqa: PLC0415

        return norm(x, weight_D, bias_D, kind=kind, eps=eps, residual=residual)


@kernel("rotary")
class TritonRotary(TritonKernel):
    """Rotation in one pass; its gradient is the inverse rotation (kernels/rotary.py)."""

    def run(self, x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """x with its first 2R features of every head rotated; angles are constants."""
        from nanolm.kernels.rotary import rotary  # noqa: PLC0415

        return rotary(x_BTHK, cos_BTR, sin_BTR)


@kernel("glu")
class TritonGlu(TritonKernel):
    """The gated activation in one pass (kernels/glu.py)."""

    def why_not_shape(self, spec: GluSpec) -> str | None:
        """Gates that the kernel does not know."""
        return None if spec.kind in ("swiglu", "geglu") else f"it has no {spec.kind}"

    def run(self, gate_up: Tensor, *, kind: str) -> Tensor:
        """[..., 2F] -> [..., F]."""
        from nanolm.kernels.glu import glu  # noqa: PLC0415

        return glu(gate_up, kind=kind)


@kernel("symmetric_product")
class TritonSymmetricProduct(TritonKernel):
    """Half of the tiles of x x^T, each written twice (kernels/symmetric_product.py)."""

    def run(self, x_MN: Tensor) -> Tensor:
        """[..., M, N] -> [..., M, M]."""
        from nanolm.kernels.symmetric_product import symmetric_product  # noqa: PLC0415

        return symmetric_product(x_MN)
