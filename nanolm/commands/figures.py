"""`nanolm figures`: the pictures of the documentation as SVG; with RUN…, the curves of runs.

nanolm figures              docs/journey.svg, docs/masks.svg
nanolm figures RUN …        RUN/curves.svg of each
"""

from __future__ import annotations

import dataclasses
import pathlib

from nanolm.errors import UserError
from nanolm.files import write_text
from nanolm.terminal import say
from nanolm.tools.figures.curves import curves
from nanolm.tools.figures.journey import journey
from nanolm.tools.figures.masks import masks
from nanolm.training.runs import read_run

POSITIONAL = ("runs",)
PICTURES = {"journey.svg": journey, "masks.svg": masks}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw the journey of a batch and the masks, or the curves of runs."""

    runs: list[str] = dataclasses.field(default_factory=list)
    """Folders of runs; none means the pictures of the code."""
    out: str | None = None
    """Folder to write to; null means docs, and for a run's curves its own folder."""


def run(arguments: Arguments) -> None:
    """Draw, and say what was written."""
    drawn = {}
    for name, draw in {} if arguments.runs else PICTURES.items():
        drawn[pathlib.Path(arguments.out or "docs") / name] = draw()
    for folder in arguments.runs:
        found = read_run(folder)
        for problem in found.problems:
            say(f"note: {problem}")
        path = found.folder / "curves.svg"
        if arguments.out is not None:
            path = pathlib.Path(arguments.out) / f"curves_{found.folder.resolve().name}.svg"
        if path in drawn:
            raise UserError(f"two runs would both be drawn as {path}; draw them one by one")
        drawn[path] = curves(found)
    for path, picture in drawn.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {path.parent}: {error.strerror}; choose another --out"
            ) from None
        write_text(path, str(picture))
        say(f"wrote {path}")
