"""The contest of `nanolm bench train`: who takes part, in which variants, and their figures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from nanolm.tools.bench.admission import Entries, Job, Settings, enter_all, why_not
from nanolm.tools.bench.cells import Cells, device_name
from nanolm.tools.bench.contest import play
from nanolm.tools.bench.figures import against_best, figures_of, peak_of, speed
from nanolm.tools.bench.shape import Shape

MATMUL = {"model": "matmul"}


def contestants(objective: str) -> dict[str, Settings]:
    """Name -> settings: nanolm, nanolm with other kernels, and the others."""
    reference = {op: "reference" for op in ("attention", "linear_cross_entropy", "norm")}
    rows: dict[str, Settings] = {
        "nanolm": {"model": "nanolm"},
        "nanolm, reference kernels": {"model": "nanolm", "kernels": reference},
        "nanolm, torch's linear_cross_entropy": {
            "model": "nanolm",
            "kernels": {"linear_cross_entropy": "torch"},
        },
    }
    family = "gpt2" if objective == "clm" else "bert"
    rows[f"transformers {family}"] = {"model": f"transformers-{family}"}
    plain = "gpt" if objective == "clm" else "bert"
    rows[f"plain {plain} loop"] = {"model": f"plain-{plain}"}
    return {name: settings | {"objective": objective} for name, settings in rows.items()}


def entries(
    common: Job, device: str, objective: str, *, compiles: bool, only: Sequence[str] | None
) -> Entries:
    """Who takes part in the contest of one step, whose jobs have `common` in common."""
    variants = functools.partial(variants_of, compiles=compiles)
    return enter_all(
        contestants(objective), common, device, why_not=why_not, variants=variants, only=only
    )


def variants_of(settings: Settings, *, compiles: bool) -> list[Settings]:
    """A contestant as it is, and compiled; the rows that show other kernels only as they are."""
    tries = compiles and "kernels" not in settings
    return [settings | {"compile": compiled} for compiled in ([False, True] if tries else [False])]


def bench(entered: Entries, rounds: int, device: str, cells: Cells) -> dict[str, Any]:
    """All contestants of one step in one precision: figures by name."""
    first = next(iter(entered.jobs.values()))[0]
    product = {"matmul": [first | {"settings": MATMUL}]} if device == "cpu" else {}
    jobs = entered.jobs | product
    contest = cells.get(
        {"jobs": jobs, "rounds": rounds},
        lambda: play(jobs, rounds, "nanolm.tools.bench.step", speed),
        device,
    )
    played = {name: entry for name, entry in contest["players"].items() if name != "matmul"}
    peak, shape = peak_of(contest), Shape(**first["shape"])
    return {
        "objective": first["settings"]["objective"],
        "precision": first["precision"],
        "device_type": device,
        "device": device_name(device),
        "peak_tflops": peak and peak / 1e12,
        "rows": {name: figures_of(entry, shape, peak) for name, entry in played.items()},
        "left_out": entered.left_out,
        "against_best": against_best(played),
        "stolen": contest["stolen"],
    }
