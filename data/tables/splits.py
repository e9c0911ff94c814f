"""Which file is train, val and test, and what happens where there is none.

`data.path` names a folder that holds train.*, val.* and test.* (dev.* and validation.* also mean
val), a single file, `stdlib:NAME` (a task made from the Python standard library) or `hf:NAME` (a
dataset of the Hugging Face hub); `data.train`, `data.val` and `data.test` name single files
instead.
Where there is no val split it is carved out of train by the hash of what the task reads of each
record, so it is the same rows on every machine, and no text stands on both sides.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from nanolm.data.permutation import Permutation
from nanolm.data.tables.files import SUFFIXES, Table, read_table
from nanolm.errors import UserError

NAMED_SOURCES = ("stdlib:", "hf:")
SHARD = r"-\d+(-of-\d+)"
"""How the files of one split are numbered: train-00000-of-00002.parquet."""
NAMES = {"train": ("train",), "val": ("val", "dev", "valid", "validation"), "test": ("test",)}


def find_split(path: str | None, files: dict[str, str | None], split: str) -> str | None:
    """The file or source of a split, or None; raises UserError when a folder holds two of them."""
    if files.get(split):
        return files[split]
    if path is None:
        return None
    if path.startswith(NAMED_SOURCES):
        return path
    folder = pathlib.Path(path)
    if folder.is_file():
        return path if split == "train" else None
    if not folder.is_dir():
        raise UserError(f"data.path {path} is neither a folder nor a file")
    named = re.compile(rf"({'|'.join(NAMES[split])})({SHARD})?\.", re.IGNORECASE)
    entries = sorted(entry for entry in folder.iterdir() if named.match(entry.name))
    entries = [entry for entry in entries if is_table(entry.name)]
    # Columns in a .txt are found where no file says by its name that it is a table.
    certain = [entry for entry in entries if not is_text(entry.name)]
    found = list(dict.fromkeys(whole(entry) for entry in certain or entries))
    if len(found) > 1:
        raise UserError(
            f"data.path has several {split} files ({', '.join(found)}): set data.{split}"
        )
    return found[0] if found else None


def whole(entry: pathlib.Path) -> str:
    """A file's path; of a shard the pattern of all of them."""
    name = re.sub(SHARD, lambda found: f"-*{found.group(1)}", entry.name, flags=re.IGNORECASE)
    return str(entry.with_name(name))


def is_table(name: str) -> bool:
    """Whether a file is called as tables are, compressed or not."""
    return f".{name.lower().partition('.')[2]}".startswith(SUFFIXES)


def is_text(name: str) -> bool:
    """Whether a file's name leaves open what it holds."""
    return name.lower().partition(".")[2].startswith("txt")


def shards_of(where: str) -> list[str]:
    """The files of a pattern that `find_split` gave, in order; any other path alone. Raises
    UserError when a shard is missing."""
    path = pathlib.Path(where)
    count = re.search(r"-\*-of-(\d+)\.", path.name)
    if count is None:
        return [where]
    found = sorted(map(str, path.parent.glob(path.name)))
    if len(found) != int(count.group(1)):
        raise UserError(
            f"{where} are {len(found)} files of {int(count.group(1))}; some are missing"
        )
    return found


def read_split(where: str, split: str) -> Table:
    """The table of a split from a file or a named source."""
    if where.startswith("stdlib:"):
        from nanolm.data.tables.stdlib import stdlib_table  # noqa: PLC0415  (parses a library)

        return stdlib_table(where.removeprefix("stdlib:"), split)
    if where.startswith("hf:"):
        return _hub_table(where.removeprefix("hf:"), split)
    tables = [read_table(path) for path in shards_of(where)]
    if len(tables) == 1:
        return tables[0]
    records = [record for table in tables for record in table.records]
    return Table(where, records, list(range(1, len(records) + 1)))


def has_split(where: str, split: str) -> bool:
    """Whether a source has a split: a dataset of the hub may lack val or test, which are carved or
    left out then as they are for files."""
    if split == "train" or not where.startswith("hf:"):
        return True
    return bool(set(NAMES[split]) & set(_hub_splits(where.removeprefix("hf:"))))


def _hub() -> Any:
    try:
        import datasets  # noqa: PLC0415  (an extra)
    except ImportError:
        raise UserError("hf: sources need datasets: pip install 'nanolm[hf]'") from None
    return datasets


def _hub_splits(name: str) -> list[str]:
    dataset_name, _, subset = name.partition(",")
    return list(_hub().get_dataset_split_names(dataset_name, subset or None))


def _hub_table(name: str, split: str) -> Table:
    datasets = _hub()
    dataset_name, _, subset = name.partition(",")
    names = _hub_splits(name)
    found = next((n for n in NAMES[split] if n in names), None)
    if found is None:
        raise UserError(f"hf:{name} has no {split} split; it has {', '.join(names)}")
    records = list(datasets.load_dataset(dataset_name, subset or None, split=found))
    return Table(f"hf:{name}/{found}", records, list(range(1, len(records) + 1)))


def carve(table: Table, fraction: float, key: tuple[str, ...] = ()) -> tuple[Table, Table]:
    """(train, val): val takes about `fraction` of the records, chosen by the hash of their content.

    `key` names the columns whose content decides, e.g. the context, so that records that share it
    stay together; without it the whole record does. Raises UserError when a side would be empty.
    """
    bound = int(fraction * 2**64)
    chosen = [_hash(record, key) < bound for record in table.records]
    parts = []
    for wanted in (False, True):
        here = [i for i, is_val in enumerate(chosen) if is_val == wanted]
        if not here:
            raise UserError(
                f"{table.path} is too small to carve a val split of {fraction:.0%} out of it; set "
                f"data.val or data.val_fraction"
            )
        parts.append(pick(table, here))
    return parts[0], parts[1]


def fold_out(table: Table, folds: int, fold: int, key: tuple[str, ...] = ()) -> tuple[Table, Table]:
    """(train, val) of cross-validation: val is part `fold` of `folds`, train the other parts.

    A record's part follows from the hash of its content, or of the columns `key`: it is the same on
    every machine, and what is equal stays together. Raises UserError when a side would be empty.
    """
    part_of = [_hash(record, key) * folds >> 64 for record in table.records]
    sides = [
        [i for i, part in enumerate(part_of) if (part == fold) == held_out]
        for held_out in (False, True)
    ]
    if not all(sides):
        raise UserError(f"{table.path} is too small for data.folds={folds}; use fewer folds")
    return pick(table, sides[0]), pick(table, sides[1])


def _hash(record: dict[str, Any], key: tuple[str, ...]) -> int:
    content = [record.get(name) for name in key] if key else record
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pick(table: Table, indices: list[int]) -> Table:
    """The records with these indices, in this order."""
    return Table(
        table.path, [table.records[i] for i in indices], [table.numbers[i] for i in indices]
    )


def sample(table: Table, limit: int, seed: int) -> Table:
    """A keyed sample of at most `limit` records (few-shot), in file order."""
    if limit >= len(table):
        return table
    order = Permutation(len(table), (seed, limit))
    return pick(table, sorted(int(order(np.array([i]))[0]) for i in range(limit)))


def sample_per_label(table: Table, shots: int, column: str, seed: int) -> Table:
    """At most `shots` records of every value of `column`, keyed by the seed, in file order."""
    order = Permutation(len(table), (seed, shots))
    taken: dict[str, int] = {}
    chosen = []
    for index in (int(order(np.array([i]))[0]) for i in range(len(table))):
        label = json.dumps(table.records[index].get(column), default=str)
        if taken.get(label, 0) < shots:
            taken[label] = taken.get(label, 0) + 1
            chosen.append(index)
    return pick(table, sorted(chosen))
