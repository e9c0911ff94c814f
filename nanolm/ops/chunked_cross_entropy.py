"""Linear + cross-entropy without ever holding [tokens, vocabulary]: the CPU's fast path.

    loss = sum_n [(1 - e) nll_n + e mean_v(-log p_nv) + z lse_n^2]       (the op's reference)

In a batch's journey: the head's last step, hidden states [N, D] and targets [N] in, one scalar out.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.contract import CrossEntropySpec, kernel
from nanolm.ops.reference import CrossEntropyOutput, nan_where, outside


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
        n_tokens, dtype = hidden_ND.shape[0], options.dtype
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needs = [needed and options.with_gradient for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden_ND) if needs[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None
        grad_bias = None
        if bias_V is not None and needs[2]:
            grad_bias = torch.zeros_like(bias_V, dtype=wide)
        nll_N = torch.zeros(n_tokens, dtype=wide, device=hidden_ND.device)
        correct_N = torch.zeros(n_tokens, device=hidden_ND.device)
        lse_N = torch.zeros_like(nll_N)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        # Chunks of tokens and not of the vocabulary: a token's softmax needs all its logits at
        # once.
        for start in range(0, n_tokens, options.chunk):
            part = slice(start, min(start + options.chunk, n_tokens))
            hidden, targets = hidden_ND[part].to(dtype), targets_N[part]
            logits = F.linear(hidden, weight, bias).to(wide)
            if options.softcap is not None:
                logits.div_(options.softcap).tanh_().mul_(options.softcap)
            figures = chunk_figures(logits, targets, options)
            kept = (targets != -100).to(wide)
            loss += (figures.loss * kept).sum()
            nll_N[part], lse_N[part] = figures.nll * kept, figures.lse * kept
            correct_N[part] = figures.correct
            if not any(needs):
                continue
            # Now, while the logits exist: to take it in the backward pass they would have to be
            # kept, or multiplied out again.
            grad = logit_gradient(figures, logits, targets, options).to(dtype)
            # An ignored token's row is left out of the sums by its zero in `kept`: that is a
            # product of [chunk, D], where zeros in `grad` would be one of [chunk, V].
            kept = kept[:, None].to(dtype)
            if grad_bias is not None:
                grad_bias += (grad.mT @ kept)[:, 0]
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).mul_(kept)
            if grad_weight is not None:
                add_product(grad_weight, grad.mT, hidden * kept)
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


class ChunkFigures(NamedTuple):
    """Of each token of a chunk [N]; `log_probabilities` is [N, V]."""

    loss: Tensor
    nll: Tensor
    lse: Tensor
    correct: Tensor
    log_probabilities: Tensor


def chunk_figures(logits_NV: Tensor, targets_N: Tensor, options: ChunkOptions) -> ChunkFigures:
    """Loss and metrics from logits, in few passes over them.

    log_softmax is one fused pass where logsumexp takes four, and argmax, which costs as much as
    everything else here, runs only over the tokens whose target has the largest logit.
    """
    vocab_size = logits_NV.shape[1]
    index_N1 = targets_N.clamp(0, vocab_size - 1)[:, None]
    log_probabilities_NV = torch.log_softmax(logits_NV, dim=-1)
    nll_N = -log_probabilities_NV.gather(1, index_N1)[:, 0]
    target_N = logits_NV.gather(1, index_N1)[:, 0]
    lse_N = nll_N + target_N
    nll_N = nll_N * nan_where(outside(targets_N, vocab_size), nll_N)
    smoothing = options.label_smoothing
    smooth_N = lse_N - logits_NV.mean(dim=-1) if smoothing else nll_N
    loss_N = (1 - smoothing) * nll_N + smoothing * smooth_N + options.z_loss * lse_N**2
    correct_N = torch.zeros_like(nll_N, dtype=torch.float32)
    highest = (target_N == logits_NV.amax(dim=-1)).nonzero()[:, 0]
    correct_N[highest] = (logits_NV[highest].argmax(dim=-1) == targets_N[highest]).float()
    return ChunkFigures(loss_N, nll_N, lse_N, correct_N, log_probabilities_NV)


def logit_gradient(
    figures: ChunkFigures, logits_NV: Tensor, targets_N: Tensor, options: ChunkOptions
) -> Tensor:
    """d loss / d logit_v = p_v (1 + 2 z lse) - (1 - e) [v = target] - e / V, before the soft-cap
    where there is one; [N, V], in the place of the log-probabilities."""
    grad_NV = figures.log_probabilities.exp_()
    smoothing = options.label_smoothing
    if options.z_loss:
        grad_NV *= (1 + 2 * options.z_loss * figures.lse)[:, None]
    if smoothing:
        grad_NV -= smoothing / grad_NV.shape[1]
    vocab_size = grad_NV.shape[1]
    index_N1 = targets_N.clamp(0, vocab_size - 1)[:, None]
    least_N = (smoothing - 1) * nan_where(outside(targets_N, vocab_size), grad_NV)
    grad_NV.scatter_add_(1, index_N1, least_N[:, None])
    if options.softcap is not None:
        grad_NV *= 1 - (logits_NV / options.softcap) ** 2
    return grad_NV


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, inside the product where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to matrix products of x; x's own without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@kernel("linear_cross_entropy")
class ChunkedCrossEntropy:
    """The loss over chunks of tokens: memory for one chunk of logits, three matrix products."""

    name = "chunked"
    chunk = 512  # tokens whose logits exist at a time; 256 to 1024 are within 8 % on a CPU

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
        if not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy; torch 2.13 has"
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
        wrong_N = outside(targets_N, weight_VD.shape[0])
        targets_N = torch.where(wrong_N, -100, targets_N)  # torch would raise, or stop the device
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
        return CrossEntropyOutput(
            loss.to(figures.loss.dtype) * nan_where(wrong_N.any(), figures.loss),
            figures.nll.masked_fill(wrong_N, torch.nan),
            figures.correct,
            figures.lse,
        )
