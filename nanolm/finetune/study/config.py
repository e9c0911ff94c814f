"""The schema of a study: a table of experiments, rows × variants × seeds (`nanolm study`).

A cell is one fine-tuning run: the study's overrides, then the row's, the variant's, the setting of
the grid and the seed. Overrides are the dotted keys of `nanolm finetune`; in their values {data}
stands for the folder given with --data and {NAME} for a path of `paths`, so that a committed study
names no folder of one machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nanolm.config.ranges import Count, Seed
from nanolm.errors import require

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The choice of a setting on val: the same grid for every variant."""

    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Values to try for each key; every combination is tried with the first seed."""
    overrides: Overrides = dataclasses.field(default_factory=dict)
    """Keys over the cell's while the grid is tried, such as {train.epochs: 1}: cheaper runs."""

    def __post_init__(self) -> None:
        for key, values in self.grid.items():
            require(len(values) > 0, f"tune.grid.{key} is empty; give at least one value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowConfig:
    """One line of the table."""

    name: str
    """What the table calls it."""
    config: str | None = None
    """Config file of `nanolm finetune` to start from."""
    overrides: Overrides = dataclasses.field(default_factory=dict)
    """Keys over the study's: {data.path: "{data}/question_type"}."""
    metric: str | None = None
    """Figure that chooses and is reported; null means the task's own."""
    reported: str | None = None
    """Figure of the test split that is reported in its place: what only `nanolm evaluate` measures,
    such as the chrF of what is written, chooses nothing."""
    yardstick: float | None = None
    """What a simple method reaches on the test split."""
    goal: float | None = None
    """What is hoped for."""
    tune: TuneConfig | None = None
    """The row's own choice of a setting, the same for every variant; null means the study's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One way to run every row."""

    overrides: Overrides = dataclasses.field(default_factory=dict)
    """Keys over the row's: {weights: random}."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Run a table of experiments, restartable cell by cell, and print it."""

    name: str
    """Names the markers in `table`: <!-- study: NAME --> and <!-- end of study: NAME -->."""
    data: str | None = None
    """Folder that {data} stands for."""
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """Paths, mostly of checkpoints, that {NAME} stands for."""
    out: str = "runs/study"
    """Folder of the cells' runs and logs."""
    results: str | None = None
    """JSON file of finished cells, found by the next call; null means OUT/NAME.json."""
    table: str | None = None
    """Markdown file in which the table is written between the markers; null for none."""
    jobs: Count = 1
    """Cells that run at once, each in a process of its own with one thread."""
    seeds: list[Seed] = dataclasses.field(default_factory=lambda: [0])
    """Seeds of the chosen setting; the table shows mean and standard error."""
    overrides: Overrides = dataclasses.field(default_factory=dict)
    """Keys for all cells."""
    rows: list[RowConfig] = dataclasses.field(default_factory=list)
    """Lines of the table."""
    variants: dict[str, VariantConfig] = dataclasses.field(
        default_factory=lambda: {"": VariantConfig()}
    )
    """Ways to run every row, beside each other."""
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    """The choice of a setting."""
    costs: bool = False
    """A line for each row and variant with parameters, seconds and memory beside the metric."""
    keep_weights: bool = False
    """Keep the cells' checkpoints when their figures stand."""
    only: list[str] | None = None
    """Rows to run; the Markdown table is only written when all rows are there."""

    def __post_init__(self) -> None:
        require(len(self.rows) > 0, "rows is empty: a study needs at least one row")
        require(len(self.variants) > 0, "variants is empty: leave it out, or name one")
        require(len(set(self.seeds)) == len(self.seeds) > 0, f"seeds={self.seeds} must differ")
        names = [row.name for row in self.rows]
        for name in names:
            require(names.count(name) == 1, f"rows: the name {name!r} stands twice")
        for name in self.only or []:
            require(name in names, f"only: {name!r} is no row; there are {', '.join(names)}")
