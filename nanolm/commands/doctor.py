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
import pathlib
import tempfile

import torch
from rich.table import Table

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.distributed.devices import DeviceWord
from nanolm.distributed.world import close, launch
from nanolm.errors import UserError, require
from nanolm.saved import read_config
from nanolm.tables import show
from nanolm.terminal import say
from nanolm.tools.gpu_check import check_device
from nanolm.tools.replay import examine, replay, trainer_before

POSITIONAL = ("run", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Replay one step of a run and name its first non-finite tensor; or check a new GPU."""

    run: str | None = None
    """Folder of the run."""
    step: Count | None = None
    """The step to look into, as the metrics and messages count: the first is 1."""
    gpu: bool = False
    """Check this machine's GPU instead: kernels, 20 losses against the CPU, 20 in bfloat16 against
    float32, one of two ranks killed; prints the lines for the column *on a GPU* of
    docs/evidence.md."""
    device: DeviceWord = "auto"
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
    step = arguments.step
    if arguments.run is None or step is None:
        raise UserError(
            "doctor needs a run and a step, `nanolm doctor RUN STEP`; or `nanolm doctor --gpu`"
        )
    folder = pathlib.Path(arguments.run)
    config = read_config(folder, arguments.plugins)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    world = launch(config.distributed, arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, notes = trainer_before(step, config, folder, world, pathlib.Path(scratch))
        for note in notes if world.is_main else []:
            say(note)
        figures = examine(trainer, replay(trainer, step))
    if world.is_main:
        say(f"step {arguments.step} of {folder}")
        table = Table("figure", "value")
        for name, value in figures.items():
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
        show(table)
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
    say(f"\nfor docs/evidence.md, column *on a GPU* ({name}, torch {torch.__version__}):")
    for verdict in verdicts:
        say(verdict.line(name))
    write_json(arguments.json, [dataclasses.asdict(verdict) for verdict in verdicts])
    if not all(verdict.passed for verdict in verdicts):
        raise SystemExit(1)
