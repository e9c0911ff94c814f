"""`nanolm evaluate` of a fine-tuned run: a split's table, JSON, predictions and confusion picture.

RUN/evaluation/test.json              figures, label set, confusion matrix, the data's hash
RUN/evaluation/test.txt               the full report per label
RUN/evaluation/test_predictions.jsonl what the model said about every record
RUN/evaluation/test_confusion.png     gold against predicted

Of another table (--data FILE) the name is FILE and the beginning of its records' hash, and of
another checkpoint than the run's own, or of one without its moving average, that is added
(test-step-00000100.json): neither takes the place of the run's own figures. What is found out about
an average of several runs is printed only.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, cast

from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import read_json
from nanolm.checkpoint.lazy_tensors import part_files
from nanolm.data.tables.files import Table
from nanolm.distributed.world import World
from nanolm.errors import UserError, require
from nanolm.files import write_json, write_text
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.evaluation import TaskEvaluator, drawn
from nanolm.finetune.generation import write_answers
from nanolm.finetune.model_card import write_card
from nanolm.finetune.pictures import fonts_for, pyplot
from nanolm.finetune.splits import (
    ANSWERING,
    TRAINING,
    Split,
    make_split,
    open_table,
    other_data,
    training_tables,
)
from nanolm.finetune.tasks.base import task_in
from nanolm.finetune.tasks.metrics import Report
from nanolm.saved import Saved
from nanolm.tables import open_console, tables
from nanolm.terminal import say
from nanolm.training.engine import Engine


def evaluate_task(
    saved: Saved,
    world: World,
    *,
    split: str | None,
    data: str | None,
    columns: Mapping[str, str | None],
    batch: int | None,
    batches: int | None = None,
) -> dict[str, Any]:
    """Figures of a split (test, or val where there is no test), printed and written; collective."""
    config, task = cast(TaskConfig, saved.config), task_in(saved.learner)
    name, table = find_table(config, type(task), split, data, columns)
    remedies = TRAINING if data is None else ANSWERING
    found = make_split(name, table, task, config.data, remedies=remedies)
    rows = batch or config.eval.batch or config.train.global_batch
    if batches is not None:
        found = drawn(found, batches * rows)
        name = f"{name}-{len(found.table)}-records"
    evaluator = TaskEvaluator(found, world, batch=rows, seed=config.run.seed)
    engine = Engine(saved.learner.to(world.device), world, config, trains=False)
    figures = evaluator(engine) or {}
    report, predictions = evaluator.report, evaluator.predictions
    if task.generates:
        predictions = write_answers(saved, found.table, rows, with_gold=True)
        report = task.report(found.table, predictions)
        figures |= report.figures
    if world.is_main:
        whose = f"{name} split" if saved.part is None else f"{saved.part}: {name} split"
        show(whose, found, figures, report)
        keep(saved, name, found, figures, report, predictions)
    return {"split": name, "rows": len(found.table), **figures}


def find_table(
    config: TaskConfig,
    task: Any,
    split: str | None,
    data: str | None,
    columns: Mapping[str, str | None],
) -> tuple[str, Table]:
    """(name, table) of what is to be evaluated; raises UserError when there is no such split."""
    if data is not None:
        from nanolm.data.tables.splits import read_split  # noqa: PLC0415

        table = other_data(read_split(data, split or "test"), config.data.columns, columns)
        return f"{pathlib.Path(data).stem}-{table.digest()[:8]}", table
    require(not columns, "--columns is about other data: name the file with --data")
    if split in (None, "test"):
        found = open_table(config.data, "test")
        if found is not None:
            return "test", found
        require(split is None, "the run's data has no test split; name one with --data FILE")
    if split in ("train", "val", None):
        train, val, _ = training_tables(config, task)
        return ("train", train) if split == "train" else ("val", val)
    raise UserError(f"--split {split} is none of train, val, test")


def show(name: str, split: Split, figures: dict[str, float], report: Report | None) -> None:
    """The table on the terminal."""
    head = ("figure", f"{name}, {len(split.table)} records")
    open_console().print(*tables(head, [[key, f"{value:.6g}"] for key, value in figures.items()]))
    for text in [
        f"read from {split.table.path}",
        *split.messages,
        *([report.text] if report and report.text else []),
    ]:
        say(text)


def keep(
    saved: Saved,
    name: str,
    split: Split,
    figures: dict[str, float],
    report: Report | None,
    predictions: list[dict[str, Any]],
) -> None:
    """Writes the files of the evaluation and renews MODEL.md, when the model lies in a run and is
    no average of several."""
    if saved.members > 1 or saved.folder.parent.name != "checkpoints":
        return
    run = saved.folder.parent.parent
    name += other_weights(saved, run)
    folder = run / "evaluation"
    folder.mkdir(exist_ok=True)
    if saved.part is not None:
        name = f"{saved.part}_{name}"
    content: dict[str, Any] = {"checkpoint": saved.folder.name, "rows": len(split.table)}
    content |= {"data": split.table.path, "data_hash": split.table.digest(), "figures": figures}
    if report is not None and report.confusion is not None:
        content |= {"labels": report.labels, "confusion": report.confusion}
    write_json(folder / f"{name}.json", content)
    if report is not None and report.text:
        write_text(folder / f"{name}.txt", report.text)
    lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in predictions]
    write_text(folder / f"{name}_predictions.jsonl", "".join(lines))
    if report is not None and report.confusion is not None:
        for note in draw_confusion(report, folder / f"{name}_confusion.png", f"{run.name}: {name}"):
            say(note)
    if (run / "summary.json").is_file():
        write_card(
            run, cast(TaskConfig, saved.whole or saved.config), read_json(run, "summary.json")
        )


def other_weights(saved: Saved, run: pathlib.Path) -> str:
    """What the name of an evaluation says of weights that are not those which the run's own figures
    are about; nothing of these."""
    own = saved.folder.resolve() == locate(run, best=True).resolve()
    raw = not saved.ema and bool(part_files(saved.folder, "ema"))
    return f"-{saved.folder.name}" * (not own) + "-without-ema" * raw


def draw_confusion(report: Report, path: pathlib.Path, title: str) -> list[str]:
    """The confusion matrix as a picture; says what its reader should know. Raises UserError when
    matplotlib is not installed."""
    plt = pyplot()
    with fonts_for([*(report.labels or []), title]) as notes:
        figure = confusion_figure(plt, report, title)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return notes


def confusion_figure(plt: Any, report: Report, title: str) -> Any:
    """Shares of each gold label in shades, the numbers of records written on them."""
    labels, counts = report.labels or [], report.confusion or []
    size = min(20.0, 2.5 + 0.55 * len(labels))
    figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(labels))
    plain: dict[str, Any] = {"parse_math": False}  # a label may hold dollars
    axis.set_xticks(ticks, labels, rotation=45, ha="right", **plain)
    axis.set_yticks(ticks, labels, **plain)
    axis.set(xlabel="predicted", ylabel="gold")
    axis.set_title(title, **plain)
    if len(labels) <= 30:
        for y, row in enumerate(counts):
            for x, n in enumerate(row):
                color = "white" if shares[y][x] > 0.5 else "black"
                axis.text(x, y, str(n), ha="center", va="center", color=color, fontsize=8)
    return figure
