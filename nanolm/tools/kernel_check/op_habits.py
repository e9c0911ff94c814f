"""What kernels of one op alone must bear beside numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nanolm.tools.kernel_check.habits import Habit, run
from nanolm.tools.kernel_check.trial import Trial


def outside(kernel: Any, trial: Trial) -> str | None:
    """Targets that the vocabulary does not have: NaN, so that the guards of a run see them."""
    targets, vocab_size = trial.constants["targets"], len(trial.leaves["weight"])
    kept = targets.clone()
    try:
        for target in (vocab_size, -1):
            targets[0] = target
            outputs, leaves = run(kernel, trial, *(["hidden"] if trial.differentiable else []))
            values = {"loss": outputs["loss"], "nll": outputs["nll"][0]}
            if trial.differentiable:
                (grad,) = torch.autograd.grad(outputs["loss"], [leaves["hidden"]])
                values["gradient"] = grad[0]
            finite = [name for name, x in values.items() if not x.isnan().any()]
            if finite:
                return (
                    f"a target of {target}, outside the vocabulary of {vocab_size}, leaves its "
                    f"{', '.join(finite)} finite; NaN is due"
                )
            if not outputs["nll"][1:].isfinite().all():
                return "a target outside the vocabulary makes the nll of other tokens NaN too"
    finally:
        targets.copy_(kept)
    return None


def ties(kernel: Any, trial: Trial) -> str | None:
    """Where all logits are the same one class is the argmax, and not every class."""
    targets = trial.constants["targets"]
    kept = targets.clone()
    blank = {name: torch.zeros_like(x) for name, x in trial.leaves.items()}
    try:
        targets.copy_(torch.arange(len(targets)) % len(blank["weight"]))
        outputs, _ = run(kernel, dataclasses.replace(trial, leaves=blank))
        n_correct = int(outputs["correct"].sum())
    finally:
        targets.copy_(kept)
    if n_correct <= 1:
        return None
    return (
        f"where all logits are the same it calls {n_correct} classes right: one is the argmax, and "
        f"an untrained model would seem to know"
    )


OP_HABITS: dict[str, dict[str, Habit]] = {
    "linear_cross_entropy": {"outside": outside, "ties": ties}
}
