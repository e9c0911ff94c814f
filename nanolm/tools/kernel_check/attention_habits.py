"""What attention kernels must bear beside numbers, as decoding, packed batches and models with
layers of several kinds call them.

frozen biases   the gradient of a bias when all else is frozen
own memory      an output shares no memory with an input, nor its numbers with each other
decoding        the output of one token stays right when the next one is decoded
graph kept      a second backward pass through the same graph gives the same gradients
written over    what was kept for the backward pass is overwritten: then autograd tells
NaN             of a query reaches its output, and no other query's
inference mode  a call under it leaves nothing that training stumbles over
other options   nothing of a call's mask, soft-cap or scale sticks to the next one
other masks     a mask is read anew when its numbers were changed in place
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.habits import frozen, run
from nanolm.tools.kernel_check.trial import Trial, distance, execute, upstream

Serves = Callable[[Case], Trial | None]
"""The trial of a case as the kernel serves it, or None where it refuses."""
Question = Callable[[Any, Serves], str | None]
"""A sentence about a kernel on what it serves, or None."""

CAUSAL = Case(causal=True)
ONE_TOKEN = Case(causal=True, n_queries=1, n_keys=37)


def sized(n: int, **features: Any) -> Case:
    """A case of a length that no other check has: a first call of these shapes."""
    return Case(n_queries=n, n_keys=n, **features)


def trials(serves: Serves, *cases: Case) -> Iterator[Trial]:
    """Those that are served."""
    yield from (trial for case in cases if (trial := serves(case)) is not None)


def weight_of(trial: Trial, out: Tensor) -> Tensor:
    """The incoming gradient that `execute` hands to a trial's output."""
    return upstream({"out": out}, trial.detached)["out"].to(out.dtype)


def frozen_biases(kernel: Any, serves: Serves) -> str | None:
    """Of a learned table and of a dense bias."""
    cases = (Case(bias="bucket"), Case(bias="dense_by_head"), Case(bias="learned_alibi"))
    found = (frozen(kernel, trial) for trial in trials(serves, *cases))
    return next((words for words in found if words is not None), None)


def own_memory(kernel: Any, serves: Serves) -> str | None:
    """Of one key the output is the value: its numbers, and not its memory."""
    sizes = ((1, 1), (67, 1), (1, 29))
    cases = [
        Case(n_queries=n_queries, n_keys=n_keys, causal=causal)
        for n_queries, n_keys in sizes
        for causal in (False, True)
    ]
    for trial in trials(serves, *cases):
        for given in ((), tuple(trial.leaves) if trial.differentiable else ()):
            outputs, leaves = run(kernel, trial, *given)
            out = outputs["out"].detach()
            for name, leaf in leaves.items():
                if out.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr():
                    return f"its output lies in the memory of {name}, and changes with it"
            if any(step == 0 and n > 1 for step, n in zip(out.stride(), out.shape)):
                return "its output is expanded: several of its numbers share one place in memory"
    return None


def decoding(kernel: Any, serves: Serves) -> str | None:
    """Two tokens, one after the other, without gradients."""
    for trial in trials(serves, ONE_TOKEN, dataclasses.replace(ONE_TOKEN, n_queries=3)):
        other = {name: x.flip(0).mul(-0.5) for name, x in trial.leaves.items()}
        with torch.no_grad():
            outputs, _ = run(kernel, trial)
            once = outputs["out"].clone()
            run(kernel, dataclasses.replace(trial, leaves=other))
        if not torch.equal(once, outputs["out"]):
            return "its calls share memory: the next call under torch.no_grad changes this output"
    return None


def graph_kept(kernel: Any, serves: Serves) -> str | None:
    """Two losses of one step go through the same graph, one after the other."""
    for trial in trials(serves, CAUSAL, Case(bias="bucket")):
        outputs, leaves = run(kernel, trial, *trial.leaves)
        out, inputs = outputs["out"], list(leaves.values())
        weight = weight_of(trial, out)
        once = [x.clone() for x in torch.autograd.grad(out, inputs, weight, retain_graph=True)]
        again = torch.autograd.grad(out, inputs, weight)
        pairs = zip(leaves, once, again, strict=True)
        changed = [name for name, a, b in pairs if not distance(b, a) < trial.tolerance(a.dtype)]
        if changed:
            return (
                f"its backward pass overwrites what it needs: a second one through the same graph "
                f"(retain_graph=True) gives another gradient of {', '.join(changed)}"
            )
    return None


def written_over(kernel: Any, serves: Serves) -> str | None:
    """The output or an input, changed in place between the two passes."""
    for trial in trials(serves, CAUSAL):
        right = execute(trial, kernel, backward=True).gradients
        for name in ("out", *trial.leaves):
            outputs, leaves = run(kernel, trial, *trial.leaves)
            tensors = {**outputs, **leaves}
            before = tensors[name].detach().clone()
            try:
                with torch.no_grad():
                    tensors[name].mul_(-0.5)
                grads = torch.autograd.grad(
                    outputs["out"], list(leaves.values()), weight_of(trial, outputs["out"])
                )
            except RuntimeError:
                continue  # it is told: "modified by an inplace operation"
            finally:
                with torch.no_grad():
                    tensors[name].copy_(before)
            pairs = zip(leaves, grads, strict=True)
            if any(not distance(x, right[leaf]) < trial.tolerance(x.dtype) for leaf, x in pairs):
                return (
                    f"it keeps {name} for its backward pass without save_for_backward: changed in "
                    f"place between the passes, that gives wrong gradients instead of an error"
                )
    return None


def not_a_number(kernel: Any, serves: Serves) -> str | None:
    """NaN in the last query of the first row."""
    for trial in trials(serves, CAUSAL, ONE_TOKEN):
        q = trial.leaves["q"].detach().clone()
        q[0, -1] = torch.nan
        outputs, _ = run(kernel, dataclasses.replace(trial, leaves=trial.leaves | {"q": q}))
        nan = outputs["out"].isnan()
        if not nan[0, -1].all():
            return "NaN in a query gives numbers: the guards of a run look for NaN, and find none"
        nan[0, -1] = False
        if nan.any():
            return "NaN in one query makes the output of other queries NaN"
    return None


def inference_mode(kernel: Any, serves: Serves) -> str | None:
    """An evaluation, and a training step on the same shapes, which no other check has."""
    cases = (sized(23, causal=True, bias="learned_alibi"), sized(23, window=5, bias="bucket"))
    for trial in trials(serves, *cases):
        with torch.inference_mode():
            trial.run(kernel, trial.leaves)
        try:
            words = fault(kernel, trial)
        except RuntimeError as error:
            words = f"it raises {type(error).__name__}: {error}"
        if words is not None:
            return f"after a call under torch.inference_mode: {words}"
    return None


OPTIONS = {
    "window": (sized(21, window=5), sized(21, window=9)),
    "causality": (sized(22), sized(22, causal=True)),
    "soft-cap": (sized(24, softcap=3.0), sized(24, softcap=1.0)),
    "scale": (sized(25), sized(25, sharpness=0.4)),
    "mask": (sized(26, lengths=True), sized(26, documents=True)),
    "bias": (sized(27, bias="alibi"), sized(27, bias="bucket")),
}
"""Two problems on the same shapes, by what is different."""


def other_options(kernel: Any, serves: Serves) -> str | None:
    """Layers of several kinds, in one model and of the same shapes."""
    for name, cases in OPTIONS.items():
        pair = list(trials(serves, *cases))
        if len(pair) < 2 or fault(kernel, pair[0]) is not None:
            continue  # refused, or wrong by itself, which parity tells
        for trial in (pair[1], pair[0]):
            words = fault(kernel, trial)
            if words is not None:
                return f"after a call with another {name} on the same shapes: {words}"
    return None


def other_masks(kernel: Any, serves: Serves) -> str | None:
    """A mask whose tensors are filled anew, as static buffers of captured graphs are."""
    for trial in trials(serves, sized(28, n_rows=3, lengths=True), sized(28, documents=True)):
        if fault(kernel, trial) is not None:
            continue
        before = {name: x.clone() for name, x in trial.constants.items()}
        try:
            for name, x in trial.constants.items():
                x.copy_(before[name].flip(0, -1) if x.dim() > 1 else before[name].flip(0))
            words = fault(kernel, dataclasses.replace(trial))
        finally:
            for name, x in trial.constants.items():
                x.copy_(before[name])
        if words is not None:
            return f"after the numbers of its mask were changed in place: {words}"
    return None


OF_TRAINING: dict[str, Question] = {
    "frozen biases": frozen_biases,
    "graph kept": graph_kept,
    "written over": written_over,
}
"""Of a backward pass: asked of what is served in training."""
QUESTIONS: dict[str, Question] = {
    **OF_TRAINING,
    "own memory": own_memory,
    "decoding": decoding,
    "NaN": not_a_number,
    "inference mode": inference_mode,
    "other options": other_options,
    "other masks": other_masks,
}
