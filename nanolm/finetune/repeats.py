"""The same fine-tuning for several seeds or folds, and how much its figures vary.

    RUN/seed-0, RUN/seed-1, …   RUN/fold-0, …   RUN/seed-0-fold-1, …      one run each
    RUN/summary.json                            every val figure: values, mean, standard deviation

A run that is finished is not run again with --resume auto. Averages of the runs' models are
`nanolm evaluate RUN/seed-0 --ensemble RUN/seed-1 …`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from nanolm.checkpoint.container import read_json
from nanolm.errors import require
from nanolm.files import RESUME, write_json
from nanolm.finetune.config import TaskConfig
from nanolm.tables import open_console, tables

Run = Callable[[TaskConfig], dict[str, Any]]


def is_repeated(config: TaskConfig) -> bool:
    """Whether the config asks for more than one run."""
    return config.run.seeds is not None or each_fold(config)


def each_fold(config: TaskConfig) -> bool:
    """Whether every fold is to be held out once."""
    return config.data.folds is not None and config.data.fold is None


def repeats(config: TaskConfig) -> dict[str, TaskConfig]:
    """{folder under run.dir: config} of every seed and fold."""
    seeds = [config.run.seed] if config.run.seeds is None else config.run.seeds
    every = range(config.data.folds or 0)
    folds = every if each_fold(config) else [config.data.fold]
    found = {}
    for seed, fold in itertools.product(seeds, folds):
        parts = [f"seed-{seed}"] if config.run.seeds is not None else []
        parts += [f"fold-{fold}"] if each_fold(config) else []
        name = "-".join(parts)
        folder = str(pathlib.Path(config.run.dir) / name)
        run = dataclasses.replace(config.run, seed=seed, seeds=None, dir=folder)
        data = dataclasses.replace(config.data, fold=fold)
        found[name] = dataclasses.replace(config, run=run, data=data)
    return found


def run_repeats(config: TaskConfig, run: Run) -> dict[str, Any]:
    """Runs them one after the other, prints the table of val figures, and writes the summary.

    Empty when a signal ended one of them. Raises UserError on several ranks.
    """
    require(
        int(os.environ.get("WORLD_SIZE", "1")) == 1,
        "run.seeds and data.folds repeat a run in one process: start the seeds one by one under "
        "torchrun, with run.seed (data.fold) and run.dir of their own",
    )
    summaries = {}
    for name, each in repeats(config).items():
        folder = pathlib.Path(each.run.dir)
        finished = each.resume == "auto" and (folder / "summary.json").is_file()
        summaries[name] = read_json(folder, "summary.json") if finished else run(each)
        if not summaries[name]:
            return {}
    summary = spread(list(summaries.values())) | {"runs": list(summaries)}
    write_json(pathlib.Path(config.run.dir) / "summary.json", summary, again=RESUME)
    show(summary)
    return summary


def spread(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{metric, best_val, val: {figure: {values, mean, std}}}; std is the sample's, over n - 1."""
    best = [summary["best_val"] for summary in summaries]
    values = {f"best {summaries[0]['metric']}": best} if None not in best else {}
    every = [summary["val"] for summary in summaries]
    # A fold may lack a figure that others have, such as roc_auc where only one class is held out.
    common = [name for name in every[0] if all(name in figures for figures in every)]
    values |= {name: [figures[name] for figures in every] for name in common}
    figures = {
        name: {
            "values": each,
            "mean": statistics.fmean(each),
            "std": statistics.stdev(each) if len(each) > 1 else 0.0,
        }
        for name, each in values.items()
    }
    return {"metric": summaries[0]["metric"], "val": figures}


def show(summary: dict[str, Any]) -> None:
    """The table on the terminal: every figure of the last evaluation, and the best of the one that
    names the best checkpoint."""
    rows = [
        [
            name,
            f"{figure['mean']:.4f} ± {figure['std']:.4f}",
            *(f"{value:.4f}" for value in figure["values"]),
        ]
        for name, figure in summary["val"].items()
    ]
    for grid in tables(("val figure", "mean ± std", *summary["runs"]), rows):
        open_console().print(grid)
