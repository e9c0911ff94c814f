"""`nanolm evaluate RUN`: a checkpoint's figures on a split.

A pretrained model gives loss, perplexity, bits per byte and accuracy on the val split; a fine-tuned
one its task's metrics on the test split (`finetune/report.py`). The same figures for every world
and batch size; `torchrun -m nanolm evaluate RUN` shares the rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from nanolm.build import build_stream
from nanolm.checkpoint.facts import facts_of, require_same_facts
from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.config.schema import Config
from nanolm.data.tokenizer import MODEL_FILE
from nanolm.distributed.devices import DeviceWord
from nanolm.distributed.world import World, close, launch
from nanolm.errors import require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.ensemble import open_together
from nanolm.finetune.report import evaluate_task
from nanolm.finetune.several import part_of
from nanolm.finetune.tasks.multi import Multi
from nanolm.pretrain import evaluator_of
from nanolm.saved import Saved
from nanolm.tables import show, tables
from nanolm.training.engine import Engine

POSITIONAL = ("run",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a checkpoint on a prepared split."""

    run: str
    """Folder of a run or of a checkpoint."""
    ensemble: list[str] = dataclasses.field(default_factory=list)
    """Further runs of the same task, such as other seeds: their average with `run` answers."""
    average: Literal["logits", "weights"] = "logits"
    """What of an ensemble is averaged; weights need runs from the same pretrained weights."""
    split: str | None = None
    """train, val or test; null: val of a pretrained model, test of a fine-tuned one."""
    data: str | None = None
    """Prepared folder (or, fine-tuned, a table) to evaluate on; null means the run's own."""
    columns: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Which column of the table --data holds a field, where it has another name: {text: question};
    those of the run's own data.columns that it has are taken unless they are named here."""
    task: str | None = None
    """Which task of a run of several; null: all, one after the other."""
    batches: Count | None = None
    """Batches to use; null for the whole split."""
    batch: Count | None = None
    """Rows per batch; null means the run's own."""
    ema: bool = True
    """Use the moving average of the weights when the run kept one."""
    device: DeviceWord = "auto"
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
    saved = open_together(
        arguments.run,
        arguments.ensemble,
        arguments.average,
        phase="train",
        plugins=arguments.plugins,
        ema=arguments.ema,
    )
    world = launch(saved.config.distributed, arguments.device)
    described = {"run": arguments.run, "checkpoint": saved.folder.name}
    if isinstance(saved.config, TaskConfig):
        figures = evaluate_tasks(saved, world, arguments)
    else:
        figures = evaluate_pretrained(saved, world, arguments)
    if world.is_main:
        write_json(arguments.json, described | figures)
    close(world)


def evaluate_tasks(saved: Saved, world: World, arguments: Arguments) -> dict[str, Any]:
    """The figures of a fine-tuned run; of a run of several tasks, those of each by its name."""
    words = {
        name: getattr(arguments, name) for name in ("split", "data", "columns", "batch", "batches")
    }
    task = saved.learner.objective
    if not isinstance(task, Multi) or arguments.task is not None:
        return evaluate_task(part_of(saved, arguments.task), world, **words)
    require(arguments.data is None, "--data is one table: say whose with --task")
    return {name: evaluate_task(part_of(saved, name), world, **words) for name in task.parts}


def evaluate_pretrained(saved: Saved, world: World, arguments: Arguments) -> dict[str, Any]:
    """The split and its figures, printed."""
    require(not arguments.columns, "--columns is for the tables of a fine-tuned run; leave it out")
    require(arguments.task is None, "--task is for a fine-tuned run of several; leave it out")
    config, split = with_evaluation(saved.config, arguments), arguments.split or "val"
    objective = saved.learner.objective
    stream = build_stream(config, objective, split)
    facts = facts_of(stream)
    if arguments.data is not None:  # other data is what the user wants, in the same tokens
        del facts["data_hash"]
    places = ", ".join(place for place, _ in config.data.mixture)
    require_same_facts(
        saved.folder,
        facts,
        f"{places} was prepared otherwise; say with --data which folder you mean, prepared with "
        f"--tokenizer {saved.folder}/{MODEL_FILE}",
    )
    evaluate = evaluator_of(stream, config, objective, saved.tokenizer, world)
    figures = evaluate(Engine(saved.learner.to(world.device), world, config)) or {}
    if world.is_main:
        rows = [[name, f"{value:.6g}"] for name, value in figures.items()]
        show(*tables(("figure", f"{split} split"), rows))
    return {"split": split} | figures
