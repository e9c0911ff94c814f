"""Diagnosis of a step that is not finite: the first bad tensor, in the order of computation.

Weights first, then the modules' outputs in a repeated forward pass with the same random numbers,
then this rank's own gradients, before they are summed with the others', from the loss backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.distributed.sharding import local
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from nanolm.training.gradient import share_of_total

KINDS = ("weight", "output", "gradient", "summed", "none")
"""First words of a finding, the earliest in the computation first."""


def first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds a NaN or infinity."""
    return next((name for name, t in named if not bool(torch.isfinite(t).all())), None)


def find_tensor(
    engine: Engine, micro_batches: Sequence[MicroBatch], seed: int, counts: Mapping[str, float]
) -> str:
    """Names the first non-finite tensor of the step; collective when the weights are sharded.

    `counts` are the step's global target counts, `seed` that of this rank's random numbers.
    """
    weight = first_bad((n, local(p)) for n, p in engine.learner.named_parameters())
    torch.manual_seed(seed)
    outputs = [_first_bad_output(engine, batch) for batch in micro_batches]
    output = next((name for name in outputs if name), None)
    torch.manual_seed(seed)
    gradient = None if engine.sharded else _local_gradients(engine, micro_batches, counts)
    # After the ranks' sum a bad gradient is everybody's, and accuses no rank.
    summed = first_bad(
        reversed([(n, local(p.grad)) for n, p in _trained(engine) if p.grad is not None])
    )
    if weight:
        return f"weight {weight}"
    if output:
        return f"output of {output}"
    if gradient:
        return f"gradient of {gradient}"
    return f"summed gradient of {summed}" if summed else "none on this rank"


def _trained(engine: Engine) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in engine.learner.named_parameters() if p.requires_grad]


def _local_gradients(
    engine: Engine, micro_batches: Sequence[MicroBatch], counts: Mapping[str, float]
) -> str | None:
    bad = (_first_bad_gradient(engine, batch, counts) for batch in micro_batches)
    return next((name for name in bad if name), None)


def _first_bad_output(engine: Engine, batch: MicroBatch) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
            if not found and first_bad(("", t) for t in floats) is not None:
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in engine.learner.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            terms = engine.local(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        found += [f"loss term {n}" for n, t in terms.items() if not bool(torch.isfinite(t.sum))]
    return found[0] if found else None


def _first_bad_gradient(
    engine: Engine, batch: MicroBatch, counts: Mapping[str, float]
) -> str | None:
    """Gradients of this micro-batch by autograd.grad, which leaves `.grad` and DDP alone."""
    total = share_of_total(engine.local(batch), engine.learner.objective.weights, counts)
    named = _trained(engine)
    gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    pairs = [(n, g) for (n, _), g in zip(named, gradients, strict=True) if g is not None]
    return first_bad(reversed(pairs))
