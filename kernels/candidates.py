"""The Triton kernels as candidates: what they can serve, in words, without importing Triton.

`nanolm.kernels.*` holds the kernels themselves. They are imported when one of them first runs, so
that a machine without a GPU pays nothing for them; on a CPU they run only in Triton's interpreter
(TRITON_INTERPRET=1, set before anything imports triton), slowly, for tests, and only when named.
A `run` here passes its options on: the functions of nanolm.kernels, whose signatures are the op's,
refuse what they do not know.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tokens,
D model width, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import AttentionSpec, GluSpec, NormSpec, Spec, kernel
from nanolm.ops.masks import Mask
from nanolm.ops.reference import AttentionOutput, CrossEntropyOutput

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TritonKernel:
    """What all Triton kernels have in common."""

    name = "triton"
    only_by_name_on = frozenset({"cpu"})
    precision = "ieee"  # of float32 products

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
        if (old := too_old()) is not None:
            return old
        if spec.dtype not in DTYPES:
            return f"it has no {spec.dtype} version"
        return self.why_not_shape(spec)

    def why_not_shape(self, spec: Any) -> str | None:
        """What of the op's own spec it cannot serve."""
        return None


def too_old() -> str | None:
    """Why the GPU at hand is too old for these kernels, or None (also without a GPU, or with AMD's,
    whose numbers mean other things)."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major >= 8:
        return None
    return (
        f"its tiles need more shared memory than {torch.cuda.get_device_name()} has: compute "
        f"capability 8.0 (A100) or newer, and this one is {major}.{minor}"
    )


@kernel("attention")
class TritonAttention(TritonKernel):
    """FlashAttention-2, forward and backward (kernels/attention/forward.py)."""

    reads_ranges = True

    def why_not_shape(self, spec: AttentionSpec) -> str | None:
        """Heads wider than one tile, and slopes that learn."""
        if spec.head_dim > 256:
            return f"its heads are at most 256 wide, not {spec.head_dim}"
        if spec.bias == "learned_alibi":
            return "it takes ALiBi slopes as constants, and these learn"
        return None

    def run(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        mask: Mask,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Tensor | AttentionOutput:
        """As the reference; `seed`, int64 [1], keys dropout (without it torch's generator does)."""
        from nanolm.kernels.attention.operator import attention  # noqa: PLC0415

        out_BTHK, lse_BHT = attention(
            q_BTHK, k_BSGK, v_BSGK, mask, precision=self.precision, **options
        )
        return AttentionOutput(out_BTHK, lse_BHT) if return_lse else out_BTHK


@kernel("attention")
class TritonDecodeAttention(TritonKernel):
    """One query, or a few, against a cache, split over programs (kernels/attention/decode.py)."""

    name = "triton_decode"
    reads_ranges = True

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
        dropout: float = 0.0,
        return_lse: bool = False,
        **options: Any,
    ) -> Tensor | AttentionOutput:
        """Attention without a gradient; raises ValueError when asked for dropout."""
        from nanolm.kernels.attention.decode import attention_decode  # noqa: PLC0415

        if dropout > 0:
            raise ValueError("triton_decode has no dropout: it serves decoding only")
        out_BTHK, lse_BHT = attention_decode(q_BTHK, k_BSGK, v_BSGK, mask, **options)
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
        **options: Any,
    ) -> CrossEntropyOutput:
        """As the reference; under autocast in its dtype, with float32 gradients of W."""
        from nanolm.kernels.cross_entropy import linear_cross_entropy  # noqa: PLC0415

        return CrossEntropyOutput(
            *linear_cross_entropy(hidden_ND, weight_VD, bias_V, targets_N, **options)
        )


@kernel("norm")
class TritonNorm(TritonKernel):
    """LayerNorm and RMSNorm with the residual sum in the same pass (kernels/norm.py)."""

    def why_not_shape(self, spec: NormSpec) -> str | None:
        """Rows that no program could hold."""
        if spec.width > 16384:
            return f"its rows are at most 16384 wide, not {spec.width}"
        return None

    def run(
        self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """As the reference: (norm(x + residual), x + residual)."""
        from nanolm.kernels.norm import norm  # noqa: PLC0415

        return norm(x, weight_D, bias_D, **options)


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

        return symmetric_product(x_MN, self.precision)


class Tf32x3(TritonKernel):
    """float32 products as three TF32 products on the tensor cores: about 21 of 23 bits."""

    name = "triton_tf32x3"
    precision = "tf32x3"

    def why_not(self, spec: Spec) -> str | None:
        """As its base, on NVIDIA GPUs and in float32."""
        if spec.dtype != torch.float32:
            return f"it differs from triton in float32 only, and this is {spec.dtype}"
        if torch.version.hip is not None:
            return "TF32 is a format of NVIDIA's tensor cores"
        return super().why_not(spec)


@kernel("attention")
class Tf32x3Attention(Tf32x3, TritonAttention):
    """FlashAttention-2 with float32 products on the tensor cores (tf32x3)."""


@kernel("symmetric_product")
class Tf32x3SymmetricProduct(Tf32x3, TritonSymmetricProduct):
    """Half of the tiles of x x^T with float32 products on the tensor cores (tf32x3)."""
