"""`nanolm profile --config …`: where the time of one training step goes.

Builds the run as `nanolm train` would (the same keys), takes two steps to warm up, and records the
next one with PyTorch's profiler: a table of operators, the step's phases, and a Chrome trace to
open in https://ui.perfetto.dev. Nothing is written to the run's folder but `profile/`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from nanolm import pretrain
from nanolm.build import build_tokenizer
from nanolm.config.load import load_config
from nanolm.distributed.world import close, launch
from nanolm.run import rehearse
from nanolm.tables import show, tables
from nanolm.tools.trace import write_trace
from nanolm.training.phases import PHASES
from nanolm.training.trainer import Trainer

WARM_UP = 2
MOST = 20
"""Operators of the table."""


def main(argv: list[str]) -> None:
    """Reads the command line of `nanolm train` and profiles."""
    config = load_config(argv, prog="nanolm profile")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    world = launch(config.distributed, config.run.device, "--run.device")
    with tempfile.TemporaryDirectory() as scratch:
        plan = pretrain.plan(dataclasses.replace(config, resume="never"), build_tokenizer(config))
        trainer = rehearse(plan, world, pathlib.Path(scratch), lambda line: None)
        run = pathlib.Path(config.run.dir)
        told = record(trainer, run / "profile" / f"rank-{world.rank}.json")
    if world.is_main:
        show(*told)
    close(world)


def record(trainer: Trainer, trace: pathlib.Path) -> list[Table | str]:
    """Takes the steps and writes the trace of the last; returns what to show; collective."""
    activities = [ProfilerActivity.CPU]
    if trainer.world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    batches = iter(trainer.loader_factory(0))
    trainer.engine.warm_up_ddp(
        trainer.engine.pad_passes(first := next(batches))[0], trainer.weights
    )
    trainer.step(trainer.engine.pad_passes(first))
    for _ in range(WARM_UP - 1):
        trainer.step(trainer.engine.pad_passes(next(batches)))
    trainer.progress.take_seconds()
    with profile(activities=activities) as profiler:
        trainer.progress.enter("data", trainer.state.done + 1)
        trainer.step(trainer.engine.pad_passes(next(batches)))
    phases = trainer.progress.take_seconds()
    write_trace(profiler, trace)
    shares = ", ".join(f"{phase} {phases[f'{phase}_seconds'] * 1e3:.1f} ms" for phase in PHASES)
    return [
        *operators(profiler, len(activities) > 1),
        f"step: {shares}",
        f"trace: {trace} (open it in https://ui.perfetto.dev)",
    ]


def operators(profiler: profile, on_device: bool) -> list[Table]:
    """The operators that took most time by themselves, without those that they call; where there is
    a device by its time, else by the CPU's."""
    averages = profiler.key_averages()
    own = {"CPU": "self_cpu_time_total"}
    if on_device:
        own = {"GPU": "self_device_time_total", **own}
    first = next(iter(own.values()))
    slowest = sorted(averages, key=lambda each: -getattr(each, first))[:MOST]
    whole = {key: sum(getattr(each, key) for each in averages) or 1 for key in own.values()}
    head = ["operator", "calls", "total ms"]
    for place in own:
        head += [f"{place} ms", f"{place} %"]
    rows = []
    for each in slowest:
        times = [f"{each.cpu_time_total / 1e3:.3f}"]
        for key in own.values():
            took = getattr(each, key)
            times += [f"{took / 1e3:.3f}", f"{100 * took / whole[key]:.1f}"]
        rows.append([each.key, f"{each.count:,}", *times])
    return tables(head, rows)
