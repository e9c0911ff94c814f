"""Kernels that are wrong in a known way, so that a wrong kernel can be told what it does.

When a kernel's output is not the reference's, each suspect of the op is run on the same numbers;
the one whose output it is names the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.reference import CrossEntropyOutput
from nanolm.tools.kernel_check.attention_suspects import (
    Suspect,
    attention_suspects,
    backward_suspects,
)
from nanolm.tools.kernel_check.trial import Trial, distance, execute, reference, reference_of


def named(trial: Trial, outputs: dict[str, Tensor]) -> str | None:
    """The words of the suspect whose outputs these are, or None."""
    return suspected(trial, outputs, SUSPECTS, backward=False)


def named_backward(trial: Trial, tensors: dict[str, Tensor]) -> str | None:
    """The words of the suspect whose outputs and gradients these are, or None."""
    return suspected(trial, tensors, BACKWARD_SUSPECTS, backward=True)


def suspected(
    trial: Trial,
    tensors: dict[str, Tensor],
    suspects: dict[str, Callable[[], Iterator[Suspect]]],
    *,
    backward: bool,
) -> str | None:
    """The words of the first of an op's suspects that gives these tensors, or None."""
    definition = reference_of(trial)
    right = execute(trial, definition, torch.float64, backward=backward).tensors
    for suspect in suspects.get(type(definition).__name__, dict)():
        try:
            wrong = execute(trial, suspect, torch.float64, backward=backward).tensors
        except (AttributeError, ValueError, IndexError, RuntimeError, TypeError):
            continue  # it cannot be run on this trial: it is not what the kernel does
        differs = any(
            distance(wrong[name], x) > 2 * trial.tolerance(tensors[name].dtype)
            for name, x in right.items()
        )
        if differs and all(
            distance(tensors[name], x) < trial.tolerance(tensors[name].dtype)
            for name, x in wrong.items()
        ):
            return suspect.words
    return None


def norm_suspects() -> Iterator[Suspect]:
    """Options that are ignored or taken otherwise."""
    right = reference("norm").run

    def stays(x: Tensor, *given: Any, residual: Tensor | None = None, **options: Any) -> Any:
        return right(x, *given, residual=residual, **options)[0], x

    def other_kind(*given: Any, kind: str, **options: Any) -> Any:
        return right(*given, kind="rmsnorm" if kind == "layernorm" else "layernorm", **options)

    def outside(x: Tensor, weight: Tensor, bias: Any, *, eps: float, **options: Any) -> Any:
        out, total = right(x, weight, None, eps=0.0, **options)
        rms = total - total.mean(-1, keepdim=True) if options["kind"] == "layernorm" else total
        rms = rms.square().mean(-1, keepdim=True).sqrt()
        out = out * rms / (rms + eps)
        return (out if bias is None else out + bias), total

    def with_variance(change: Callable[[Tensor, float], Tensor]) -> Callable[..., Any]:
        def run(x: Tensor, w: Tensor, b: Any, *, eps: float, **options: Any) -> Any:
            _, total = right(x, w, b, eps=eps, **options)
            y = total - total.mean(-1, keepdim=True) if options["kind"] == "layernorm" else total
            out = y * change(y, eps).rsqrt() * w
            return (out if b is None else out + b), total

        return run

    def mean_square(y: Tensor) -> Tensor:
        return y.square().mean(-1, keepdim=True)

    larger = with_variance(lambda y, eps: mean_square(y).clamp(min=eps))
    unbiased = with_variance(
        lambda y, eps: mean_square(y) * y.shape[-1] / max(y.shape[-1] - 1, 1) + eps
    )
    halved = with_variance(
        lambda y, eps: y.half().square().to(y.dtype).mean(-1, keepdim=True) + eps
    )

    def changed(**fields: Any) -> Callable[..., Any]:
        return lambda *given, **options: right(*given, **(options | fields))

    yield Suspect("it ignores the residual", changed(residual=None))
    yield Suspect("its second output is x; x + residual is due", stays)
    yield Suspect("it ignores the bias", lambda x, w, _, **o: right(x, w, None, **o))
    yield Suspect("it ignores the weight", lambda x, w, b, **o: right(x, w * 0 + 1, b, **o))
    yield Suspect("it ignores eps", changed(eps=0.0))
    for eps in (1e-5, 1e-6, 1e-8):
        yield Suspect(f"it takes an eps of its own, {eps:.0e}", changed(eps=eps))
    yield Suspect("it takes the larger of variance and eps; their sum is due", larger)
    yield Suspect("it squares in float16, which does not hold the squares of hundreds", halved)
    yield Suspect("it divides by D - 1; the variance is over D", unbiased)
    yield Suspect("it adds eps outside the square root", outside)
    yield Suspect("it takes layernorm for rmsnorm, or the reverse", other_kind)


def cross_entropy_suspects() -> Iterator[Suspect]:
    """Options that are ignored or taken otherwise."""
    right = reference("linear_cross_entropy").run

    def mean(h: Tensor, w: Tensor, b: Any, targets: Tensor, **options: Any) -> Any:
        found = right(h, w, b, targets, **options)
        return found._replace(loss=found.loss / (targets != -100).sum())

    def counts(h: Tensor, w: Tensor, b: Any, targets: Tensor, **options: Any) -> CrossEntropyOutput:
        return right(h, w, b, targets.clamp(min=0), **options)

    def counts_loss(h: Tensor, w: Tensor, b: Any, targets: Tensor, **options: Any) -> Any:
        found = counts(h, w, b, targets, **options)
        return right(h, w, b, targets, **options)._replace(loss=found.loss)

    def smooth_nll(h: Tensor, w: Tensor, b: Any, targets: Tensor, **options: Any) -> Any:
        found = right(h, w, b, targets, **options)
        hidden = [h[n : n + 1] for n in range(len(h))]
        single = [right(x, w, b, t[None], **options).loss for x, t in zip(hidden, targets)]
        return found._replace(nll=torch.stack(single))

    def changed(**fields: Any) -> Callable[..., Any]:
        return lambda *given, **options: right(*given, **(options | fields))

    def over_others(h: Tensor, w: Tensor, b: Any, t: Tensor, **options: Any) -> Any:
        e, n = options["label_smoothing"], len(w)
        found = right(h, w, b, t, **options)
        plain = right(h, w, b, t, **(options | {"label_smoothing": 0.0})).loss
        more = right(h, w, b, t, **(options | {"label_smoothing": e * n / (n - 1)})).loss
        return found._replace(loss=more if e else plain)

    def all_lse(h: Tensor, w: Tensor, b: Any, t: Tensor, **options: Any) -> Any:
        found = right(h, w, b, t, **options)
        return found._replace(lse=counts(h, w, b, t, **options).lse)

    def packed(h: Tensor, w: Tensor, b: Any, t: Tensor, **options: Any) -> Any:
        return right(h, w, b, t.as_strided(t.shape, (1,)), **options)

    yield Suspect("it counts tokens whose target is -100", counts)
    yield Suspect(
        "its lse is that of ignored tokens too; 0 is due where the target is -100", all_lse
    )
    yield Suspect("it smooths over the V - 1 other classes; all V are due", over_others)
    yield Suspect("it reads targets as if they were contiguous", packed)
    yield Suspect("its loss counts tokens whose target is -100", counts_loss)
    yield Suspect("its loss is the mean over tokens; their sum is due", mean)
    yield Suspect("it ignores label_smoothing", changed(label_smoothing=0.0))
    yield Suspect("it ignores z_loss", changed(z_loss=0.0))
    yield Suspect("it ignores the soft-cap", changed(softcap=None))
    yield Suspect("it ignores the bias", lambda h, w, _, t, **o: right(h, w, None, t, **o))
    yield Suspect("its nll is the loss of a token; it is the plain likelihood's", smooth_nll)


def glu_suspects() -> Iterator[Suspect]:
    """The halves and the gates exchanged."""
    right = reference("glu").run

    def swapped(gate_up: Tensor, **options: Any) -> Tensor:
        return right(torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1), **options)

    def approximate(gate_up: Tensor, *, kind: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if kind == "swiglu":
            return right(gate_up, kind=kind)
        return F.gelu(gate, approximate="tanh") * up

    def other(gate_up: Tensor, *, kind: str) -> Tensor:
        return right(gate_up, kind="geglu" if kind == "swiglu" else "swiglu")

    yield Suspect("it takes the second half for the gate; the first is", swapped)
    yield Suspect("it takes swiglu for geglu, or the reverse", other)
    yield Suspect("its GELU is the approximation by tanh; the exact one is due", approximate)


def rotary_suspects() -> Iterator[Suspect]:
    """Other pairs, and the other direction."""
    right = reference("rotary").run

    def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = 2 * cos.shape[-1]
        order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)])
        order = torch.cat([order, torch.arange(n, x.shape[-1])]).to(x.device)
        return right(x[..., order], cos, sin)[..., order.argsort()]

    def whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.pad(right(x, cos, sin)[..., : 2 * cos.shape[-1]], (0, x.shape[-1]))[
            ..., : x.shape[-1]
        ]

    yield Suspect("it rotates neighbours; the pairs are (i, i + R)", neighbours)

    def rounded(to: torch.dtype) -> Callable[..., Tensor]:
        return lambda x, cos, sin: right(x, cos.to(to).to(x.dtype), sin.to(to).to(x.dtype))

    def by_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if x.shape[1] != x.shape[2]:
            raise ValueError("heads cannot be taken for tokens: there are more or fewer of them")
        return right(x.transpose(1, 2), cos, sin).transpose(1, 2)

    def packed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_tokens, n_pairs = cos.shape[1:]
        strides = (n_tokens * n_pairs, n_pairs, 1)
        return right(x, *(table.as_strided(table.shape, strides) for table in (cos, sin)))

    yield Suspect("it reads cos and sin as if they were contiguous", packed)
    yield Suspect("it takes heads for tokens where there are as many of both", by_head)
    for to in (torch.bfloat16, torch.float16):
        words = f"it rounds cos and sin to {str(to).removeprefix('torch.')}; they are float32"
        yield Suspect(words, rounded(to))
    yield Suspect("it rotates the other way round", lambda x, c, s: right(x, c, -s))
    yield Suspect("it loses the features that are not rotated", whole)
    yield Suspect("it takes the first row's angles for all", lambda x, c, s: right(x, c[:1], s[:1]))


def linear_suspects() -> Iterator[Suspect]:
    """Without its bias."""
    right = reference("linear").run
    yield Suspect("it ignores the bias", lambda x, w, _: right(x, w, None))


def product_suspects() -> Iterator[Suspect]:
    """Half of a symmetric result."""
    right = reference("symmetric_product").run
    yield Suspect("it writes the lower half of the product only", lambda x: right(x).tril())
    yield Suspect("it writes the upper half of the product only", lambda x: right(x).triu())


SUSPECTS: dict[str, Callable[[], Iterator[Suspect]]] = {
    "ReferenceAttention": attention_suspects,
    "ReferenceNorm": norm_suspects,
    "ReferenceCrossEntropy": cross_entropy_suspects,
    "ReferenceGlu": glu_suspects,
    "ReferenceRotary": rotary_suspects,
    "ReferenceLinear": linear_suspects,
    "ReferenceSymmetricProduct": product_suspects,
}
BACKWARD_SUSPECTS: dict[str, Callable[[], Iterator[Suspect]]] = {
    "ReferenceAttention": backward_suspects,
}
"""Of those whose output is right."""
