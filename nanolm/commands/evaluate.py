"""`nanolm evaluate RUN`: a checkpoint's figures on a split.

A pretrained model gives loss, perplexity, bits per byte and accuracy on the val split; a fine-tuned
one its task's metrics on the test split (`task_report.py`). The same figures for every world and
batch size; `torchrun -m nanolm evaluate RUN` shares the rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from nanolm.commands.figures import write_json
from nanolm.commands.train import build_evaluator
from nanolm.config import Config
from nanolm.distributed import World, close, launch
from nanolm.engine import Engine
from nanolm.saved import Saved, open_saved
from nanolm.task_config import TaskConfig
from nanolm.task_report import evaluate_task

POSITIONAL = ("run",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a checkpoint on a prepared split."""

    run: str
    """Folder of a run or of a checkpoint."""
    split: str | None = None
    """train, val or test; null: val of a pretrained model, test of a fine-tuned one."""
    data: str | None = None
    """Prepared folder (or, fine-tuned, a table) to evaluate on; null means the run's own."""
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
    world = launch(saved.config.distributed, arguments.device)
    described = {"run": arguments.run, "checkpoint": saved.folder.name}
    if isinstance(saved.config, TaskConfig):
        figures = evaluate_task(
            saved, world, split=arguments.split, data=arguments.data, batch=arguments.batch
        )
    else:
        figures = evaluate_pretrained(saved, world, arguments)
    if world.is_main:
        write_json(arguments.json, described | figures)
    close(world)


def evaluate_pretrained(saved: Saved, world: World, arguments: Arguments) -> dict[str, Any]:
    """The split and its figures, printed."""
    config, split = with_evaluation(saved.config, arguments), arguments.split or "val"
    objective = saved.learner.objective
    evaluate = build_evaluator(config, objective, saved.tokenizer, world, split)
    figures = evaluate(Engine(saved.learner.to(world.device), world, config)) or {}
    if world.is_main:
        table = Table("figure", f"{split} split")
        for name, value in figures.items():
            table.add_row(name, f"{value:.6g}")
        Console().print(table)
    return {"split": split} | figures
