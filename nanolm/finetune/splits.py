"""The splits of a task, read, checked and made into items before anything is trained.

    file -> Table -> fields under the task's names -> usable records -> items

Everything the user should know is collected as messages: rows left out and why, texts cut.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from nanolm.data.tables.files import Table
from nanolm.data.tables.splits import (
    NAMED_SOURCES,
    carve,
    find_split,
    fold_out,
    has_split,
    pick,
    read_split,
    sample,
    sample_per_label,
)
from nanolm.errors import UserError
from nanolm.finetune.config import TaskConfig, TaskDataConfig
from nanolm.finetune.tasks.base import Task
from nanolm.finetune.tasks.items import Item

MOST_LABELS = 20
"""Labels that are told with their counts; a set with more is no set of labels, or a long one."""


class Remedies(NamedTuple):
    """What helps in the command that reads a table: against a column that is missing, in whose
    place stands {field}, and against a row that cannot be used."""

    column: str
    row: str


TRAINING = Remedies(
    "say which one it is with --data.columns '{{{field}: NAME}}'",
    "mend it, or leave such rows out with --data.bad_rows skip",
)
ANSWERING = Remedies("say which one it is with --columns '{{{field}: NAME}}'", "mend it")
TYPED = Remedies("call it {field}", "mend it")
"""Of lines that a person or a program wrote for nanolm, which have no columns of their own."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split ready for the loader: its usable records and their items."""

    name: str
    table: Table
    items: list[Item]
    messages: list[str]

    @property
    def mean_tokens(self) -> float:
        """Real tokens of an item, on average."""
        total = sum(len(s.tokens) for item in self.items for s in item.sequences)
        return total / max(1, len(self.items))


def training_tables(config: TaskConfig, task: type[Task]) -> tuple[Table, Table, Table]:
    """(train, val, whole): val carved out of train where there is none, or a fold of it; few-shot
    subsets taken; and the whole train file, which decides on label sets.

    Raises UserError when there is nothing to train on.
    """
    data = config.data
    train = open_table(data, "train")
    if train is None:
        raise UserError("no data: set data.path to a folder with train files, or data.train")
    whole, val = train, open_table(data, "val")
    by = task.split_columns(config.objective)
    if data.folds is not None:
        train, val = fold_out(train, data.folds, data.fold or 0, by)
    elif val is None:
        train, val = carve(train, data.val_fraction, by)
    if data.shots:
        column = task.gold[0]
        train = sample_per_label(train, data.shots, column, config.run.seed)
    if data.limit:
        train = sample(train, data.limit, config.run.seed)
    return train, val, whole


def open_table(data: TaskDataConfig, split: str) -> Table | None:
    """A split's table with its columns under the task's names, or None when there is none."""
    path = data.path
    if data.train and path and path.startswith(NAMED_SOURCES):
        path = None  # a built-in config's source: its other splits are not those of the user's file
    where = find_split(path, data.files, split)
    if where is None or not has_split(where, split):
        return None
    return renamed(read_split(where, split), data.columns)


def other_data(
    table: Table, own: Mapping[str, str | None], given: Mapping[str, str | None]
) -> Table:
    """A table that the run was not trained on, with the task's fields: by the columns of the run's
    own config that it has, and by those that the user names for it (--columns)."""
    own = {field: column for field, column in own.items() if column in table.columns}
    return renamed(table, own | dict(given), "--columns")


def renamed(
    table: Table, columns: Mapping[str, str | None], option: str = "--data.columns"
) -> Table:
    """The table with the fields of the task filled from the columns that the config, or `option`,
    names; null leaves a field as it is in the file."""
    named = {field: column for field, column in columns.items() if column is not None}
    for field, column in named.items():
        if column not in table.columns:
            raise UserError(
                f"{option.lstrip('-')} says that {field} stands in column {column}, but "
                f"{table.path} has {', '.join(table.columns)}: name the right one, or take the "
                f"entry back with {option} '{{{field}: null}}'"
            )
    if not named:
        return table
    records = [
        record | {field: record.get(column) for field, column in named.items()}
        for record in table.records
    ]
    return dataclasses.replace(table, records=records)


def require_fields(table: Table, fields: tuple[str, ...], remedies: Remedies = TRAINING) -> None:
    """Raises UserError naming the columns that the file has when a field of the task is missing."""
    for field in fields:
        if field not in table.columns:
            raise UserError(
                f"{table.path} has no column {field}; it has {', '.join(table.columns)}: "
                f"{remedies.column.format(field=field)}"
            )


def make_split(
    name: str,
    table: Table,
    task: Task,
    data: TaskDataConfig,
    *,
    with_gold: bool = True,
    remedies: Remedies = TRAINING,
) -> Split:
    """Items of all usable records of a table.

    Raises UserError for the first record that cannot be used, unless data.bad_rows is skip, and
    when none can.
    """
    require_fields(table, task.fields + (task.gold if with_gold else ()), remedies)
    kept: list[int] = []
    skipped: dict[str, list[int]] = collections.defaultdict(list)
    for index, record in enumerate(table.records):
        problem = task.check(record, with_gold=with_gold)
        if problem is None:
            kept.append(index)
        elif data.bad_rows == "refuse":
            raise UserError(f"{table.where(index)}: {problem}; {remedies.row}")
        else:
            skipped[problem].append(table.numbers[index])
    if not kept:
        raise UserError(f"{table.path} has no usable row; the first says: {next(iter(skipped))}")
    table = pick(table, kept)
    items = [
        item
        for index, record in enumerate(table.records)
        for item in task.items(record, index, with_gold=with_gold)
    ]
    messages = messages_of(name, table, items, skipped, task.cut_to)
    told = task.messages_about(table, items) if with_gold else []
    return Split(name, table, items, [*messages, *(f"{name}: {note}" for note in told)])


def training_split(name: str, table: Table, task: Task, data: TaskDataConfig) -> Split:
    """`make_split` without the items that the task leaves out of training; a note says how many."""
    split = make_split(name, table, task, data)
    items = task.trained(split.items)
    if not items:
        raise UserError(
            f"{table.path}: none of its {len(table):,} records can be trained on"
            f"{''.join(f'; {note}' for note in split.messages)}"
        )
    left_out = len(split.items) - len(items)
    messages = [f"{name}: {left_out:,} of {len(split.items):,} rows are not trained on"]
    counts = count_notes(name, task.label_counts(split.table))
    messages = split.messages + counts + messages * bool(left_out)
    return dataclasses.replace(split, items=items, messages=messages)


def count_notes(name: str, counts: dict[str, int]) -> list[str]:
    """The label set with how often each occurs in the split; of a long one the most frequent."""
    if not counts:
        return []
    most = sorted(counts, key=lambda label: -counts[label])[:MOST_LABELS]
    shown = ", ".join(f"{label} {counts[label]:,}" for label in counts if label in most)
    rest = len(counts) - len(most)
    more = f", and {rest:,} rarer ones" if rest else ""
    return [f"{name}: {len(counts):,} labels: {shown}{more}"]


def messages_of(
    name: str, table: Table, items: list[Item], skipped: dict[str, list[int]], cut_to: str
) -> list[str]:
    """What the user should know about a split."""
    messages = []
    n_skipped = sum(map(len, skipped.values()))
    if n_skipped:
        reason, rows = max(skipped.items(), key=lambda pair: len(pair[1]))
        messages.append(
            f"{name}: left out {n_skipped} of {n_skipped + len(table)} rows, most often because "
            f"{reason} (row {rows[0]})"
        )
    cut = [item for item in items if item.cut]
    if cut:
        records = len({item.record for item in cut})
        tokens = sum(item.cut for item in cut)
        messages.append(
            f"{name}: {records} of {len(table)} texts were cut to {cut_to} ({tokens} tokens lost)"
        )
    return messages
