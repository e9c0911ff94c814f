"""Kernels whose output is right and whose gradient is wrong in a known way, so that a wrong one can
be told what it does: each is a right output with the gradient of something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.reference import CrossEntropyOutput
from nanolm.tools.kernel_check.suspects import Suspect
from nanolm.tools.kernel_check.trial import (
    Result,
    Trial,
    distance,
    execute,
    reference,
    reference_of,
)


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """The numbers of one tensor with the gradient of another."""
    return other + (value - other).detach()


def named_gradient(trial: Trial, found: Result) -> str | None:
    """The words of the suspect whose gradients these are, or None."""
    right = execute(trial, reference_of(trial), torch.float64, backward=True).gradients
    op = type(reference_of(trial)).__name__
    for suspect in GRADIENT_SUSPECTS.get(op, tuple)():
        try:
            wrong = execute(trial, suspect, torch.float64, backward=True).gradients
        except (ValueError, IndexError, RuntimeError, TypeError):
            continue  # it cannot be run on this trial: it is not what the kernel does
        limits = {name: trial.tolerance(x.dtype) for name, x in found.gradients.items()}
        if any(distance(wrong[n], right[n]) > 2 * limit for n, limit in limits.items()) and all(
            distance(x, wrong[name]) < limits[name] for name, x in found.gradients.items()
        ):
            return suspect.words
    return None


def norm_gradients() -> Iterator[Suspect]:
    """What a backward pass written by hand leaves out."""
    right = reference("norm").run

    def first_only(*given: Any, **options: Any) -> Any:
        out, total = right(*given, **options)
        return out, total.detach()

    def statistics_fixed(x: Tensor, weight: Tensor, bias: Any, **options: Any) -> Any:
        out, total = right(x, weight, bias, **options)
        y = total - total.mean(-1, keepdim=True) if options["kind"] == "layernorm" else total
        y = y.detach() + (total - total.detach())
        scale = (y.square().mean(-1, keepdim=True) + options["eps"]).rsqrt().detach()
        other = y * scale * weight
        return with_gradient_of(out, other if bias is None else other + bias), total

    yield Suspect("its gradient lacks what comes in through its second output", first_only)
    yield Suspect("its gradient takes mean and variance for constants", statistics_fixed)


def cross_entropy_gradients() -> Iterator[Suspect]:
    """Options that reach the loss and not its gradient, and tokens that reach it and must not."""
    right = reference("linear_cross_entropy").run

    def instead(other: Callable[..., Any]) -> Callable[..., CrossEntropyOutput]:
        def run(*given: Any, **options: Any) -> CrossEntropyOutput:
            found = right(*given, **options)
            loss = other(*given, **options).loss
            return found._replace(loss=with_gradient_of(found.loss, loss))

        return run

    def changed(**fields: Any) -> Callable[..., CrossEntropyOutput]:
        return instead(lambda *given, **options: right(*given, **(options | fields)))

    def uncapped(h: Tensor, w: Tensor, b: Any, t: Tensor, *, softcap: Any, **options: Any) -> Any:
        logits = F.linear(h, w, b)
        if softcap is None:
            raise ValueError("there is no soft-cap to forget")
        capped = with_gradient_of(softcap * torch.tanh(logits / softcap), logits)
        return right(capped, torch.eye(len(w), dtype=h.dtype, device=h.device), None, t, **options)

    class Unscaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return torch.ones_like(grads[0])

    def unscaled(*given: Any, **options: Any) -> CrossEntropyOutput:
        found = right(*given, **options)
        return found._replace(loss=Unscaled.apply(found.loss))

    def biased(h: Tensor, w: Tensor, b: Any, t: Tensor, **options: Any) -> CrossEntropyOutput:
        found = right(h, w, b, t, **options)
        if b is None:
            return found
        counted = right(h.detach(), w.detach(), b, t.clamp(min=0), **options).loss
        rest = right(h, w, b.detach(), t, **options).loss
        return found._replace(loss=with_gradient_of(found.loss, rest + counted))

    yield Suspect("it ignores the gradient that comes in for its loss", unscaled)
    yield Suspect("its gradient lacks that of z_loss", changed(z_loss=0.0))
    yield Suspect("its gradient lacks that of label_smoothing", changed(label_smoothing=0.0))
    yield Suspect("its gradient lacks the slope of the soft-cap", instead(uncapped))
    yield Suspect("its gradient of the bias counts tokens whose target is -100", biased)
    yield Suspect(
        "its gradient counts tokens whose target is -100",
        instead(lambda h, w, b, t, **options: right(h, w, b, t.clamp(min=0), **options)),
    )


def glu_gradients() -> Iterator[Suspect]:
    """Slopes of the activations."""
    right = reference("glu").run

    def with_slope(slope: Callable[[Tensor, str], Tensor]) -> Callable[..., Tensor]:
        def run(gate_up: Tensor, *, kind: str) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            act = F.silu(gate) if kind == "swiglu" else F.gelu(gate)
            bent = act.detach() + slope(gate.detach(), kind) * (gate - gate.detach())
            return bent * up

        return run

    def first_part(gate: Tensor, kind: str) -> Tensor:
        return gate.sigmoid() if kind == "swiglu" else 0.5 * (1 + torch.erf(gate / math.sqrt(2)))

    def fixed(gate_up: Tensor, *, kind: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return right(torch.cat([gate.detach(), up], dim=-1), kind=kind)

    def up_fixed(gate_up: Tensor, *, kind: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return right(torch.cat([gate, up.detach()], dim=-1), kind=kind)

    words = "its slope of the activation lacks a term: that of x s(x) is s(x) + x s'(x)"
    yield Suspect(words, with_slope(first_part))
    yield Suspect("no gradient reaches its gate", fixed)
    yield Suspect("no gradient reaches its second half", up_fixed)


def rotary_gradients() -> Iterator[Suspect]:
    """The other direction, and the features that are not rotated."""
    right = reference("rotary").run

    def forward_again(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return with_gradient_of(right(x, cos, sin), right(x, cos, -sin))

    def rotated_only(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = 2 * cos.shape[-1]
        return right(torch.cat([x[..., :n], x[..., n:].detach()], dim=-1), cos, sin)

    yield Suspect("its backward pass rotates forward again; it turns back by -sin", forward_again)
    yield Suspect("no gradient reaches the features that are not rotated", rotated_only)


def product_gradients() -> Iterator[Suspect]:
    """(g + g^T) x."""
    right = reference("symmetric_product").run

    def one_side(x: Tensor) -> Tensor:
        return with_gradient_of(right(x), x @ x.mT.detach())

    def doubled(x: Tensor) -> Tensor:
        return with_gradient_of(right(x), 2 * (x @ x.mT.detach()))

    words = "its gradient is {} x; (g + g^T) x is due, for what comes in need not be symmetric"
    yield Suspect(words.format("g"), one_side)
    yield Suspect(words.format("2 g"), doubled)


GRADIENT_SUSPECTS: dict[str, Callable[[], Iterator[Suspect]]] = {
    "ReferenceNorm": norm_gradients,
    "ReferenceCrossEntropy": cross_entropy_gradients,
    "ReferenceGlu": glu_gradients,
    "ReferenceRotary": rotary_gradients,
    "ReferenceSymmetricProduct": product_gradients,
}
