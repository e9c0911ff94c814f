"""A trial: one set of inputs for an op, and how far a kernel is from the reference on it.

Every op is checked the same way. The kernel runs in the trial's dtype; the reference runs on the
same numbers in float64; outputs, and the gradients of all differentiable inputs for one random
incoming gradient, are compared by the largest difference over the largest value.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import KERNELS, Spec, candidates

# Largest |kernel - reference| / max |reference|: some units in the last place of each dtype.
TOLERANCE = {
    torch.float64: 1e-7,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

Run = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Inputs of one op.

    `leaves` are its differentiable inputs in the trial's dtype and layout; `run(kernel, leaves)`
    calls a kernel on such leaves and names its outputs. Outputs in `detached` have no gradient.
    """

    name: str
    spec: Spec
    leaves: dict[str, Tensor]
    run: Run
    detached: frozenset[str] = frozenset()

    @property
    def differentiable(self) -> bool:
        """Whether the phase needs gradients."""
        return self.spec.phase == "train"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a kernel gave on a trial: outputs and gradients by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything, gradients with a `d` before their input's name."""
        return self.outputs | {f"d{name}": grad for name, grad in self.gradients.items()}


def reference(op: str) -> Any:
    """The op's definition."""
    candidates(op)
    return KERNELS[op].get("reference").build()


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf with x's numbers in another dtype, and x's strides when the dtype is x's."""
    if dtype == x.dtype:
        return x.detach().requires_grad_()
    return x.detach().to(dtype).requires_grad_()


def execute(trial: Trial, kernel: Any, dtype: torch.dtype, *, backward: bool) -> Result:
    """Runs a kernel on the trial's numbers in a dtype."""
    leaves = {name: like(x, dtype).requires_grad_(backward) for name, x in trial.leaves.items()}
    outputs = trial.run(kernel, leaves)
    if not backward:
        return Result({name: x.detach() for name, x in outputs.items()}, {})
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=next(iter(leaves.values())).device)
    for name, output in outputs.items():
        if name in trial.detached:
            continue
        weight = torch.randn(output.shape, generator=generator).to(output.device)
        # Rows without any key have lse -inf; they have no gradient, and no finite sum.
        finite = torch.isfinite(output.detach())
        total = total + (torch.where(finite, output, 0.0).double() * weight).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return Result({name: x.detach() for name, x in outputs.items()}, gradients)


def distance(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, over finite values; inf where only one is finite.

    Values below 1e-3 throughout count by their absolute difference over 1e-3.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (actual - expected)[finite].abs().max()
    return float(difference / expected[finite].abs().max().clamp(min=1e-3))


def errors(trial: Trial, kernel: Any) -> dict[str, float]:
    """Distance from the reference for every output and gradient."""
    backward = trial.differentiable
    actual = execute(trial, kernel, trial.spec.dtype, backward=backward)
    wide = torch.float64
    expected = execute(trial, reference_of(trial), wide, backward=backward)
    return {
        name: distance(x, expected.tensors[name])
        for name, x in actual.tensors.items()
        if name in expected.tensors
    }


def forget_graphs() -> None:
    """Drops what torch.compile has made, between trials: torch counts the graphs of one function
    over all problems, and a kernel that compiles itself, as flex does, is refused the ninth."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def reference_of(trial: Trial) -> Any:
    """The definition of the trial's op."""
    return reference(OP_OF[type(trial.spec).__name__])


OP_OF = {
    "AttentionSpec": "attention",
    "CrossEntropySpec": "linear_cross_entropy",
    "NormSpec": "norm",
    "RotarySpec": "rotary",
    "GluSpec": "glu",
    "SymmetricProductSpec": "symmetric_product",
}
