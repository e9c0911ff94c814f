"""A process group of one rank over nccl: DDP's hook and FSDP2, with the steps of a run without one.

    python -m nanolm.tools.first_contact.groups [--device cpu] [--json FILE]

A machine with one GPU can join no two ranks over nccl, but the ways of many ranks can be gone by
one: its gradients pass DDP's buckets and our hook, its weights are gathered and scattered by FSDP2.
Summed over one rank nothing may change. On a CPU the group is gloo's.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from nanolm.distributed.devices import device_type
from nanolm.distributed.world import World, close
from nanolm.terminal import say
from nanolm.tools.bench.scale_step import build_trainer
from nanolm.tools.first_contact.measurement import Figures, enter

SHAPE = {"n_layers": 2, "d_model": 128, "n_heads": 2, "row_length": 128, "batch": 8}
SHAPE |= {"vocab_size": 512}
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}
LIMITS = {"fp32": 1e-5, "bf16": 5e-3}
"""Largest difference of a loss of about 6, or of a gradient's norm of about 1. FSDP2 rounds weights
to bf16 where autocast rounds products' inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where, and for how long."""

    device: str = "cuda"
    """Device type."""
    steps: int = 5
    """Optimizer steps of each run."""
    json: str | None = None
    """Also write a line of JSON for each strategy to this file."""


def group_of_one(device: torch.device) -> World:
    """This process, alone in groups as many ranks have them: nccl's on CUDA, gloo's for control."""
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=device if on_cuda else None,
    )
    return World(device=device, control=dist.new_group(backend="gloo"))


def trained(
    world: World, strategy: str, precision: str, steps: int
) -> tuple[torch.nn.Module, list[float]]:
    """The module that was called, and loss and gradient norm of each step, one after the other:
    Adam forgives a gradient that is too large, its norm does not."""
    settings = {"objective": "clm", "precision": precision, "strategy": strategy}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer({"shape": SHAPE, "settings": settings}, world, pathlib.Path(folder))
        batches = trainer.loader_factory(0)
        for turn in range(steps):
            micro_batches = trainer.engine.pad_passes(next(batches))
            if turn == 0:
                trainer.engine.warm_up_ddp(micro_batches[0], trainer.weights)
            result = trainer.step(micro_batches)
            found += [result.loss, result.grad_norm]
        batches.close()
    return trainer.engine.module, found


def run(arguments: Arguments) -> int:
    """Trains without and with the groups, prints and writes; 1 when losses differ."""
    figures, good = Figures(arguments.json), True
    kind = device_type(arguments.device)
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    steps = arguments.steps
    plain = {name: trained(World(device=device), "ddp", name, steps)[1] for name in LIMITS}
    world = group_of_one(device)
    for strategy, wrapper in WRAPPERS.items():
        for precision, limit in LIMITS.items():
            module, found = trained(world, strategy, precision, steps)
            far = max(abs(a - b) for a, b in zip(found, plain[precision], strict=True))
            right = far <= limit and isinstance(module, wrapper)
            words = f"{type(module).__name__}, {precision}, a group of one over "
            words += f"{dist.get_backend()}: {steps} losses and gradient norms at most {far:.1e} "
            words += f"from those without a group, {limit:.0e} allowed"
            figures.add({"ok": right, "words": words, "losses": found[::2], "far": far})
            say(f"{'ok  ' if right else 'FAIL'} {words}")
            good &= right
    close(world)
    return int(not good)


if __name__ == "__main__":
    enter(Arguments, run, "groups")
