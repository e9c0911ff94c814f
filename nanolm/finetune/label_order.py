"""Fine-tuning that goes on from a head: every label keeps the row that was trained for it.

A head knows its labels by number. Those of a table are numbered by their names, those of an
imported model as its authors did, so a run takes the checkpoint's order where the table has the
same ones. Where a config names them in another order the head would answer with wrong names, which
is refused; where they are other labels, the rows go on under new names, and it is said.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nanolm.config import strict_yaml
from nanolm.data.tables.files import Table
from nanolm.errors import require
from nanolm.finetune.config import TaskConfig
from nanolm.finetune.tasks.base import Task
from nanolm.finetune.tasks.multi import head_key

Labels = Sequence[str]
ROWS = {"classify": "labels", "tag": "labels", "regress": "scores"}
"""The option that names the rows of each task's head, which is called like the task."""


def objective_of(base: pathlib.Path) -> dict[str, Any]:
    """The saved objective of a checkpoint."""
    found: dict[str, Any] = strict_yaml.read_mapping(base / "config.yaml")["objective"]
    return found


def labels_by_head(objective: Mapping[str, Any]) -> dict[str, Labels]:
    """{name of a head: what its rows stand for} of a saved objective, of several tasks too."""
    parts = {name: part["objective"] for name, part in objective.get("tasks", {}).items() if part}
    rows = {
        head_key(name, part["name"]): labels
        for name, part in parts.items()
        if (labels := rows_of(part))
    }
    own = rows_of(objective)
    return rows | ({objective["name"]: own} if own else {})


def rows_of(objective: Mapping[str, Any]) -> Labels | None:
    """What the rows of one task's head stand for; None where they have no names."""
    return objective.get(ROWS.get(objective["name"], ""))


def with_known_order(task: type[Task], options: Any, train: Table, known: Labels | None) -> Any:
    """The options with what a table decides filled in; labels that are the known ones, in the known
    order, unless the options name labels, or weights by their number, themselves."""
    found = task.resolve(options, train)
    numbered = isinstance(getattr(options, "class_weights", None), list)
    if known is None or getattr(options, "labels", ()) is not None or numbered:
        return found
    if sorted(found.labels) != sorted(known):
        return found
    return task.resolve(dataclasses.replace(options, labels=list(known)), train)


def check_labels(config: TaskConfig, base: pathlib.Path, kept: Sequence[str]) -> list[str]:
    """A sentence for each head that goes on with other labels than it was trained for; raises
    UserError for one that would go on with the same ones in another order."""
    before = labels_by_head(objective_of(base))
    now = labels_by_head(dataclasses.asdict(config.objective))
    sentences = []
    for name in kept:
        old, new = before.get(name), now.get(name)
        if old is None or new is None or list(old) == list(new):
            continue
        require(
            sorted(old) != sorted(new),
            f"this run names the labels of heads.{name} in the order [{', '.join(new)}], and "
            f"{base} was trained with [{', '.join(old)}], so that answers would get wrong names; "
            f"name them in that order",
        )
        sentences.append(
            f"heads.{name} was trained for {', '.join(old)} and goes on, row by row, for "
            f"{', '.join(new)}"
        )
    return sentences
