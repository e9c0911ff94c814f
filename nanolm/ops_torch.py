"""Fast paths that need no kernel of ours: PyTorch's own fused functions, and chunked loops.

These serve CPUs, and devices for which no Triton kernel is chosen.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tokens,
D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.bias import Bias
from nanolm.masks import Mask
from nanolm.ops import AttentionSpec, CrossEntropySpec, kernel
from nanolm.ops_reference import CrossEntropyOutput


@kernel("attention")
class SdpaAttention:
    """torch.nn.functional.scaled_dot_product_attention, which fuses on CPU and CUDA."""

    name = "sdpa"

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
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=allowed,
            is_causal=plain and mask.causal and n_queries > 1,  # one query sees all keys
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
        values = bias.dense(n_queries, n_keys)
        return values.masked_fill(~allowed, -torch.inf).to(like.dtype)


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk, so that [N, V] never exists.

    The gradient of each chunk is taken in the forward pass, while its logits are at hand, for an
    upstream gradient of 1; the backward pass only multiplies by the scalar that arrives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        options: ChunkOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        softcap, label_smoothing, z_loss = options.softcap, options.label_smoothing, options.z_loss
        n_tokens = hidden_ND.shape[0]
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needs = [needed and options.with_gradient for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden_ND) if needs[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if needs[2] else None
        nll_N = torch.zeros(n_tokens, dtype=wide, device=hidden_ND.device)
        correct_N = torch.zeros(n_tokens, device=hidden_ND.device)
        lse_N = torch.zeros_like(nll_N)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        weight, bias = weight_VD.to(options.dtype), bias_V
        bias = None if bias is None else bias.to(options.dtype)
        for start in range(0, n_tokens, options.chunk):
            part = slice(start, min(start + options.chunk, n_tokens))
            hidden, targets = hidden_ND[part].to(options.dtype), targets_N[part]
            logits = F.linear(hidden, weight, bias).to(wide)
            slope = None  # of the soft-cap
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
                slope = 1 - (logits / softcap) ** 2
            kept = (targets != -100).to(wide)
            index = targets.clamp(min=0)[:, None]
            lse = torch.logsumexp(logits, dim=-1)
            nll = lse - logits.gather(1, index)[:, 0]
            smooth = lse - logits.mean(dim=-1) if label_smoothing else nll
            terms = (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse**2
            loss += (terms * kept).sum()
            nll_N[part], lse_N[part] = nll * kept, lse * kept
            correct_N[part] = (logits.argmax(dim=-1) == targets).float()
            if not any(needs):
                continue
            # d loss / d logit_v = p_v (1 + 2 z lse) - (1 - e) [v = target] - e / V
            grad = torch.exp(logits - lse[:, None])
            if z_loss:
                grad *= (1 + 2 * z_loss * lse)[:, None]
            if label_smoothing:
                grad -= label_smoothing / logits.shape[1]
            grad.scatter_add_(1, index, torch.full_like(grad[:, :1], label_smoothing - 1))
            grad *= kept[:, None]
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(options.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.mT @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.mark_non_differentiable(nll_N, correct_N, lse_N)
        return loss, nll_N, correct_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple:
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


class ChunkOptions(NamedTuple):
    """What the chunked loss needs besides its tensors; products are computed in `dtype`."""

    softcap: float | None
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype
    chunk: int
    with_gradient: bool


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to matrix products of x; x's own without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@kernel("linear_cross_entropy")
class ChunkedCrossEntropy:
    """The loss over chunks of tokens: memory for one chunk of logits, three matrix products."""

    name = "chunked"
    chunk = 1024  # tokens whose logits exist at a time

    def why_not(self, spec: CrossEntropySpec) -> str | None:
        return None

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
        """As the reference; under autocast in its dtype, with weight gradients summed in float32.

        The gradients can be taken once: there is no second derivative.
        """
        options = ChunkOptions(
            softcap,
            label_smoothing,
            z_loss,
            product_dtype(hidden_ND),
            self.chunk,
            torch.is_grad_enabled(),  # inside the Function it never is
        )
        with torch.autocast(hidden_ND.device.type, enabled=False):
            outputs = ChunkedLinearCrossEntropy.apply(
                hidden_ND, weight_VD, bias_V, targets_N, options
            )
        return CrossEntropyOutput(*outputs)


@kernel("linear_cross_entropy")
class TorchCrossEntropy:
    """torch.nn.functional.linear_cross_entropy, chunked (torch 2.13).

    It returns the loss alone, so the figures per token cost a second pass over the vocabulary.
    """

    name = "torch"

    def why_not(self, spec: CrossEntropySpec) -> str | None:
        if spec.softcap is not None:
            return "torch's linear_cross_entropy has no soft-cap"
        if spec.z_loss:
            return "torch's linear_cross_entropy has no z-loss"
        if spec.label_smoothing:
            return "torch's linear_cross_entropy holds all logits when it smooths labels"
        return None

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
        """As the reference, without soft-cap, z-loss and label smoothing."""
        dtype = product_dtype(hidden_ND)
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        with torch.no_grad():
            figures = ChunkedCrossEntropy().run(hidden, weight, bias, targets_N)
        with torch.autocast(hidden.device.type, enabled=False):
            loss = F.linear_cross_entropy(
                hidden,
                weight,
                targets_N,
                linear_bias=bias,
                reduction="sum",
                ignore_index=-100,
                options=torch.nn.LinearCrossEntropyOptions(),
            )
        return figures._replace(loss=loss)


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
        """(norm(x + residual), x + residual)."""
        total = x if residual is None else x + residual
        if kind == "layernorm":
            return F.layer_norm(total, weight_D.shape, weight_D, bias_D, eps), total
        return F.rms_norm(total, weight_D.shape, weight_D, eps), total
