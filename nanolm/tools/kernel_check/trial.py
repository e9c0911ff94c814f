"""A trial: one set of inputs for an op, and how far a kernel is from the reference on it.

Every op is checked the same way. The kernel runs on the trial's leaves as they are, each in its own
dtype, under autocast where the trial says so; the reference runs on the same numbers in float64;
outputs, and the gradients of all differentiable inputs for one random incoming gradient, are
compared by the largest difference over the largest value, or over what cancelled to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import KERNELS, Spec, candidates
from nanolm.tools.kernel_check.settings import one_call

# Largest |kernel - reference| / max |reference|: some units in the last place of each dtype.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
OPTIONS = 1e-7
"""As above, for float64 on a GPU: Triton hands a scale, an eps or a soft-cap over in 32 bits, and
their last bit shows. Its interpreter, on a CPU, keeps all 64."""
SMALL = 1e-3
"""Values below it throughout are what is left of larger ones that cancel: see `Trial.size`."""

Run = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
Terms = Callable[[dict[str, Tensor]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Inputs of one op.

    `leaves` are its differentiable inputs in their dtypes and layouts; `run(kernel, leaves)` calls
    a kernel on such leaves and names its outputs. Outputs in `detached` have no gradient.
    `autocast` is the dtype of the autocast region that the kernel runs in, `computes` the dtype
    that bounds its precision (the spec's, unless it sums in a wider one), `dtypes` what its outputs
    must have. `constants` are its inputs without a gradient, which `run` holds. `terms(leaves)` is
    the size of what is added up to each output and gradient, for those that cancel, and `rounding`
    how far each term may be off for its own part, beside the rounding of its dtype (attention: an
    exponent is as exact as the scores are large). `hint` says what usually is at fault where
    numbers are wrong on this trial. `again(**changes)` makes it with other ones of its `arguments`
    (op_narrowing.py).
    """

    name: str
    spec: Spec
    leaves: dict[str, Tensor]
    run: Run
    detached: frozenset[str] = frozenset()
    autocast: torch.dtype | None = None
    computes: torch.dtype | None = None
    dtypes: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    terms: Terms | None = None
    rounding: float = 0.0
    constants: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    hint: str = ""
    again: Callable[..., Trial] | None = None
    arguments: frozenset[str] = frozenset()

    @property
    def differentiable(self) -> bool:
        """Whether the phase needs gradients."""
        return self.spec.phase == "train"

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far a result of this dtype may be off."""
        floor = 0.0 if torch.device(self.spec.device).type == "cpu" else OPTIONS
        return max(TOLERANCE[self.computes or self.spec.dtype], TOLERANCE[dtype], floor)

    def size(self, largest: float, terms: float, dtype: torch.dtype) -> float:
        """What a difference is measured by: the largest value, unless that is what is left of far
        larger terms. A sum of terms, each of which is rounded once, is off by that roundoff times
        the sum of their sizes, however small it is itself."""
        if largest < SMALL:
            return max(terms, SMALL)
        computed = self.computes or self.spec.dtype
        # Why not less. Of all trials of attention this widens three with one key and two with large
        # scores. On these, in the interpreter or on a CPU, errors take up to 0.58 of what is
        # allowed (sdpa's dv; the definition in float32 0.32, Triton 0.55), so a smaller allowance
        # would fail right kernels on a device that sums in another order; without it the same
        # errors are up to 600 times too large. A scale that is off by 1e-3 fails
        # (tests/test_kernel_outsiders.py), and so do single steps in bfloat16, by 2.8 times and
        # more (tests/test_kernel_allowance.py).
        roundoff = max(torch.finfo(dtype).eps, torch.finfo(computed).eps) / 2 + self.rounding
        return max(largest, terms * roundoff / self.tolerance(dtype))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a kernel gave on a trial: outputs and gradients by name.

    `unreached` are the inputs that the outputs do not depend on, as autograd sees it.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    unreached: frozenset[str] = frozenset()

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


def upstream(outputs: Mapping[str, Tensor], detached: frozenset[str]) -> dict[str, Tensor]:
    """The random incoming gradient of each output that has one, in numbers that all dtypes hold."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(x.shape, generator=generator).bfloat16().float().to(x.device)
        for name, x in outputs.items()
        if name not in detached
    }


def execute(
    trial: Trial, kernel: Any, dtype: torch.dtype | None = None, *, backward: bool
) -> Result:
    """Runs a kernel on the trial: with a dtype on its numbers in that dtype, without one on its
    leaves as they are and under its autocast."""
    leaves = {
        name: like(x, dtype or x.dtype).requires_grad_(backward) for name, x in trial.leaves.items()
    }
    device = next(iter(leaves.values())).device
    region: Any = contextlib.nullcontext()
    if dtype is None and trial.autocast is not None:
        region = torch.autocast(device.type, trial.autocast)
    with region, one_call():
        outputs = trial.run(kernel, leaves)
    plain = {name: x.detach() for name, x in outputs.items()}
    if not backward:
        return Result(plain, {})
    total = torch.zeros((), dtype=torch.float64, device=device)
    for name, weight in upstream(outputs, trial.detached).items():
        # Rows without any key have lse -inf; they have no gradient, and no finite sum.
        finite = torch.isfinite(plain[name])
        total = total + (torch.where(finite, outputs[name], 0.0).double() * weight).sum()
    if not total.requires_grad:
        zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        return Result(plain, zeros, frozenset(leaves))
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = dict(zip(leaves, grads, strict=True))
    gradients = {
        name: torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in found.items()
    }
    return Result(plain, gradients, frozenset(name for name, g in found.items() if g is None))


def distance(
    actual: Tensor, expected: Tensor, size: Callable[[float], float] = lambda x: max(x, SMALL)
) -> float:
    """max |actual - expected| / size(max |expected|), over finite values; inf where only one is
    finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (actual - expected)[finite].abs().max()
    return float(difference / size(float(expected[finite].abs().max())))


def compare(trial: Trial, actual: Result, definition: Any = None) -> dict[str, float]:
    """Distance of a result from the definition's (the op's own if None), by name."""
    definition = definition or reference_of(trial)
    expected = execute(trial, definition, torch.float64, backward=bool(actual.gradients)).tensors
    terms: Mapping[str, float] = {}
    if trial.terms is not None:
        terms = trial.terms({name: x.detach().double() for name, x in trial.leaves.items()})
    sizes = {
        name: functools.partial(trial.size, terms=terms.get(name, 0.0), dtype=x.dtype)
        for name, x in actual.tensors.items()
    }
    return {
        name: distance(x, expected[name], sizes[name])
        for name, x in actual.tensors.items()
        if name in expected
    }


def errors(trial: Trial, kernel: Any) -> dict[str, float]:
    """Distance from the reference for every output and gradient."""
    return compare(trial, execute(trial, kernel, backward=trial.differentiable))


def excess(trial: Trial, actual: Result) -> dict[str, float]:
    """The same as a multiple of what each may be off by, by its dtype: right is below 1."""
    tensors = actual.tensors
    return {
        name: found / trial.tolerance(tensors[name].dtype)
        for name, found in compare(trial, actual).items()
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
    "LinearSpec": "linear",
    "CrossEntropySpec": "linear_cross_entropy",
    "NormSpec": "norm",
    "RotarySpec": "rotary",
    "GluSpec": "glu",
    "SymmetricProductSpec": "symmetric_product",
}
