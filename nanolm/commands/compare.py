"""`nanolm compare RUN OTHER`: what `nanolm evaluate` found out about two runs, side by side.

Reads RUN/evaluation/SPLIT.json of both; the last line says how far apart they are in the figure
that chose their checkpoints, such as what pretraining was worth against --weights random.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from nanolm.checkpoint.container import read_json
from nanolm.errors import UserError, require
from nanolm.finetune.config import TaskConfig
from nanolm.registry import OBJECTIVES
from nanolm.saved import read_config
from nanolm.tables import ending, open_console, tables
from nanolm.terminal import say

POSITIONAL = ("run", "other")
LONGEST_NAME = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare two fine-tuned runs on a split that both were evaluated on."""

    run: str
    """Folder of a fine-tuned run."""
    other: str
    """Folder of the run that it is compared with."""
    split: str = "test"
    """Split whose evaluation is compared."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the runs were trained with."""


def run(arguments: Arguments) -> None:
    """Print both runs' figures and the difference."""
    places = (pathlib.Path(arguments.run), pathlib.Path(arguments.other))
    mine, others = (evaluation(place, arguments.split, arguments.plugins) for place in places)
    summaries = [read_json(place, "summary.json") for place in places]
    metrics = {summary["metric"] for summary in summaries}
    require(
        len(metrics) == 1 and mine["rows"] == others["rows"],
        f"{places[0]} and {places[1]} were not evaluated alike: {mine['rows']} and "
        f"{others['rows']} records, by {' and '.join(sorted(metrics))}",
    )
    (metric,) = metrics
    left, right = mine["figures"], others["figures"]
    rows = [
        [name, f"{left[name]:.4f}", f"{right[name]:.4f}", f"{left[name] - right[name]:+.4f}"]
        for name in left
        if name in right
    ]
    console = open_console()
    head = ("figure", *(ending(str(place), LONGEST_NAME) for place in places), "difference")
    for grid in tables(head, rows):
        console.print(grid)
    higher = direction(places[0], summaries[0], arguments.plugins)
    say(verdict(metric, left[metric], right[metric], places, higher))


def require_tuned(place: pathlib.Path, plugins: list[str]) -> None:
    """Raises UserError for what is no run, and for a pretrained one, whose evaluation is printed
    and not kept."""
    require(
        (place / "config.yaml").is_file(),
        f"{place} holds no run: there is no config.yaml in it; name the folder of a run",
    )
    require(
        isinstance(read_config(place, plugins), TaskConfig),
        f"{place} was pretrained, and `nanolm compare` is for fine-tuned runs; `nanolm runs` shows "
        f"pretrained ones below each other",
    )


def direction(place: pathlib.Path, summary: dict[str, Any], plugins: list[str]) -> bool:
    """Whether more of the figure that chose a run's checkpoint is better: as its summary says, or
    in a run whose summary is too old to say so, as its task declares."""
    if "higher_is_better" in summary:
        return summary["higher_is_better"]
    options = read_config(place, plugins).objective
    return dict(OBJECTIVES.get(options.name).build.metrics(options))[summary["metric"]]


def evaluation(place: pathlib.Path, split: str, plugins: list[str]) -> dict[str, Any]:
    """What was found out about a run; raises UserError when it was not evaluated."""
    if not (place / "evaluation" / f"{split}.json").is_file():
        require_tuned(place, plugins)  # else evaluating it would write nothing
        raise UserError(
            f"{place} has no evaluation of {split}: first run "
            f"`nanolm evaluate {place} --split {split}`"
        )
    return read_json(place / "evaluation", f"{split}.json")


def verdict(
    metric: str,
    value: float,
    other: float,
    places: tuple[pathlib.Path, pathlib.Path],
    higher_is_better: bool,
) -> str:
    """One line: which is better, and by how much."""
    gain = (value - other) if higher_is_better else (other - value)
    word = "better" if gain > 0 else "worse" if gain < 0 else "neither better nor worse"
    amount = f"{abs(gain):.4f} " if gain else ""
    return f"{metric}: {places[0]} reaches {value:.4f}, {places[1]} {other:.4f}: {amount}{word}"
