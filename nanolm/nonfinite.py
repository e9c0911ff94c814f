"""A loss or gradient that is not finite: who saw it first, on which rows, and what to do.

All ranks see the same reduced loss and gradient norm, so they agree without asking. The step's
rows go to `nonfinite.jsonl`; the search for the first bad tensor repeats the forward pass, with the
same random numbers, on the ranks whose own loss was bad.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.config import TrainConfig
from nanolm.distributed import World
from nanolm.engine import Engine
from nanolm.errors import UserError


def first_bad(named: Any) -> str | None:
    """Name of the first tensor that holds a NaN or infinity."""
    return next((name for name, t in named if not bool(torch.isfinite(t).all())), None)


def find_tensor(engine: Engine, micro_batches: Sequence[Any], seed: int) -> str:
    """Names the first non-finite tensor of the step, in the order in which it is computed.

    Weights first, then the modules' outputs in a repeated forward pass, then gradients.
    """
    weight = first_bad(engine.learner.named_parameters())
    if weight is not None:
        return f"weight {weight}"
    torch.manual_seed(seed)
    for batch in micro_batches:
        found = _first_bad_output(engine, batch)
        if found is not None:
            return f"output of {found}"
    gradients = [(n, p.grad) for n, p in engine.learner.named_parameters() if p.grad is not None]
    gradient = first_bad(reversed(gradients))
    return f"gradient of {gradient}" if gradient else "none on this rank"


def _first_bad_output(engine: Engine, batch: Any) -> str | None:
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


class NonFinitePolicy:
    """Stop, or skip with a limit; `skips` counts the steps skipped in a row."""

    def __init__(self, train: TrainConfig, world: World, run: pathlib.Path) -> None:
        self.train, self.world, self.run = train, world, run
        self.skips = 0

    def refuse(self, engine: Engine, micro_batches: Sequence[Any], step: int, seed: int) -> str:
        """Writes down a bad step; returns the sentence to log when the run may go on; collective.

        Raises UserError, on all ranks, when it may not.
        """
        sentence = self._report(engine, micro_batches, step, seed)
        self.skips += 1
        if self.train.nonfinite == "stop":
            raise UserError(f"{sentence}; lower optim.lr, or set train.nonfinite to skip")
        if self.skips > self.train.max_skips:
            limit = self.train.max_skips
            raise UserError(f"{sentence}; train.max_skips={limit} steps in a row were skipped")
        return f"{sentence}; skipped ({self.skips} in a row)"

    def _report(self, engine: Engine, micro_batches: Sequence[Any], step: int, seed: int) -> str:
        rows = [int(row) for batch in micro_batches for row in batch.row_ids]
        mine = {"tensor": find_tensor(engine, micro_batches, seed), "rows": rows}
        ranks = self.world.gather(mine)
        # A gradient arrives summed, so it is bad on all ranks; a weight or an output says more.
        guilty = min(range(len(ranks)), key=lambda rank: _kind(ranks[rank]["tensor"]))
        tensor = ranks[guilty]["tensor"]
        culprits = [r for r in ranks if r["tensor"].startswith("output")] or ranks
        listed = [row for entry in culprits for row in entry["rows"]]
        record = {
            "step": step,
            "policy": self.train.nonfinite,
            "rank": guilty,
            "tensor": tensor,
            "rows": listed,
        }
        path = self.run / "nonfinite.jsonl"
        if self.world.is_main:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return (
            f"step {step}: loss or gradient is not finite; first non-finite tensor: {tensor} "
            f"(rank {guilty}); its {len(listed)} rows, {listed[0]} first, are listed in {path}"
        )


def _kind(tensor: str) -> int:
    return ("weight", "output", "gradient", "none").index(tensor.split(" ")[0])
