"""MODEL.md, the card beside a fine-tuned model: base, data, method, metrics, limits.

After Mitchell et al. 2019 (Model Cards for Model Reporting), as far as a program can know it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from nanolm.files import KEPT, write_text
from nanolm.finetune.config import TaskConfig

CARD = "MODEL.md"


def write_card(
    run: pathlib.Path, config: TaskConfig, summary: Mapping[str, Any], again: str = KEPT
) -> None:
    """Writes RUN/MODEL.md from the run's config, its summary, and its evaluations so far."""
    found = {path: figures_in(path) for path in sorted((run / "evaluation").glob("*.json"))}
    evaluations = {path.stem: figures for path, figures in found.items() if figures is not None}
    others = [path.name for path, figures in found.items() if figures is None]
    sections = [
        f"# {run.name}: {config.objective.name}",
        f"Fine-tuned with nanolm from `{config.init_from}`"
        + (" (its shape and tokenizer, random weights)." if config.weights == "random" else "."),
        *_model(config, summary),
        *_data(config, summary),
        *_method(config, summary),
        *_metrics(summary, evaluations),
        *_limits(config, evaluations, others),
        "## Use",
        f"```\nnanolm predict {run} FILE\nnanolm evaluate {run}\n```",
    ]
    write_text(run / CARD, "\n\n".join(sections) + "\n", again)


def figures_in(path: pathlib.Path) -> dict[str, float] | None:
    """The figures of an evaluation; None for any other file, such as one that --json wrote there
    or one that was not written to its end."""
    try:
        figures = json.loads(path.read_bytes())["figures"]
        return {str(name): float(value) for name, value in figures.items()}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _model(config: TaskConfig, summary: Mapping[str, Any]) -> list[str]:
    model = config.model
    return [
        "## Model",
        f"{model.trunk}, {model.n_layers} layers, width {model.d_model}, {model.n_heads} heads, "
        f"{model.positions.name} positions, vocabulary {model.vocab_size}; "
        f"{summary['params']:,} parameters, {summary['trained_params']:,} of them trained.",
    ]


def _data(config: TaskConfig, summary: Mapping[str, Any]) -> list[str]:
    data = config.data
    tasks = getattr(config.objective, "tasks", {})  # of a run of several
    parts = [task["data"] for task in tasks.values()] or [dataclasses.asdict(data)]
    named = ", ".join(f"`{part['train'] or part['path']}`" for part in parts)
    lines = [
        "## Data",
        f"{named}: {summary['train_records']:,} records to train on, "
        f"{summary['val_records']:,} to choose by; at most {data.row_length} tokens of each are "
        f"read. SHA-256 of the records: `{summary['data_hash'][:16]}…`",
    ]
    labels = getattr(config.objective, "labels", None)
    if labels:
        lines.append(f"Labels: {', '.join(labels)}.")
    return lines + [f"- {name}: {task['objective']['name']}" for name, task in tasks.items()]


def _method(config: TaskConfig, summary: Mapping[str, Any]) -> list[str]:
    return [
        "## Method",
        f"{summary['steps']:,} steps of {config.train.global_batch} examples, "
        f"{config.optim.name} at {getattr(config.optim, 'lr', None)}, {config.schedule.name} "
        f"schedule, seed {config.run.seed}, {config.train.precision}; "
        f"{summary['seconds']:,.0f} s. The checkpoint with the best {summary['metric']} on val is "
        f"the model (step {summary['best_step']}).",
    ]


def _metrics(summary: Mapping[str, Any], evaluations: Mapping[str, dict[str, float]]) -> list[str]:
    columns = {"val (last)": summary["val"], **evaluations}
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    rows = [f"| figure | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [figures.get(name) for figures in columns.values()]
        shown = ["" if value is None else f"{value:.4f}" for value in cells]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return ["## Metrics", "\n".join(rows)]


def _limits(config: TaskConfig, evaluations: Mapping[str, Any], others: list[str]) -> list[str]:
    limits = [
        f"Texts beyond {config.data.row_length} tokens are cut.",
        "Figures hold for texts like those of the data above; nothing else was measured.",
        "One seed; differences between seeds are not in these figures.",
    ]
    if not evaluations:
        limits.append("Not evaluated on a test split: the val figures were used to choose.")
    if others:
        limits.append(f"Of `evaluation/`, no evaluation and left out: {', '.join(others)}.")
    return ["## Limits", "\n".join(f"- {line}" for line in limits)]
