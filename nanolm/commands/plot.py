"""`nanolm plot RUN…`: loss, learning rate and throughput of one or several runs as one PNG."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from nanolm.errors import UserError, require
from nanolm.finetune.pictures import fonts_for, pyplot
from nanolm.terminal import say
from nanolm.training.runs import Run, read_run

PANELS = (
    ("loss", "loss (nats)", "linear"),
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("tokens_per_second", "tokens per second", "linear"),
)
POSITIONAL = ("runs",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw the curves of runs."""

    runs: list[str]
    """Folders of runs."""
    out: str | None = None
    """Picture to write, PNG, SVG or PDF by the end of its name; null means plot.png in the first
    run's folder."""


FORMATS = (".png", ".svg", ".pdf")


def draw(runs: list[Run], out: pathlib.Path) -> list[str]:
    """Write the picture, and say what its reader should know; raises UserError when matplotlib is
    not installed, or it cannot be written."""
    plt = pyplot()
    require(
        out.suffix.lower() in FORMATS,
        f"--out {out} does not say what kind of picture it is; end it in {', '.join(FORMATS)}",
    )
    with fonts_for(run.folder.name for run in runs) as notes:
        figure = curves(plt, runs)
        try:
            figure.savefig(out, dpi=110)
        except OSError as error:
            raise UserError(
                f"cannot write --out {out}: {error.strerror}; name another place"
            ) from None
        finally:
            plt.close(figure)
    return notes


def curves(plt: Any, runs: list[Run]) -> Any:
    """The figure: a panel for each of `PANELS`, a line for each run."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (key, title, scale) in zip(axes.flat, PANELS, strict=True):
        for run in runs:
            line = axis.plot(*run.curve("train", key), label=run.folder.name, linewidth=1.2)[0]
            val = run.curve("val", key)
            if val[0]:
                label = f"{run.folder.name} (val)"
                axis.plot(*val, "o--", color=line.get_color(), label=label, markersize=4)
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    return figure


def run(arguments: Arguments) -> None:
    """Read the runs and draw."""
    require(bool(arguments.runs), "runs is empty; name the folder of at least one run")
    runs = [read_run(folder) for folder in arguments.runs]
    for problem in [problem for each in runs for problem in each.problems]:
        say(f"note: {problem}")
    out = pathlib.Path(arguments.out) if arguments.out else runs[0].folder / "plot.png"
    for note in draw(runs, out):
        say(note)
    say(f"wrote {out}")
