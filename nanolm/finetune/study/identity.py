"""What makes two runs of a study the same experiment: the key under which a cell's figures stand.

    key = hash({key: value for the config's leaves that are not at their default} | file contents)

Folders are replaced by what stands in them, so that a result belongs to data and weights and not to
one machine. The defaults are those of the day on which the results file was begun (it keeps them):
a key that nanolm got since then changes no cell, and a default that it changed since then counts as
a value that was said, so that what was measured before is run again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from nanolm.checkpoint.checkpoints import locate
from nanolm.checkpoint.container import INDEX, read_json
from nanolm.data.json_pieces import JSON_FILE
from nanolm.data.tables.splits import find_split, shards_of
from nanolm.data.tokenizer import MODEL_FILE
from nanolm.errors import UserError
from nanolm.files import file_sha256, key_of
from nanolm.finetune.config import TaskConfig

ELSEWHERE = ("resume", "distributed", "run", "data.path", "init_from")
"""Keys that name a place or a way to run, not an experiment; what counts of them is added below."""


def identity(config: TaskConfig, defaults: dict[str, Any]) -> str:
    """A hash of all that decides a cell's figures: config, files, starting weights, tokenizer.

    `defaults` maps CLASS.field to its default; fields that it lacks are added with today's. Raises
    UserError for a missing split or checkpoint.
    """
    said = {}
    for key, owner, field in leaves(config):
        elsewhere = any(f"{key}.".startswith(f"{place}.") for place in ELSEWHERE)
        value = getattr(owner, field.name)
        if not elsewhere and not at_default(value, owner, field, defaults):
            said[key] = value
    for key in ("augment.synonyms", "augment.opposites"):
        if said.get(key):
            said[key] = content(said[key])
    said |= {"run.seed": config.run.seed, "init_from": origin(config.init_from, config.weights)}
    for split in ("train", "val", "test"):
        where = find_split(config.data.path, config.data.files, split)
        said[f"data.{split}"] = where and content(where)
    return key_of(said)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, the dataclass that has it, its field) of all values of a nested config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", config, field


def at_default(value: Any, owner: Any, field: dataclasses.Field, defaults: dict[str, Any]) -> bool:
    """Whether a value says nothing. A `name`, which tells what the other keys belong to, always
    does."""
    if field.name == "name":
        return False
    key = f"{type(owner).__name__}.{field.name}"
    if key not in defaults:
        make: Any = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if default is dataclasses.MISSING:
            return False
        defaults[key] = default
    return json.dumps(value, sort_keys=True) == json.dumps(defaults[key], sort_keys=True)


@functools.cache
def content(where: str) -> str:
    """The hash of a file; a source that is no file stands for itself."""
    paths = [pathlib.Path(path) for path in shards_of(where)]
    if not all(path.is_file() for path in paths):
        return where
    return "+".join(file_sha256(path) for path in paths)


@functools.cache
def origin(path: str | None, weights: str) -> dict[str, str]:
    """Hashes of a checkpoint's tokenizer and, unless the weights are random, of its weights."""
    if path is None:
        raise UserError("a cell has no init_from: name the checkpoint to fine-tune")
    files = read_json(locate(path, best=True), INDEX)["files"]
    model = [name for name in files if name.startswith(("model", "ema"))]
    tokenizer = [name for name in files if name in (MODEL_FILE, JSON_FILE)]
    wanted = [*tokenizer, *(model if weights == "saved" else [])]
    return {name: files[name]["sha256"] for name in sorted(wanted)}
