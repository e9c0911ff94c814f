"""`nanolm doctor RUN STEP`: take one step of a run again and say what is wrong with it.

Starts from the newest checkpoint before the step, replays the steps between (the order of rows,
masks and dropout are pure functions of the step, and steps that the run skipped are skipped), then
looks into the step itself: weights, every module's output, the loss, this rank's gradients. Nothing
is written to the run. Launched with as many ranks as the run had (`torchrun -m nanolm doctor …`)
the replay is exact; with another number it agrees to rounding, and says so.

`nanolm doctor --gpu`: the first command on a machine with a GPU (`gpu_check.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nanolm import build
from nanolm.checkpoint.checkpoints import Checkpoints, read_trainer
from nanolm.checkpoint.container import verify
from nanolm.checkpoint.run_folder import differences
from nanolm.commands.figures import write_json
from nanolm.config.load import dump
from nanolm.data.tokenizer import MODEL_FILE, Tokenizer
from nanolm.distributed.world import World, close, launch
from nanolm.errors import UserError, require
from nanolm.saved import read_config
from nanolm.tools.gpu_check import check_device
from nanolm.training.evaluation import total_loss
from nanolm.training.guards.diagnosis import find_tensor
from nanolm.training.guards.nonfinite import read_passed
from nanolm.training.loader import steps
from nanolm.training.trainer import Trainer

POSITIONAL = ("run", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Replay one step of a run and name its first non-finite tensor; or check a new GPU."""

    run: str | None = None
    """Folder of the run."""
    step: int | None = None
    """The step to look into, as the metrics and messages count: the first is 1."""
    gpu: bool = False
    """Check this machine's GPU instead: kernels, 20 losses against the CPU, one of two ranks
    killed; prints the lines for the README's column *on a GPU*."""
    device: str = "auto"
    """auto, cpu or cuda; with `gpu`, cpu stands in for one."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the run was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Check the GPU, or replay and print."""
    if arguments.gpu:
        check_gpu(arguments, "cpu" if arguments.device == "cpu" else "cuda")
        return
    require(
        arguments.run is not None and arguments.step is not None,
        "doctor needs a run and a step, `nanolm doctor RUN STEP`; or `nanolm doctor --gpu`",
    )
    folder = pathlib.Path(arguments.run)
    config = read_config(folder, arguments.plugins)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    world = launch(config.distributed, arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, batches, notes = prepare(arguments, config, folder, world, pathlib.Path(scratch))
        for note in notes if world.is_main else []:
            print(note)
        figures = examine(trainer, replay(trainer, batches, arguments.step))
    if world.is_main:
        table = Table("figure", f"step {arguments.step} of {folder}")
        for name, value in figures.items():
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
        Console().print(table)
        write_json(arguments.json, {"run": str(folder), "step": arguments.step, **figures})
    close(world)


def check_gpu(arguments: Arguments, device: str = "cuda") -> None:
    """All checks on the device; exits with 1 when one fails. Raises UserError without a GPU."""
    require(
        device == "cpu" or torch.cuda.is_available(),
        f"doctor --gpu: torch {torch.__version__} finds no GPU on this machine; run it where "
        f"`nvidia-smi` (or `rocminfo`) lists one, with a torch built for it",
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU as stand-in"
    verdicts = check_device(device)
    print(f"\nfor the README's column *on a GPU* ({name}, torch {torch.__version__}):")
    for verdict in verdicts:
        print(verdict.line(name))
    write_json(arguments.json, [dataclasses.asdict(verdict) for verdict in verdicts])
    if not all(verdict.passed for verdict in verdicts):
        raise SystemExit(1)


def prepare(
    arguments: Arguments, config: Any, folder: pathlib.Path, world: World, scratch: pathlib.Path
) -> tuple[Trainer, Any, list[str]]:
    """The run's trainer as it stood before the step, or at the last checkpoint before it."""
    start = checkpoint_before(folder, arguments.step)
    notes = [f"from {start}" if start else "from the initial weights"]
    # A bad step on the way is skipped as the run skipped it, and never ends the replay.
    skipping = dataclasses.replace(config.train, nonfinite="skip", max_skips=arguments.step)
    config = dataclasses.replace(config, train=skipping)
    source = start or next(iter(sorted(folder.glob("checkpoints/step-*"))), None)
    if source is None:
        raise UserError(f"run {folder} holds no checkpoint, so no tokenizer to read its rows with")
    tokenizer = Tokenizer.load(source / MODEL_FILE)
    objective = build.build_objective(config, tokenizer)
    stream = build.build_stream(config, objective, "train")
    learner = build.build_learner(config, objective, world.device)
    trainer = Trainer(
        config,
        learner,
        world,
        functools.partial(steps, config, stream, objective, world),
        checkpoints=Checkpoints(scratch, world),
        note=notes.append,
        files={"config.yaml": dump(config).encode()},
    )
    trainer.policy.passed = {step for step in read_passed(folder) if step < arguments.step}
    if start:
        trainer.restore(start)
        notes += differences(read_trainer(start)["environment"], world)
    return trainer, trainer.loader_factory(trainer.done), notes


def checkpoint_before(folder: pathlib.Path, step: int) -> pathlib.Path | None:
    """The newest checkpoint of a step before this one; raises UserError when it is damaged."""
    if step < 1:
        raise UserError(f"step={step}: the first step of a run is 1")
    checkpoints = Checkpoints(folder, World())
    earlier = [saved for saved in checkpoints.steps() if saved < step]
    if not earlier:
        return None
    verify(checkpoints.path(earlier[-1]))
    return checkpoints.path(earlier[-1])


def replay(trainer: Trainer, batches: Any, step: int) -> Sequence[Any]:
    """Takes the steps up to the given one again; returns that one's micro-batches, not taken."""
    first = True
    for micro_batches in batches:
        if first:
            trainer.engine.settle(micro_batches[0], trainer.weights)
            first = False
        if trainer.done + 1 == step:
            return micro_batches
        trainer.step(micro_batches)
    raise UserError(f"step {step} is beyond the data")


def examine(trainer: Trainer, micro_batches: Sequence[Any]) -> dict[str, Any]:
    """Loss, gradient norm, rows and first bad tensor of the trainer's next step; collective."""
    terms, norm, counts, _ = trainer.gradient(micro_batches)
    tensor = find_tensor(trainer.engine, micro_batches, trainer.seed(), counts)
    found = trainer.world.gather(
        {"tensor": tensor, "rows": [int(row) for b in micro_batches for row in b.row_ids]}
    )
    bad = [rank for rank, entry in enumerate(found) if not entry["tensor"].startswith("none")]
    return {
        "loss": total_loss(terms, trainer.weights),
        **terms,
        "grad_norm": norm,
        "first non-finite tensor": found[bad[0]]["tensor"] if bad else "none",
        "rank": bad[0] if bad else "none",
        "rows": [row for entry in found for row in entry["rows"]],
    }
