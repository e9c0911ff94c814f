"""`nanolm data inspect DIR`: manifest, statistics and decoded samples of a prepared folder."""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Amount
from nanolm.data.prepare.report import inspect, inspection_figures, render_inspection
from nanolm.tables import show

POSITIONAL = ("directory",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Look into a prepared folder."""

    directory: str
    """Folder that `nanolm prepare` wrote."""
    samples: Amount = 3
    """Decoded samples to show."""
    json: str | None = None
    """Also write what is shown to this file."""


def run(arguments: Arguments) -> None:
    """Inspect and print."""
    inspection = inspect(arguments.directory, samples=arguments.samples)
    show(*render_inspection(inspection))
    write_json(arguments.json, inspection_figures(inspection))
