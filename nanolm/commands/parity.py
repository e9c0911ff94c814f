"""`nanolm parity`: our models beside those of transformers, family by family, both ways."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from nanolm.commands.figures import write_json
from nanolm.errors import UserError, require
from nanolm.finetune.parity import CASES as HEAD_CASES
from nanolm.finetune.parity import difference as head_difference
from nanolm.hub.proof import LIMIT, can_prove
from nanolm.inference.parity import CASES, DIRECTIONS, difference
from nanolm.tables import tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare our models with those of transformers on random weights, offline."""

    json: str | None = None
    """Also write the table to this file."""


def run(arguments: Arguments) -> None:
    """Compute every row, print the table, fail above the limit."""
    require(
        can_prove(), "parity needs transformers, which is not installed: pip install transformers"
    )
    tables_of = ((CASES, difference), (HEAD_CASES, head_difference))
    found = {
        case: {way: measure(case, way) for way in DIRECTIONS}
        for cases, measure in tables_of
        for case in cases
    }
    print("largest difference from transformers, float32")
    rows = [[case, *(f"{row[way]:.1e}" for way in DIRECTIONS)] for case, row in found.items()]
    Console().print(*tables(("model", *DIRECTIONS), rows))
    write_json(arguments.json, found)
    worst = [(case, way) for case, row in found.items() for way in DIRECTIONS if row[way] > LIMIT]
    if worst:
        raise UserError(f"{worst[0][0]} ({worst[0][1]}) differs by more than {LIMIT:.0e}")
