"""What is wrong with a kernel on one trial, in the sentence that names it.

The first fault that is found is told, the plainest first: a result of the wrong kind, inputs that
were changed, noise, then numbers, and gradients last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.gradient_suspects import named_gradient
from nanolm.tools.kernel_check.suspects import named, named_backward
from nanolm.tools.kernel_check.trial import Result, Trial, excess, execute, reference_of
from nanolm.tools.kernel_check.where import narrow_dtype, where

IN_FLOAT32 = 1e-5
"""What float32 may be off by in place of float64."""


class Remark(str):
    """A sentence that is noted and fails no kernel: nothing trains in float64."""


def fault(kernel: Any, trial: Trial) -> str | None:
    """A sentence about the kernel on this trial, or None when it is right."""
    inputs = {**trial.leaves, **trial.constants}
    before = {name: x.clone() for name, x in inputs.items()}
    state = torch.get_rng_state()
    try:
        found = execute(trial, kernel, backward=trial.differentiable)
        still = found
        if trial.differentiable:  # as an evaluation calls it
            with torch.no_grad():
                still = execute(trial, kernel, backward=False)
        changed = [name for name, x in inputs.items() if not same(x, before[name])]
    finally:
        for name, x in inputs.items():
            x.copy_(before[name])
    if changed:
        return f"it changes its input in place: {', '.join(changed)}"
    if not torch.equal(state, torch.get_rng_state()):
        return "it changes the state of torch's random numbers, and nothing here is random"
    right = execute(trial, reference_of(trial), torch.float64, backward=False).outputs
    words = kind_of_outputs(trial, found.outputs, right) or numbers(kernel, trial, found, right)
    if isinstance(words, Remark):
        return words
    if words is not None or still is found:
        hinted = words is not None and trial.hint and ("is off by" in words or "NaN" in words)
        return f"{words} ({trial.hint})" if hinted else words
    # A branch for evaluation may be wrong for one option: `HABITS` ask of one trial alone.
    spec = dataclasses.replace(trial.spec, phase="prefill")
    forward_only = dataclasses.replace(trial, spec=spec)
    with torch.no_grad():
        words = kind_of_outputs(trial, still.outputs, right) or numbers(
            kernel, forward_only, still, right
        )
    return words and f"under torch.no_grad, and only there: {words}"


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal, NaN being equal to NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def kind_of_outputs(
    trial: Trial, outputs: Mapping[str, Tensor], right: Mapping[str, Tensor]
) -> str | None:
    """Whether shapes, dtypes and the places of infinities are those that the contract names."""
    for name, x in outputs.items():
        if x.shape != right[name].shape:
            return f"its {name} is of shape {list(x.shape)}; {list(right[name].shape)} is due"
    for name, x in outputs.items():
        due = trial.dtypes.get(name, x.dtype)
        if x.dtype != due:
            where = f" under autocast to {trial.autocast}" if trial.autocast else ""
            return f"its {name} is {x.dtype}{where}; {due} is due"
    for name, x in outputs.items():
        if not torch.equal(x.isfinite(), right[name].isfinite()):
            words = f"its {name} is NaN or infinite where it should not be"
            attention = type(trial.spec).__name__ == "AttentionSpec" and "out" in outputs
            if attention and (right["out"] == 0).flatten(2).all(-1).any():
                words += ": a query that may see no key gives 0"
            return words
    return None


def numbers(kernel: Any, trial: Trial, found: Result, right: Mapping[str, Tensor]) -> str | None:
    """Whether outputs and gradients are the reference's."""
    off = excess(trial, found)
    wrong = [name for name in found.tensors if not off.get(name, 0.0) < 1]
    if not wrong:
        return None
    again = execute(trial, kernel, backward=trial.differentiable)
    moved = [name for name, x in found.tensors.items() if not same(x, again.tensors[name])]
    if moved:
        return f"it gives other numbers each time on the same input: {', '.join(moved)}"
    dense = {name: x.contiguous() for name, x in trial.leaves.items()}
    if any(x is not trial.leaves[name] for name, x in dense.items()):
        other = dataclasses.replace(trial, leaves=dense)
        if max(excess(other, execute(other, kernel, backward=trial.differentiable)).values()) < 1:
            return "it reads its inputs as if they were contiguous: it is right when they are"
    outputs = [name for name in wrong if name in found.outputs]
    worst = max(outputs or wrong, key=off.__getitem__)
    size = how_far(trial, found, worst, off[worst])
    limit = trial.tolerance(found.tensors[worst].dtype)
    farthest = max(off[name] * limit for name in wrong)
    if trial.spec.dtype == torch.float64 and limit < farthest < IN_FLOAT32:
        return Remark(f"it computes in float32 what is float64: its {worst} {size}")
    if outputs:
        return named(trial, dict(found.outputs)) or f"its {worst} {size}"
    if found.unreached:
        return f"no gradient reaches {', '.join(sorted(found.unreached))}: it detaches them"
    inputs = ", ".join(name.removeprefix("d") for name in wrong)
    if any(off[name] == math.inf for name in wrong):
        return f"its output is right and its backward pass gives NaN: in the gradient of {inputs}"
    if (known := named_backward(trial, found.tensors)) is not None:
        return known
    words = f"its output is right and its backward pass is not: the gradient of {inputs} {size}"
    fault = named_gradient(trial, found)
    return words if fault is None else f"{words}: {fault}"


def how_far(trial: Trial, found: Result, name: str, share: float) -> str:
    """How far one result is off, where, and whether it has been rounded."""
    x = found.tensors[name]
    limit = trial.tolerance(x.dtype)
    right = execute(
        trial, reference_of(trial), torch.float64, backward=name not in found.outputs
    ).tensors[name]
    size = f"is off by {share * limit:.1e} of its largest value, {limit:.0e} allowed"
    if not x.isfinite().all() and right.isfinite().all():
        size = "is NaN or infinite where it should not be"
    narrow = narrow_dtype(x)
    if narrow is not None and not torch.equal(right.to(narrow).to(right), right):
        size += f"; its numbers have been rounded to {str(narrow).removeprefix('torch.')}"
    return size + where(x, right, limit * float(right.abs().max()))
