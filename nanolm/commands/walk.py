"""`nanolm walk RUN`: one real row of a run on its way through one optimizer step.

    text -> pieces -> ids -> shifted or masked -> x -> q, k, v -> one query's scores -> hidden
    -> logits -> loss -> gradient -> step

The step is taken as the run took it, from the checkpoint before it (as `nanolm doctor` does), with
hooks on the run's own modules; each stop names the functions that did it, by file and line. Nothing
is written to the run.
"""

from __future__ import annotations

import dataclasses
import pathlib

import torch

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Amount, Count
from nanolm.distributed.devices import DeviceWord, device_type
from nanolm.distributed.world import World
from nanolm.saved import read_config
from nanolm.tables import open_console
from nanolm.tools.walk.page import write_page
from nanolm.tools.walk.run import walk
from nanolm.tools.walk.terminal import show

POSITIONAL = ("run",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Follow one row of a causal or masked language model through one training step."""

    run: str
    """Folder of the run."""
    step: Count | None = None
    """The step to take, the first is 1; null: the one after the newest checkpoint, but that of the
    end."""
    position: Amount | None = None
    """Position in the row whose prediction is looked at; null: one in the middle."""
    layer: Amount = 0
    """Block whose attention is looked at; the first is 0."""
    head: Amount = 0
    """Head of it; the first is 0."""
    html: str | None = None
    """Also write the walk to this file, as a page that needs nothing else."""
    device: DeviceWord = "cpu"
    """auto takes CUDA where it is there."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the run was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Take the step and tell it."""
    device = device_type(arguments.device)
    folder = pathlib.Path(arguments.run)
    config = read_config(folder, arguments.plugins)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    taken = walk(
        folder,
        config,
        World(device=torch.device(device)),
        step=arguments.step,
        position=arguments.position,
        layer=arguments.layer,
        head=arguments.head,
    )
    title = f"step {taken.step} of {folder} ({config.objective.name}), {taken.notes[0]}"
    show(open_console(highlight=False), title, taken.stops)
    if arguments.html is not None:
        write_page(title, taken.stops, pathlib.Path(arguments.html))
    write_json(
        arguments.json,
        {
            "run": str(folder),
            "step": taken.step,
            **{
                stop.name: stop.figures | {"places": [str(place) for place in stop.places]}
                for stop in taken.stops
            },
        },
    )
