"""Whose folder is it: what a run finds in `run.dir` when it starts, and whether it may go on there.

`open_run_folder` decides between a fresh start, a continuation and a refusal, on rank 0, for all
ranks. A continuation must have the config that shaped the run; keys that only change how it is
computed, watched or how long it goes on may differ (`HARMLESS`).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import nanolm
from nanolm.checkpoint.checkpoints import Checkpoints, locate, read_trainer
from nanolm.checkpoint.facts import require_same_facts
from nanolm.checkpoint.nodes import common_checkpoint
from nanolm.checkpoint.run_lock import RunLock, require_free
from nanolm.config import strict_yaml
from nanolm.config.load import dump, load_config
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.files import RESUME, write_text
from nanolm.ops.timings import processor_name

HARMLESS = (
    "resume",
    "init_from",
    "plugins",
    "eval.",
    "kernels.",
    "distributed.",
    "run.",
    "data.path",
    "data.cache.",
    "data.workers",
    "train.steps",
    "train.micro_batch",
    "train.nonfinite",
    "train.spike",
    "train.rewind_steps",
    "train.max_skips",
    "train.activation_checkpointing",
    "train.compile",
)
"""Keys (or prefixes) that a continued run may change; data.path because the data's hash decides."""

THE_SAME = "give it the data and tokenizer it had, or start a new run in another run.dir"
SHAPING = ("run.seed",)
"""Keys under a harmless prefix that may not change after all."""


@dataclasses.dataclass(frozen=True)
class Start:
    """How the run starts: from nothing, or from a verified checkpoint, whose trainer.json is here
    and need not be read again."""

    checkpoint: pathlib.Path | None
    saved: dict[str, Any] | None
    messages: list[str]
    lock: AbstractContextManager
    """What keeps others from writing into the folder: for a `with` as long as the run does."""

    @property
    def done(self) -> int:
        """Optimizer steps behind it."""
        return self.saved["step"] if self.saved else 0


def open_run_folder(
    run: pathlib.Path,
    resume: str,
    config: Any,
    facts: Mapping[str, Any],
    world: World,
    *,
    shared: bool = True,
) -> Start:
    """Takes possession of the run's folder, or with shared=False of each node's; collective.

    `resume` is never, auto or a checkpoint's folder; `config` is the run's dataclass; `facts` are
    hashes of data and tokenizer.
    Raises UserError, on every rank, when the folder holds another run or nothing to resume from, or
    is being written.
    """
    checkpoints = Checkpoints(run, world, shared=shared)
    common = None if shared or resume != "auto" else common_checkpoint(run, world)
    lock: AbstractContextManager = nullcontext()

    def take() -> dict[str, Any] | None:
        nonlocal lock
        if not checkpoints.leads:
            return None
        require_free(run)
        checkpoint, messages = common or _find(run, resume)
        saved = None
        if checkpoint is not None:
            saved = read_trainer(checkpoint)
            _same_config(checkpoint / "config.yaml", config)
            require_same_facts(checkpoint, facts, THE_SAME, saved["facts"])
            messages += differences(saved["environment"], world)
        elif resume == "auto" and (run / "config.yaml").is_file() and holds_a_run(run):
            _same_config(run / "config.yaml", config)
        _make(run)
        lock = held = RunLock(run)
        messages += filter(None, [held.missing])
        checkpoints.clean()
        write_text(run / "config.yaml", dump(config), RESUME)
        return {"checkpoint": checkpoint and str(checkpoint), "saved": saved, "messages": messages}

    answer = world.call_on_all_ranks(take)[checkpoints.leader]
    found = answer["checkpoint"]
    checkpoint = pathlib.Path(found) if found else None
    return Start(checkpoint, answer["saved"], answer["messages"], lock)


def _make(run: pathlib.Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir {run} cannot be made: {error.strerror}") from error


def _find(run: pathlib.Path, resume: str) -> tuple[pathlib.Path | None, list[str]]:
    if resume == "auto":
        checkpoint, problems = Checkpoints(run, World()).newest()
        return checkpoint, [f"{problem}: went back to {checkpoint}" for problem in problems]
    inside = resume != "never" and pathlib.Path(resume).resolve().is_relative_to(run.resolve())
    if holds_a_run(run) and not inside:
        raise UserError(
            f"run.dir {run} already holds a run; --resume auto continues it, another run.dir "
            f"starts a new one"
        )
    return (None if resume == "never" else locate(resume)), []


def holds_a_run(run: pathlib.Path) -> bool:
    """Whether there is anything in the folder that a start left: a line of metrics, or a
    checkpoint. A start that failed before its first step leaves neither, and owns nothing."""
    metrics = run / "metrics.jsonl"
    lines = metrics.is_file() and metrics.stat().st_size > 0
    return lines or any(Checkpoints(run, World()).steps())


def release(run: pathlib.Path) -> None:
    """Gives up the folder of a run that failed before its first checkpoint: there is nothing to go
    on from, so the next start begins in it. Its lines stay beside, as failed-metrics.jsonl and
    failed-nonfinite.jsonl."""
    if any(Checkpoints(run, World()).steps()):
        return
    for lines in run.glob("*.jsonl"):
        if not lines.name.startswith("failed-"):
            lines.replace(run / f"failed-{lines.name}")


def _same_config(saved: pathlib.Path, config: Any) -> None:
    before = flatten(_as_of_today(strict_yaml.read_mapping(saved), config))
    now = flatten(_as_of_today(strict_yaml.parse(dump(config), "config"), config))
    changed = [
        f"{key} ({before.get(key)} there, {now.get(key)} here)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _harmless(key)
    ]
    if changed:
        raise UserError(
            f"{saved.parent} was written with another config: {', '.join(changed)}; change it "
            f"back, or start a new run in another run.dir"
        )


def _as_of_today(mapping: dict[str, Any], config: Any) -> dict[str, Any]:
    """A saved config with the keys that came after it, at their defaults: those say what was done
    before there was a choice. One that has a key that is gone stays as it is, and differs by it."""
    base = mapping | {"plugins": config.plugins}  # only those that this command names are imported
    try:
        whole = load_config([], schema=type(config), base=base)
    except UserError:
        return mapping
    return strict_yaml.parse(dump(whole), "config")


def _harmless(key: str) -> bool:
    return key not in SHAPING and key.startswith(HARMLESS)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def environment(world: World) -> dict[str, Any]:
    """What bit-equality depends on beside the config: builds, machine type, threads, ranks."""
    device = world.device
    return {
        "nanolm": nanolm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world": world.size,
    }


def differences(saved: Mapping[str, Any], world: World) -> list[str]:
    """One sentence when the environment changed since the checkpoint, none when it did not."""
    now = environment(world)
    changed = [f"{k}: {saved[k]} -> {now[k]}" for k in now if k in saved and saved[k] != now[k]]
    if not changed:
        return []
    return [f"resumed elsewhere ({'; '.join(changed)}): agrees to rounding, not bit for bit"]


def cut_metrics(path: pathlib.Path, step: int) -> None:
    """Drops the lines that a continued run will write again: those after `step`.

    A checkpoint is written between the step's own line and its evaluation, so that one goes too. A
    last line that a kill tore is dropped. The rest is kept byte for byte.
    """
    if not path.is_file():
        return
    kept = []
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            line = raw.decode()
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        ours = isinstance(record, dict) and isinstance(record.get("step"), int)
        if not ours or "kind" not in record:
            raise UserError(
                f"{path} has a line that nanolm did not write; remove it: {line[:60]!r}"
            )
        before = record["step"] < step or (record["step"] == step and record["kind"] == "train")
        if before and line.endswith("\n"):
            kept.append(line)
    write_text(path, "".join(kept), RESUME)
