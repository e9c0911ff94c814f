"""A cell of a study: its config, what identifies it, and the process that runs it.

    overrides -> words of a command line -> TaskConfig -> key        before anything is run
    `nanolm finetune` in a process of its own -> figures, seconds, peak memory
    `nanolm evaluate` of the chosen setting only -> test figures

What the key is made of: `identity`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from nanolm.checkpoint.container import read_json
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.run import base_groups, load_task_config
from nanolm.finetune.study.config import Overrides, RowConfig, StudyConfig
from nanolm.finetune.study.identity import identity
from nanolm.processes import python_path

ALWAYS: Overrides = {"run.threads": 1, "run.wandb.mode": "disabled"}
"""What every cell has: one thread, no logging service."""

groups_of = functools.cache(base_groups)
"""Model and objective of a checkpoint, which is verified once and not for every cell."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: where it stands in the table, its command line and its key."""

    row: str
    variant: str
    seed: int
    setting: Overrides
    words: tuple[str, ...]
    metric: str
    reported: str
    higher_is_better: bool
    key: str
    run: pathlib.Path

    @property
    def label(self) -> str:
        """What the log calls it."""
        chosen = [f"{key}={value}" for key, value in self.setting.items()]
        return ", ".join([*filter(None, [self.row, self.variant]), *chosen, f"seed {self.seed}"])


def build_cell(
    study: StudyConfig,
    row: RowConfig,
    variant: str,
    seed: int,
    setting: Overrides,
    defaults: dict[str, Any],
    *,
    tries: bool,
) -> Cell:
    """The cell of a setting and a seed; with `tries` as it is run to choose the setting.
    `defaults`: see `identity`.

    Raises UserError for whatever `nanolm finetune` would refuse in the config.
    """
    merged = study.overrides | row.overrides | study.variants[variant].overrides | setting
    tune = row.tune or study.tune
    merged |= (tune.overrides if tries else {}) | ALWAYS | {"run.seed": seed}
    if row.metric is not None:
        merged["eval.metric"] = row.metric
    files = [f"--config={filled(row.config, study)}"] if row.config is not None else []
    words = [*files, *(f"--{key}={word(filled(value, study))}" for key, value in merged.items())]
    config = load_task_config(words, groups_of)
    require(config.data.path is not None, f"rows: {row.name} has no data.path")
    key = identity(config, defaults)
    metric, higher_is_better = chosen_by(config)
    reported = reported_by(config, row) or metric
    run = pathlib.Path(study.out) / study.name / f"{slug(row.name)}-{slug(variant)}-{key}"
    words.append(f"--run.dir={run}")
    return Cell(
        row.name, variant, seed, setting, tuple(words), metric, reported, higher_is_better, key, run
    )


def filled(value: Any, study: StudyConfig) -> Any:
    """A value in which {data} and the names of `paths` are replaced; raises UserError when --data
    is needed and was not given."""
    if not isinstance(value, str):
        return value
    require(
        "{data}" not in value or study.data is not None,
        f"the study reads {value}: say where {{data}} is with --data FOLDER",
    )
    for name, path in {"data": study.data or "", **study.paths}.items():
        value = value.replace(f"{{{name}}}", path)
    return value


def word(value: Any) -> str:
    """A plain value as the word of a command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def slug(name: str) -> str:
    """A name as part of a folder's."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "all"


def chosen_by(config: TaskConfig) -> tuple[str, bool]:
    """(the figure that chooses, whether more of it is better); raises UserError for one that the
    task has not."""
    from nanolm.finetune.prepare import task_of  # noqa: PLC0415

    task = task_of(config)
    known = dict(task.metrics(config.objective))
    metric = config.eval.metric or task.metric_of(config.objective)
    require(
        metric in known,
        f"eval.metric={metric} is no figure of this task; there are {', '.join(known)}",
    )
    return metric, known[metric]


def reported_by(config: TaskConfig, row: RowConfig) -> str | None:
    """The figure of the test split that the row names; raises UserError for one that the task has
    not."""
    from nanolm.finetune.prepare import task_of  # noqa: PLC0415

    known = [metric.name for metric in task_of(config).metrics(config.objective)]
    require(
        row.reported is None or row.reported in known,
        f"rows: {row.name}: reported={row.reported} is no figure of this task; there are "
        f"{', '.join(known)}",
    )
    return row.reported


def train(cell: Cell) -> dict[str, Any]:
    """Runs the cell from its beginning; what it reached on val and what it cost."""
    shutil.rmtree(cell.run, ignore_errors=True)
    cost = run_process(cell, "finetune", list(cell.words))
    require(
        (cell.run / "summary.json").is_file(),
        f"cell {cell.label} was interrupted; the same command runs it again",
    )
    summary = read_json(cell.run, "summary.json")
    require(
        summary["best_val"] is not None,
        f"cell {cell.label}: val gave no {cell.metric}; look into {log_of(cell, 'finetune')}",
    )
    return {
        "row": cell.row,
        "variant": cell.variant,
        "seed": cell.seed,
        "setting": cell.setting,
        "metric": summary["metric"],
        "val": summary["best_val"],
        "best_step": summary["best_step"],
        "steps": summary["steps"],
        "test": None,
        "params": summary["params"],
        "trained_params": summary["trained_params"],
        "seconds": summary["seconds"],
        "cpu_seconds": cost["cpu_seconds"],
        "peak_mib": cost["peak_mib"],
    }


def test(cell: Cell, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the figures of the test split."""
    answers = cell.run / "test.json"
    words = [str(cell.run), "--split=test", f"--json={answers}"]
    cost = run_process(cell, "evaluate", words)
    figures = read_json(cell.run, answers.name)
    named = ("run", "checkpoint", "split")
    figures = {name: value for name, value in figures.items() if name not in named}
    require(
        cell.reported in figures,
        f"cell {cell.label}: its test split gives no {cell.reported} (roc_auc needs records of "
        f"both classes); choose another metric for the row, or mend that split",
    )
    spent = record["cpu_seconds"] + cost["cpu_seconds"]
    return record | {"test": figures, "cpu_seconds": spent}


running: set[subprocess.Popen] = set()
"""Processes of cells that have not ended."""


def end_running() -> None:
    """Tells the processes of all unfinished cells to end, so that none outlives its study."""
    for child in list(running):
        child.terminate()


def drop_weights(cell: Cell) -> None:
    """Removes the cell's checkpoints; its log, metrics and summary stay."""
    shutil.rmtree(cell.run / "checkpoints", ignore_errors=True)


def log_of(cell: Cell, command: str) -> pathlib.Path:
    """The file of what a cell's process says; beside its folder, which the run wants empty."""
    return cell.run.parent / f"{cell.run.name}.{command}.log"


def run_process(cell: Cell, command: str, words: list[str]) -> dict[str, float]:
    """`nanolm COMMAND` in a process with one thread: its CPU seconds and peak memory in MiB.

    Raises UserError with the last line of its log when it fails.
    """
    log = log_of(cell, command)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "nanolm", command, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        running.add(child)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        running.discard(child)
    if child.returncode != 0:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        said = lines[-1] if lines else f"exit status {child.returncode}"
        raise UserError(f"cell {cell.label} failed: {said} ({log})")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024),
    }
