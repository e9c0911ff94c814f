"""Where a relative path of a run lies for who opens the run from another working folder.

A config keeps paths as they were given. They are looked for in the present folder, then in the one
that the run was trained in (`folder` in trainer.json), then beside the run: in each folder above
it, which finds them where a whole tree was moved.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

PATHS = ("path", "train", "val", "test")
"""Keys of the group `data`, and of an entry of its `corpora`, that hold paths."""


def find_again(path: str, checkpoint: pathlib.Path) -> str:
    """The path as it is seen from here, unchanged where nothing of this name is found."""
    given = pathlib.Path(path)
    if given.is_absolute() or given.exists():
        return path
    above = [folder / given for folder in (trained_in(checkpoint), *checkpoint.resolve().parents)]
    return next((str(place) for place in above if place.exists()), path)


def trained_in(checkpoint: pathlib.Path) -> pathlib.Path:
    """The folder that a run, given by its own or a checkpoint's, was started in; the present one
    where it does not say."""
    newest = sorted(checkpoint.glob("checkpoints/step-*/trainer.json"))[-1:]
    try:
        said = json.loads((newest or [checkpoint / "trainer.json"])[0].read_bytes())["folder"]
    except (OSError, ValueError, KeyError, TypeError):  # an export, an older run, or damage,
        said = ""  # which is told by who needs the file
    return pathlib.Path(said if isinstance(said, str) else "")


def with_places(mapping: Any, checkpoint: pathlib.Path, group: str = "") -> Any:
    """A saved config whose relative paths of data can be opened from here."""
    if isinstance(mapping, list):
        return [with_places(item, checkpoint, group) for item in mapping]
    if not isinstance(mapping, dict):
        return mapping
    inside = {
        key: find_again(value, checkpoint)
        if group in ("data", "corpora") and key in PATHS and isinstance(value, str)
        else with_places(value, checkpoint, str(key))
        for key, value in mapping.items()
    }
    if isinstance(inside.get("init_from"), str):
        inside["init_from"] = find_again(inside["init_from"], checkpoint)
    return inside
