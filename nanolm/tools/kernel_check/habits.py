"""What a kernel must bear beside numbers: calls that are put otherwise than a plain training step.

evaluation   under torch.no_grad it gives what it gives in training
frozen       the gradient of one input alone, as adapters and frozen layers ask for it
layout       an incoming gradient of any strides: what stands behind the op decides
unchanged    an incoming gradient is read and not written: others read it too
accumulated  what stands in .grad is autograd's to add to
twice        a second backward pass through one call gives the same, or raises
overlapping  a call's results stay right when another call is made before its backward pass, as
             the layers of a model are called
released     nothing of a call is alive when its results are gone
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.diagnosis import same
from nanolm.tools.kernel_check.settings import one_call
from nanolm.tools.kernel_check.trial import Result, Trial, excess, execute, like, upstream
from nanolm.tools.kernel_check.variants import spread

Habit = Callable[[Any, Trial], str | None]
"""A sentence about a kernel on a trial, or None."""


def run(
    kernel: Any, trial: Trial, *wanted: str, standing: bool = False
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """(outputs, leaves) of one call in which the wanted leaves alone have gradients; `standing`:
    some stand in their `.grad` already, as those of the batch before."""
    leaves = {
        name: like(x, x.dtype).requires_grad_(name in wanted) for name, x in trial.leaves.items()
    }
    for name in wanted if standing else ():
        leaves[name].grad = torch.ones_like(leaves[name])
    region: Any = contextlib.nullcontext()
    if trial.autocast is not None:
        region = torch.autocast(torch.device(trial.spec.device).type, trial.autocast)
    with region, one_call():
        return trial.run(kernel, leaves), leaves


def differentiated(
    kernel: Any,
    trial: Trial,
    wanted: tuple[str, ...],
    layout: Callable[[Tensor], Tensor],
    between: Callable[[], Any] = lambda: None,
) -> tuple[Result, list[str]]:
    """(gradients of some leaves for incoming ones of a layout, those that no gradient reaches);
    `between` is called behind the forward pass."""
    outputs, leaves = run(kernel, trial, *wanted)
    between()
    given = {
        name: layout(weight.to(outputs[name].dtype))
        for name, weight in upstream(outputs, trial.detached).items()
        if outputs[name].requires_grad
    }
    plain = {name: x.detach() for name, x in outputs.items()}
    if not given:
        return Result(plain, {}), list(wanted)
    roots, inputs = [outputs[name] for name in given], [leaves[name] for name in wanted]
    grads = torch.autograd.grad(roots, inputs, list(given.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return Result(plain, found), [name for name in wanted if name not in found]


def wrong(trial: Trial, result: Result) -> str:
    """The names of what is further off than it may be."""
    return ", ".join(name for name, share in excess(trial, result).items() if not share < 1)


def evaluation(kernel: Any, trial: Trial) -> str | None:
    """Outputs under torch.no_grad, and inputs behind the call: nothing hinders a kernel there from
    writing into them."""
    inputs = {**trial.leaves, **trial.constants}
    before = {name: x.clone() for name, x in inputs.items()}
    with torch.no_grad():
        found = execute(trial, kernel, backward=False)
    changed = [name for name, x in inputs.items() if not same(x, before[name])]
    for name, x in inputs.items():
        x.copy_(before[name])
    if changed:
        return f"under torch.no_grad it changes its input in place: {', '.join(changed)}"
    if any(x.is_inference() for x in found.outputs.values()):
        return (
            "under torch.no_grad it gives inference tensors, which no later training step may keep"
        )
    names = wrong(trial, found)
    return f"under torch.no_grad its {names} is wrong" if names else None


def frozen(kernel: Any, trial: Trial) -> str | None:
    """The gradient of each input when the others have none."""
    for name in trial.leaves:
        result, missed = differentiated(kernel, trial, (name,), lambda x: x)
        if missed:
            return f"no gradient reaches {name} when the other inputs are frozen"
        if f"d{name}" in wrong(trial, result).split(", "):
            return f"the gradient of {name} is wrong when the other inputs are frozen"
    return None


def layout(kernel: Any, trial: Trial) -> str | None:
    """Gradients when the incoming one has gaps between its numbers."""
    wanted = tuple(trial.leaves)
    names = wrong(trial, differentiated(kernel, trial, wanted, spread)[0])
    if not names or wrong(trial, differentiated(kernel, trial, wanted, lambda x: x)[0]):
        return None  # right, or wrong in any layout, which parity tells
    return (
        f"it reads an incoming gradient as if that were contiguous: with gaps between its numbers "
        f"{names} is wrong"
    )


def unchanged(kernel: Any, trial: Trial) -> str | None:
    """The incoming gradients behind the backward pass."""
    handed: list[tuple[Tensor, Tensor]] = []

    def noted(x: Tensor) -> Tensor:
        handed.append((x, x.clone()))
        return x

    differentiated(kernel, trial, tuple(trial.leaves), noted)
    if all(torch.equal(x, before) for x, before in handed):
        return None
    return "its backward pass changes the incoming gradient in place: others read that too"


def taken(outputs: Mapping[str, Tensor], trial: Trial) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs that have a gradient, what comes in for each)."""
    given = upstream(outputs, trial.detached)
    roots = {name: x for name, x in outputs.items() if name in given and x.requires_grad}
    return list(roots.values()), [given[name].to(x.dtype) for name, x in roots.items()]


def accumulated(kernel: Any, trial: Trial) -> str | None:
    """What stands in `.grad` is autograd's to add to: the backward pass returns its gradients."""
    for standing in (False, True):
        outputs, leaves = run(kernel, trial, *trial.leaves, standing=standing)
        roots, given = taken(outputs, trial)
        if roots:
            torch.autograd.grad(roots, list(leaves.values()), given, allow_unused=True)
        for name, x in leaves.items():
            kept = x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
            if not (kept if standing else x.grad is None):
                return (
                    f"it writes into the .grad of {name} by itself: a backward pass returns its "
                    f"gradients, and autograd adds them"
                )
    return None


def twice(kernel: Any, trial: Trial) -> str | None:
    """A second backward pass through one call: the same gradients, unless it says that there are
    none."""
    outputs, leaves = run(kernel, trial, *trial.leaves)
    roots, given = taken(outputs, trial)
    if not roots:
        return None
    plain = {name: x.detach().clone() for name, x in outputs.items()}
    found = []
    for _ in range(2):
        try:
            grads = torch.autograd.grad(
                roots, list(leaves.values()), given, retain_graph=True, allow_unused=True
            )
        except RuntimeError:
            return None  # it can be taken once, and says so; parity has told of a first one
        pairs = zip(leaves, grads, strict=True)
        found.append({name: grad.clone() for name, grad in pairs if grad is not None})
    first, second = (wrong(trial, Result(plain, grads)) for grads in found)
    if first or not second:
        return None
    return (
        f"its backward pass changes what it kept: when it is taken again (retain_graph=True), "
        f"{second} is wrong"
    )


def overlapping(kernel: Any, trial: Trial) -> str | None:
    """A call with another one, on the same shapes, between its forward and its backward pass."""
    wanted = tuple(trial.leaves) if trial.differentiable else ()
    other = {name: x.flip(0).mul(-0.5) for name, x in trial.leaves.items()}
    second = dataclasses.replace(trial, leaves=other)

    def found(between: Callable[[], Any]) -> str:
        return wrong(trial, differentiated(kernel, trial, wanted, lambda x: x, between)[0])

    names = found(lambda: run(kernel, second, *wanted))
    if not names or found(lambda: None):
        return None  # right, or wrong without another call, which parity tells
    return (
        f"its calls share memory: when another one is made before its backward pass, {names} is "
        f"wrong"
    )


def made_of_inputs(kernel: Any, trial: Trial, wanted: tuple[str, ...]) -> Tensor | None:
    """A tensor that is alive after a call and is another one after a call with other numbers of the
    same shapes. (What is the same after both, as places 0, 1, 2, … are, is no memory of a call.)"""
    other = {name: x.flip(0).mul(-0.5) for name, x in trial.leaves.items()}

    def left(called: Trial) -> list[Tensor]:
        run(kernel, called, *wanted)
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is Tensor and x.device.type != "meta"]

    gc.freeze()  # what is older than the calls is not looked through
    try:
        once = [(x, x.detach().clone()) for x in left(trial)]
        again = left(dataclasses.replace(trial, leaves=other))
    finally:
        gc.unfreeze()
    kept = {id(x) for x, _ in once} | {id(copy) for _, copy in once}
    changed = [x for x, copy in once if x.shape != copy.shape or not same(x.detach(), copy)]
    constants = [copy for x, copy in once if not any(x is y for y in changed)]
    new = [
        x
        for x in again
        if id(x) not in kept
        and not any(x.shape == y.shape and same(x.detach(), y) for y in constants)
    ]
    return next(iter(changed + new), None)


def released(kernel: Any, trial: Trial) -> str | None:
    """What is alive of a call when nobody holds its results any more."""
    wanted = tuple(trial.leaves) if trial.differentiable else ()
    gc.freeze()  # what is older than the call is not looked through
    try:
        outputs, leaves = run(kernel, trial, *wanted)
        named = [*outputs.items(), *leaves.items()]
        watched = [(name, weakref.ref(x)) for name, x in named]
        given = [(name, weakref.ref(x)) for name, x in outputs.items()]
        gc.disable()
        del outputs, leaves, named
        # Of outputs only: torch's own compiler leaves its inputs to the collector (flex).
        waiting = living(given)
        gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    alive = living(watched)
    if alive:
        return f"it keeps {', '.join(alive)} after the call: memory grows with every step"
    if waiting:
        return (
            f"it holds its {', '.join(waiting)} in a circle of references (an attribute of ctx; "
            f"ctx.save_for_backward makes none): memory waits for Python's garbage collector"
        )
    kept = made_of_inputs(kernel, trial, wanted)
    if kept is None:
        return None
    return (
        f"it keeps a tensor of {list(kept.shape)} after the call, made of its inputs: nothing is "
        f"remembered from one call to the next"
    )


def living(watched: Sequence[tuple[str, weakref.ref[Tensor]]]) -> list[str]:
    """The names of what is still alive."""
    return sorted({name for name, reference in watched if reference() is not None})


OF_TRAINING: dict[str, Habit] = {
    habit.__name__: habit for habit in (frozen, layout, unchanged, accumulated, twice)
}
"""Of a backward pass: a kernel that has none is not asked about them."""
HABITS: dict[str, Habit] = {
    "evaluation": evaluation, **OF_TRAINING, "overlapping": overlapping, "released": released
}  # fmt: skip


def others(x: Tensor) -> Tensor:
    """Other numbers in x's place."""
    turned = x.flip(0) if len(x) > 1 else x.flip(*range(x.dim()))
    return turned.mul(-0.5) if x.is_floating_point() else turned


def in_place(kernel: Any, trial: Trial, fault: Habit) -> str | None:
    """A second call after the same tensors were given other numbers, as an optimiser gives them,
    in training and under torch.no_grad."""
    inputs = {**trial.leaves, **trial.constants}
    before = {name: x.clone() for name, x in inputs.items()}
    execute(trial, kernel, backward=trial.differentiable)
    evaluation(kernel, trial)
    try:
        for x in inputs.values():
            x.copy_(others(x))
        words = fault(kernel, dataclasses.replace(trial)) or evaluation(kernel, trial)
    finally:
        for name, x in inputs.items():
            x.copy_(before[name])
    return words and f"after its inputs were given other numbers in place: {words}"
