"""`nanolm study STUDY.yaml`: rows × variants × seeds, each cell in a process of its own.

    group (row × variant):  grid on val, first seed -> best setting -> all seeds -> test, once

Groups run beside each other, the cells of a group one after the other. Each finished cell is
written into the results file at once, under the hash of its config, data and weights; a study that
was broken off, or changed in one row, runs what is missing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

from nanolm.errors import UserError
from nanolm.files import Finished
from nanolm.finetune.study.cells import Cell, build_cell, drop_weights, end_running, test, train
from nanolm.finetune.study.config import Overrides, RowConfig, StudyConfig

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """One row in one variant: the cells that try settings, and each setting's cells by seed."""

    row: RowConfig
    variant: str
    tries: list[Cell]
    finals: list[list[Cell]]

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once."""
        every = [*self.tries, *itertools.chain(*self.finals)]
        return list({cell.key: cell for cell in every}.values())


class Results(Finished):
    """Finished cells on disk, by key, and the defaults that their keys are told against."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path, "a study", "defaults")
        self.defaults = self.beside["defaults"]


def settings(grid: dict[str, list[Any]]) -> list[Overrides]:
    """Every combination of a grid's values; one empty setting when there is no grid."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def plan(study: StudyConfig, defaults: dict[str, Any]) -> list[Group]:
    """All groups with all cells that may be run; raises UserError for a config that is refused.
    `defaults` are those of `Results`, and get what is new."""
    groups = []
    for row, variant in itertools.product(study.rows, study.variants):
        if study.only is not None and row.name not in study.only:
            continue
        tried = settings((row.tune or study.tune).grid)
        tries = [
            build_cell(study, row, variant, study.seeds[0], setting, defaults, tries=True)
            for setting in tried
            if len(tried) > 1
        ]
        finals = [
            [
                build_cell(study, row, variant, seed, setting, defaults, tries=False)
                for seed in study.seeds
            ]
            for setting in tried
        ]
        groups.append(Group(row, variant, tries, finals))
    return groups


class Study:
    """Runs groups; `note` gets a line for each finished cell."""

    def __init__(
        self, study: StudyConfig, results: Results, note: Callable[[str], None] = print
    ) -> None:
        self.study, self.results, self.note = study, results, note
        self.started = time.perf_counter()

    def run(self, groups: list[Group]) -> None:
        """Runs all that is missing; raises UserError for the first cell that failed, at the end."""
        failures: list[BaseException] = []
        with concurrent.futures.ThreadPoolExecutor(self.study.jobs) as pool:
            futures = [pool.submit(self.group, group) for group in groups]
            try:
                for future in futures:
                    if error := future.exception():
                        failures.append(error)
            except KeyboardInterrupt:
                end_running()
                pool.shutdown(cancel_futures=True)
                raise
        for error in failures:
            if not isinstance(error, UserError):
                raise error
        if failures:
            raise UserError(
                f"{len(failures)} of {len(groups)} groups are not finished: {failures[0]}"
            )

    def group(self, group: Group) -> list[Record]:
        """The records of the chosen setting, one for each seed."""
        finals = chosen(group, [self.finished(cell) for cell in group.tries])
        records = [self.finished(cell, tests=True) for cell in finals]
        if not self.study.keep_weights:
            for cell in group.cells:
                drop_weights(cell)
        return records

    def finished(self, cell: Cell, *, tests: bool = False) -> Record:
        """The cell's record, run now as far as it is missing."""
        record = self.results.cells.get(cell.key)
        if record is not None and not (tests and record["test"] is None):
            return record
        if record is None or not (cell.run / "checkpoints").is_dir():
            record = train(cell)
            self.results.put(cell.key, record)
        if tests:
            record = test(cell, record)
            self.results.put(cell.key, record)
        reached = {"val": record["val"]}
        if record["test"] is not None:
            reached[f"test {cell.reported}"] = record["test"][cell.reported]
        figures = ", ".join(f"{split} {value:.4f}" for split, value in reached.items())
        minutes = (time.perf_counter() - self.started) / 60
        self.note(
            f"{minutes:5.1f} min  {cell.label}: {record['metric']} {figures}, "
            f"{record['seconds']:.0f} s, {record['peak_mib']:.0f} MiB"
        )
        return record


def chosen(group: Group, tried: list[Record]) -> list[Cell]:
    """The cells of the setting that was best on val; the first of equals."""
    if not tried:
        return group.finals[0]
    sign = -1 if group.tries[0].higher_is_better else 1
    best = min(range(len(tried)), key=lambda i: sign * tried[i]["val"])
    return group.finals[best]


def finished_records(group: Group, results: Results) -> list[Record] | None:
    """The records of the chosen setting when the whole group was run, else None."""
    done = results.cells
    tried = [done[cell.key] for cell in group.tries if cell.key in done]
    if len(tried) < len(group.tries):
        return None
    finals = chosen(group, tried)
    records = [done[cell.key] for cell in finals if done.get(cell.key)]
    whole = len(records) == len(finals) and all(record["test"] for record in records)
    return records if whole else None
