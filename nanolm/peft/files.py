"""Adapters on disk: only the small weights, and which base they belong to.

A checkpoint of a run with `peft` holds in model.safetensors the adapter's weights alone, and beside
it adapter.json: the method with its options, the heads that were trained whole, the base's path and
the SHA-256 of its trunk. An adapter that is saved by itself is a folder of the same form, so
several of them can be switched on one base.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from nanolm.checkpoint.checkpoints import load_trunk, load_weights, locate
from nanolm.checkpoint.container import read_json, read_tensors, write_folder
from nanolm.checkpoint.named_tensors import load_named
from nanolm.checkpoint.places import find_again
from nanolm.config.schema import Config
from nanolm.config.typed import instance
from nanolm.errors import UserError, require
from nanolm.learner import Adapter, Learner
from nanolm.peft.base import attach, detach, trainable_counts
from nanolm.registry import PEFT, Options

DESCRIPTION = "adapter.json"


def require_whole(folder: pathlib.Path, init_from: str) -> None:
    """Raises UserError when a folder to start from holds an adapter alone."""
    require(
        not (folder / DESCRIPTION).is_file(),
        f"init_from={init_from} holds an adapter, not a whole model: merge it into its base "
        f"first (`nanolm merge {init_from} --out FOLDER`) and start from that",
    )


def describe(adapter: Adapter) -> bytes:
    """The content of adapter.json."""
    description = {
        "peft": dataclasses.asdict(adapter.options),
        "heads": list(adapter.heads),
        "base": adapter.base,
        "base_hash": adapter.base_hash,
    }
    return json.dumps(description, indent=2).encode() + b"\n"


def save_adapter(folder: str | pathlib.Path, learner: Learner) -> pathlib.Path:
    """Writes the attached adapter as a folder of its own."""
    adapter, folder = learner.adapter, pathlib.Path(folder)
    if adapter is None:
        raise UserError("there is no adapter to save")
    write_folder(folder, {"model": adapter.tensors(learner)}, {DESCRIPTION: describe(adapter)})
    return folder


def load_adapter(path: str | pathlib.Path, learner: Learner) -> Adapter:
    """Attaches a saved adapter (a run's folder, a checkpoint's or an adapter's own) to its base.

    One that is attached already makes room, so this switches adapters. Raises UserError when the
    learner's weights are not the base that the adapter was trained on.
    """
    folder = locate(path)
    description = read_description(folder)
    detach(learner)
    options = read_options(folder, description)
    adapter = attach(learner, options, heads=description["heads"], base=description.get("base"))
    check_base(folder, description, adapter, learner)
    load_named(adapter.tensors(learner), read_tensors(folder, "model"), f"adapter {folder}")
    return adapter


def read_description(folder: pathlib.Path) -> dict[str, Any]:
    """adapter.json; raises UserError when the folder holds no adapter."""
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no adapter: it has no {DESCRIPTION}")
    description = read_json(folder, DESCRIPTION)
    kinds = {"peft": dict, "heads": list, "base_hash": str}
    if not all(isinstance(description.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"adapter file {folder / DESCRIPTION} is damaged; use another one")
    return description


def read_options(folder: pathlib.Path, description: dict[str, Any]) -> Options:
    """The method's options as they were saved."""
    name = str(description["peft"].get("name"))
    return instance(PEFT.get(name).options, description["peft"], f"{folder / DESCRIPTION}: peft")


def check_base(
    folder: pathlib.Path, description: dict[str, Any], adapter: Adapter, learner: Learner
) -> None:
    """Raises UserError, and takes the adapter out, when the base is another one."""
    wanted, found = description["base_hash"], adapter.base_hash
    if wanted != found:
        detach(learner)
        base = description.get("base") or "a base whose place was not written down"
        raise UserError(
            f"adapter {folder} was trained on {base} (trunk {wanted[:12]}), but these weights are "
            f"another model's (trunk {found[:12]}); load it onto the base that it belongs to"
        )


def open_adapter(
    folder: pathlib.Path, learner: Learner, *, ema: bool, base: str | None = None
) -> None:
    """Fills a learner that was just built from a checkpoint of a run with `peft`: the base that
    adapter.json names (or the one given), then the adapter on it.

    Raises UserError when the base cannot be found or is not the one that the run started from.
    """
    description = read_description(folder)
    base = base or description.get("base")
    base = base and find_again(base, folder)
    if base is None or not pathlib.Path(base).is_dir():
        raise UserError(
            f"checkpoint {folder} holds an adapter only, and its base {base} is not there; put the "
            f"base back, or make one model of both: `nanolm merge {folder} --base BASE --out OUT`"
        )
    load_trunk(base, learner)
    options = read_options(folder, description)
    adapter = attach(learner, options, heads=description["heads"], base=base)
    check_base(folder, description, adapter, learner)
    load_weights(folder, learner, ema=ema)


def begin_adapter(
    config: Config,
    learner: Learner,
    fresh: list[str],
    base: pathlib.Path,
    checkpoint: pathlib.Path | None,
) -> str:
    """Attaches config.peft to a learner that holds its base; returns what to tell the user.

    `base` is the checkpoint that the weights came from; `fresh` heads, which it lacks, are trained
    whole. With a checkpoint to go on from, raises UserError when that belongs to another base.
    """
    adapter = attach(learner, config.peft, heads=fresh, seed=config.run.seed, base=str(base))
    if checkpoint is not None:
        check_base(checkpoint, read_description(checkpoint), adapter, learner)
    trained, total = trainable_counts(learner)
    heads = f", heads {', '.join(fresh)} included" if fresh else ""
    return (
        f"peft={config.peft.name} trains {trained:,} of {total:,} parameters "
        f"({trained / total:.2%}){heads}"
    )


def adapter_files(learner: Learner) -> dict[str, bytes]:
    """What a checkpoint needs besides the small weights: adapter.json, when there is an adapter."""
    return {DESCRIPTION: describe(learner.adapter)} if learner.adapter else {}
