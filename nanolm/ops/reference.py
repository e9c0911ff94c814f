"""The definitions: each op in a few lines of plain PyTorch, which every kernel is tested against.

They compute in float32 (or float64 when the input is), return the input's dtype, and may hold
[B, H, T, S] or [N, V] tensors; that is what the others avoid.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tokens,
D model width, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.bias import Bias
from nanolm.ops.contract import kernel
from nanolm.ops.masks import Mask


def upcast(x: Tensor) -> Tensor:
    """x in the dtype that a reference computes in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


class AttentionOutput(NamedTuple):
    """out_BTHK in the queries' dtype, and lse_BHT (float32): log of the sum of exp(scores)."""

    out: Tensor
    lse: Tensor


@kernel("attention")
class ReferenceAttention:
    """softmax(softcap(q k^T * scale) + bias + mask) v (Vaswani et al. 2017, section 3.2.1)."""

    name = "reference"

    def why_not(self, spec: Any) -> str | None:
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
        """Attention, [B, T, H, K]; a query that may see no key gives 0 and lse -inf."""
        weights_BHTS, lse_BHT = self.weights(
            q_BTHK, k_BSGK, mask, bias=bias, scale=scale, softcap=softcap
        )
        weights_BHTS = F.dropout(weights_BHTS, dropout, training=dropout > 0)
        repeats = q_BTHK.shape[2] // k_BSGK.shape[2]
        v_BHSK = upcast(v_BSGK).transpose(1, 2).repeat_interleave(repeats, dim=1)
        out_BTHK = (weights_BHTS @ v_BHSK).transpose(1, 2).to(q_BTHK.dtype)
        return AttentionOutput(out_BTHK, lse_BHT) if return_lse else out_BTHK

    def weights(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        mask: Mask,
        *,
        bias: Bias | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """(weights_BHTS, lse_BHT): what an observer looks at when it wants the attention map."""
        scores_BHTS = self.scores(q_BTHK, k_BSGK, bias=bias, scale=scale, softcap=softcap)
        scores_BHTS = self.hide(scores_BHTS, mask, bias)
        # exp(score - lse) and not softmax: the lse is also what a backward pass, a ring of devices
        # or a prefix needs to put parts together.
        lse_BHT = torch.logsumexp(scores_BHTS, dim=-1)
        # A row without any visible key has lse -inf: subtracting 0 instead gives weights 0, no NaN.
        shift_BHT = torch.where(lse_BHT == -torch.inf, 0.0, lse_BHT)
        return torch.exp(scores_BHTS - shift_BHT[..., None]), lse_BHT

    def scores(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        *,
        bias: Bias | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """scores_BHTS, before any mask."""
        # Grouped queries (Ainslie et al. 2023): H / G query heads read the same key head.
        repeats = q_BTHK.shape[2] // k_BSGK.shape[2]
        q_BHTK = upcast(q_BTHK).transpose(1, 2)
        k_BHSK = upcast(k_BSGK).transpose(1, 2).repeat_interleave(repeats, dim=1)
        scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) * scale
        if softcap is not None:
            # Bent and not cut off: every score keeps its order, and a gradient that brings it back.
            scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
        if bias is not None:
            scores_BHTS = scores_BHTS + bias.dense(*scores_BHTS.shape[-2:])
        return scores_BHTS

    def hide(self, scores_BHTS: Tensor, mask: Mask, bias: Bias | None) -> Tensor:
        """The scores with -inf where the query may not see the key."""
        n_queries, n_keys = scores_BHTS.shape[-2:]
        allowed = mask.dense(n_queries, n_keys, scores_BHTS.device)
        if bias is not None:  # -inf hides as the mask does, from the gradient too
            allowed = allowed & ~torch.isneginf(scores_BHTS)
        return scores_BHTS.masked_fill(~allowed, -torch.inf)


class CrossEntropyOutput(NamedTuple):
    """loss: scalar, the only differentiable field. Per token, detached, float32 [N] (0 where
    ignored): nll, the plain negative log-likelihood in nats; correct, 1 where the argmax is right;
    lse, the log of the sum of exp(logits)."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    lse: Tensor


def outside(targets_N: Tensor, vocab_size: int) -> Tensor:
    """bool [N]: targets that are neither -100 nor in the vocabulary."""
    return (targets_N != -100) & ((targets_N < 0) | (targets_N >= vocab_size))


def nan_where(condition: Tensor, like: Tensor) -> Tensor:
    """NaN where the condition holds and 1 elsewhere: what is multiplied by it keeps its bits, or is
    NaN together with its gradient."""
    return torch.where(condition, torch.nan, 1.0).to(like.dtype)


@kernel("linear")
class ReferenceLinear:
    """x W^T + b, in the dtype that autocast says."""

    name = "reference"

    def why_not(self, spec: Any) -> str | None:
        return None

    def run(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, weight_OI, bias_O)


@kernel("linear_cross_entropy")
class ReferenceCrossEntropy:
    """Vocabulary projection and its loss, summed over the tokens whose target is not -100."""

    name = "reference"

    def why_not(self, spec: Any) -> str | None:
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
        """loss = sum_n [(1 - e) nll_n + e mean_v(-log p_nv) + z lse_n^2].

        e is label_smoothing (Szegedy et al. 2016, section 7) and z the weight of the z-loss that
        keeps logits from drifting (Chowdhery et al. 2022, section 5). A target that is neither -100
        nor in the vocabulary makes the loss, its nll and its gradient NaN: to raise, the host would
        have to wait for the device.
        """
        logits_NV = upcast(F.linear(hidden_ND, weight_VD, bias_V))
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        kept_N = targets_N != -100
        safe_N = targets_N.clamp(0, weight_VD.shape[0] - 1)
        # -log p_v = lse - z_v. logsumexp subtracts the largest logit before it takes exp, so
        # nothing overflows, and no [N, V] of probabilities is made.
        lse_N = torch.logsumexp(logits_NV, dim=-1)
        nll_N = lse_N - logits_NV.gather(1, safe_N[:, None])[:, 0]
        nll_N = nll_N * nan_where(outside(targets_N, weight_VD.shape[0]), nll_N)
        smooth_N = lse_N - logits_NV.mean(dim=-1)
        loss_N = (1 - label_smoothing) * nll_N + label_smoothing * smooth_N + z_loss * lse_N**2
        correct_N = (logits_NV.argmax(dim=-1) == targets_N).float()
        keep = kept_N.to(loss_N.dtype)
        return CrossEntropyOutput(
            torch.where(kept_N, loss_N, 0.0).sum(),
            (nll_N * keep).detach(),
            correct_N * keep.float(),
            (lse_N * keep).detach(),
        )


@kernel("norm")
class ReferenceNorm:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), optionally after a sum."""

    name = "reference"

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
        """(norm(x + residual), x + residual), both in x's shape and the dtype of the sum."""
        total = x if residual is None else x + residual
        y = upcast(total)
        if kind == "layernorm":
            y = y - y.mean(dim=-1, keepdim=True)
        # eps under the root: a row whose entries are all equal has no spread to be divided by.
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * upcast(weight_D)
        y = y if bias_D is None else y + upcast(bias_D)
        return y.to(total.dtype), total


@kernel("rotary")
class ReferenceRotary:
    """Rotation of the pairs (x_i, x_{i + R}), i < R = cos.shape[-1], by position angles.

    Su et al. 2021, section 3.2.2, pair neighbours (x_{2i}, x_{2i + 1}). Pairing the two halves is
    GPT-NeoX's layout (Black et al. 2022), and Llama's in transformers: the same up to a permutation
    of the features, so weights trained with one layout need it to be used with the other.
    """

    name = "reference"

    def why_not(self, spec: Any) -> str | None:
        return None

    def run(self, x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """x with its first 2R features of every head rotated; cos, sin: [B or 1, T, R] float32."""
        n_rotated = 2 * cos_BTR.shape[-1]
        first, second = upcast(x_BTHK[..., :n_rotated]).chunk(2, dim=-1)
        cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        rotated = rotated.to(x_BTHK.dtype)
        if n_rotated == x_BTHK.shape[-1]:
            return rotated
        return torch.cat([rotated, x_BTHK[..., n_rotated:]], dim=-1)


@kernel("glu")
class ReferenceGlu:
    """act(gate) * up with SiLU or GELU (Shazeer 2020)."""

    name = "reference"

    def why_not(self, spec: Any) -> str | None:
        return None

    def run(self, gate_up: Tensor, *, kind: str) -> Tensor:
        """[..., 2F] -> [..., F]; the gate is the first half."""
        gate, up = gate_up.chunk(2, dim=-1)
        activation = F.silu if kind == "swiglu" else F.gelu
        return activation(gate) * up


@kernel("symmetric_product")
class ReferenceSymmetricProduct:
    """x x^T."""

    name = "reference"

    def why_not(self, spec: Any) -> str | None:
        return None

    def run(self, x_MN: Tensor) -> Tensor:
        """[..., M, N] -> [..., M, M]."""
        return x_MN @ x_MN.mT
