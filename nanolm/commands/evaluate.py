"""`nanolm evaluate RUN`: a checkpoint's loss, perplexity, bits per byte and accuracy on a split.

The same figures for every world and batch size; `torchrun -m nanolm evaluate RUN` shares the rows.
"""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from nanolm.commands.figures import write_json
from nanolm.commands.train import build_evaluator
from nanolm.config import Config
from nanolm.distributed import close, launch
from nanolm.engine import Engine
from nanolm.saved import open_saved

POSITIONAL = ("run",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a checkpoint on a prepared split."""

    run: str
    """Folder of a run or of a checkpoint."""
    split: str = "val"
    """train, val or test."""
    data: str | None = None
    """Prepared folder to evaluate on; null means the one that the run was trained on."""
    batches: int | None = None
    """Batches to use; null for the whole split."""
    batch: int | None = None
    """Rows per batch; null means the run's own."""
    ema: bool = True
    """Use the moving average of the weights when the run kept one."""
    device: str = "auto"
    """auto, cpu or cuda."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


def with_evaluation(config: Config, arguments: Arguments) -> Config:
    """The run's config with the data and the batches that the user asked for."""
    data = config.data
    if arguments.data is not None:
        data = dataclasses.replace(data, path=arguments.data, corpora=[])
    rows = dataclasses.replace(
        config.eval,
        batches=arguments.batches,
        batch=arguments.batch or config.eval.batch,
    )
    return dataclasses.replace(config, data=data, eval=rows)


def run(arguments: Arguments) -> None:
    """Evaluate and print."""
    saved = open_saved(arguments.run, phase="train", plugins=arguments.plugins, ema=arguments.ema)
    config = with_evaluation(saved.config, arguments)
    world = launch(config.distributed, arguments.device)
    objective = saved.learner.objective
    evaluate = build_evaluator(config, objective, saved.tokenizer, world, arguments.split)
    figures = evaluate(Engine(saved.learner.to(world.device), world, config)) or {}
    if world.is_main:
        table = Table("figure", f"{arguments.split} split")
        for name, value in figures.items():
            table.add_row(name, f"{value:.6g}")
        Console().print(table)
        described = {"run": arguments.run, "checkpoint": saved.folder.name}
        write_json(arguments.json, described | {"split": arguments.split} | figures)
    close(world)
