"""`nanolm parity`: our models beside those of transformers, family by family, both ways; or those
of given configs, in their full size."""

from __future__ import annotations

import dataclasses
import pathlib

from nanolm.commands.json_file import write_json
from nanolm.errors import require
from nanolm.finetune.parity import CASES as HEAD_CASES
from nanolm.finetune.parity import difference as head_difference
from nanolm.hub.proof import LIMIT, can_prove
from nanolm.inference.parity import CASES, DIRECTIONS, difference
from nanolm.tables import show, tables
from nanolm.terminal import say
from nanolm.tools.parity_of_configs import compared

POSITIONAL = ("configs",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare our models with those of transformers on random weights, offline."""

    configs: list[str] = dataclasses.field(default_factory=list)
    """YAML files of runs whose models are compared, and counted, in their full size; none for small
    models of every family."""
    all: bool = False
    """Small models of every family with every head of a task too, not of pretraining alone."""
    json: str | None = None
    """Also write the table to this file."""


def run(arguments: Arguments) -> None:
    """Compute every row, print the table, fail above the limit."""
    require(
        can_prove(), "parity needs transformers, which is not installed: pip install transformers"
    )
    require(
        not (arguments.all and arguments.configs),
        f"--all is for the small models of every family, and {' '.join(arguments.configs)} would "
        f"be compared in full size; leave out one of them",
    )
    if arguments.configs:
        configs_table(arguments)
    else:
        families_table(arguments)


def families_table(arguments: Arguments) -> None:
    """Small models of every family, in and out; with --all those with the heads of tasks too."""
    measures = dict.fromkeys(CASES, difference)
    if arguments.all:
        measures |= dict.fromkeys(HEAD_CASES, head_difference)
    found = {
        case: {way: measure(case, way) for way in DIRECTIONS} for case, measure in measures.items()
    }
    say("largest difference from transformers, float32")
    rows = [[case, *(f"{row[way]:.1e}" for way in DIRECTIONS)] for case, row in found.items()]
    show(*tables(("model", *DIRECTIONS), rows))
    write_json(arguments.json, found)
    for case, row in found.items():
        for way in DIRECTIONS:
            require(row[way] <= LIMIT, f"{case} ({way}) differs by more than {LIMIT:.0e}")


def configs_table(arguments: Arguments) -> None:
    """The models of the configs, out."""
    found = {pathlib.Path(path).stem: compared(path) for path in arguments.configs}
    say("parameters, and the largest difference from transformers, float32")
    rows = [
        [name, row.family, f"{row.parameters:,}", f"{row.theirs:,}", f"{row.largest:.1e}"]
        for name, row in found.items()
    ]
    head = ("model", "family", "parameters", "in transformers", "difference")
    show(*tables(head, rows, left=2))
    write_json(arguments.json, {name: dataclasses.asdict(row) for name, row in found.items()})
    for name, row in found.items():
        require(row.parameters == row.theirs, f"transformers counts {row.theirs:,} of {name}")
        require(row.largest <= LIMIT, f"{name} differs by more than {LIMIT:.0e}")
