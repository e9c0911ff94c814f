"""One rank of one measurement of `nanolm bench scale` (`bench/ranks.py` starts them).

    torchrun … -m nanolm.tools.bench.scale_step '{"settings": …, "shape": …, …}' OUT

The ranks train as `nanolm train` does (its Loader, Engine and Trainer.step), on random rows; rank 0
writes the seconds of each measured step and of its phases, each the mean over ranks, to OUT.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from nanolm import build
from nanolm.config.schema import DistributedConfig
from nanolm.distributed.world import World, close, launch
from nanolm.files import write_json
from nanolm.run import Plan, rehearse
from nanolm.tools.bench.shape import Shape
from nanolm.tools.bench.step import nanolm_config, write_random_shard
from nanolm.tools.stand_in import stand_in_tokenizer
from nanolm.training.phases import PHASES
from nanolm.training.trainer import Trainer


def build_trainer(job: dict[str, Any], world: World, folder: pathlib.Path) -> Trainer:
    """The run's trainer; each rank makes the same random rows in a folder of its own."""
    shape = Shape(**job["shape"])
    write_random_shard(folder, shape)
    settings = job["settings"]
    config = nanolm_config(
        {"objective": settings["objective"]}, shape, settings["precision"], str(folder)
    )
    ranks = DistributedConfig(strategy=settings["strategy"])
    config = dataclasses.replace(config, distributed=ranks)
    objective = build.build_objective(config, stand_in_tokenizer(shape.vocab_size))
    stream = build.build_stream(config, objective, "train")
    plan = Plan(config=config, objective=objective, stream=stream)
    return rehearse(plan, world, folder / "run")


def measure(job: dict[str, Any], world: World, folder: pathlib.Path) -> dict[str, Any]:
    """{seconds: of each step, phases: {name: median over steps}}; collective."""
    trainer = build_trainer(job, world, folder)
    batches = trainer.loader_factory(0)
    seconds: list[float] = []
    phases: list[dict[str, float]] = []
    for number in range(job["warmup"] + job["steps"]):
        trainer.progress.take_seconds()
        begin = time.perf_counter()
        trainer.progress.enter("data", number + 1)
        micro_batches = trainer.engine.pad_passes(next(batches))
        if number == 0:
            trainer.engine.warm_up_ddp(micro_batches[0], trainer.weights)
        trainer.step(micro_batches)
        figures = trainer.progress.take_seconds()
        figures["seconds"] = time.perf_counter() - begin
        gathered = world.gather(figures)
        if number >= job["warmup"]:
            seconds.append(statistics.mean(rank["seconds"] for rank in gathered))
            phases.append(
                {
                    name: statistics.mean(rank[f"{name}_seconds"] for rank in gathered)
                    for name in PHASES
                }
            )
    medians = {name: statistics.median(step[name] for step in phases) for name in PHASES}
    return {"seconds": seconds, "phases": medians, "device": str(world.device)}


def main() -> None:
    """One process of the measurement: read the job, measure, write."""
    job, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    torch.set_num_threads(job["threads"])
    world = launch(DistributedConfig(), job["settings"]["device"])
    with tempfile.TemporaryDirectory() as folder:
        result = measure(job, world, pathlib.Path(folder))
    if world.is_main:
        write_json(out, result)
    close(world)


if __name__ == "__main__":
    main()
