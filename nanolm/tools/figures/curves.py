"""The curves of one run, from its metrics.jsonl: loss beside a unigram model's, rate, gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from nanolm.errors import require
from nanolm.tools.figures.svg import COLOURS, Picture, number
from nanolm.training.runs import Run

Points = list[tuple[float, float]]
TRAIN, VAL, UNIGRAM = COLOURS["blue"], COLOURS["orange"], COLOURS["grey"]
GRID, HEIGHT = "#d9d9d9", 640


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """A panel's place on the picture and what its axes span."""

    left: float
    top: float
    width: float
    height: float
    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        """Where a step stands."""
        return self.left + share(step, self.steps) * self.width

    def y(self, value: float) -> float:
        """Where a value stands."""
        return self.top + (1 - share(value, self.values)) * self.height


def share(value: float, bounds: tuple[float, float]) -> float:
    """How far between the bounds, 0 to 1."""
    return (value - bounds[0]) / (bounds[1] - bounds[0])


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers, 1, 2 or 5 times a power of ten apart, that enclose both."""
    size = max(abs(low), abs(high), 1e-30)
    if high - low <= 1e-9 * size:  # as good as one value
        half = 0.5 * size if size > 1e-30 else 0.5
        low, high = low - half, high + half
    apart = 10.0 ** math.floor(math.log10((high - low) / most))
    factors = (f * scale for scale in (1, 10, 100) for f in (1, 2, 5))
    apart = next(a for f in factors if spread(low, high, a := apart * f) <= most - 1)
    first = math.floor(low / apart + 1e-9)
    return [apart * (first + i) for i in range(spread(low, high, apart) + 1)]


def spread(low: float, high: float, apart: float) -> int:
    """How many steps of this size enclose both."""
    return math.ceil(high / apart - 1e-9) - math.floor(low / apart + 1e-9)


def points(run: Run, kind: str, key: str) -> Points:
    """(step, value) of a figure, where it is finite."""
    return [
        (step, value)
        for step, value in zip(*run.curve(kind, key), strict=True)
        if math.isfinite(value)
    ]


def unigram_loss(run: Run) -> Points:
    """What the unigram model loses on the same targets, in nats a token as the loss is: its bits a
    byte are to the model's as its nats are."""
    ratio = {
        line["step"]: line["unigram_bits_per_byte"] / line["bits_per_byte"]
        for line in run.lines
        if line.get("kind") == "val"
        and line.get("bits_per_byte")
        and "unigram_bits_per_byte" in line
    }
    return [(step, nll * ratio[step]) for step, nll in points(run, "val", "nll") if step in ratio]


def curves(run: Run) -> Picture:
    """The picture; raises UserError for a run that has logged no step."""
    train, val, unigram = (
        points(run, "train", "loss"),
        points(run, "val", "loss"),
        unigram_loss(run),
    )
    require(bool(train), f"{run.folder} has logged no training step yet; there is nothing to draw")
    last = max(step for step, _ in train + val)
    name = run.folder.resolve().name
    told = f"after step {last:g} the training loss is {train[-1][1]:.3f} nats"
    if val:
        told += f", on the validation split {val[-1][1]:.3f}"
    if unigram:
        told += f"; a unigram model loses {unigram[-1][1]:.3f}"
    picture = Picture(
        title=f"Curves of the run {name}",
        description=f"Loss, learning rate and gradient norm over the steps; {told}.",
        height=HEIGHT,
    )
    steps = (0.0, ticks(0, last, 6)[-1])
    legend(picture, [("train", TRAIN, ""), *[("validation", VAL, "")] * bool(val)])
    if unigram:
        legend(picture, [("unigram model", UNIGRAM, "6 5")], left=390)
    loss = panel(picture, "loss, nats a token", 70, 80, 620, 240, steps, [train, val, unigram])
    line(
        picture,
        loss,
        [(0.0, unigram[-1][1]), (steps[1], unigram[-1][1])] if unigram else [],
        UNIGRAM,
        dashes="6 5",
    )
    line(picture, loss, train, TRAIN)
    line(picture, loss, val, VAL, dots=True)
    for left, title, key in ((90, "learning rate", "lr"), (430, "gradient norm", "grad_norm")):
        values = points(run, "train", key)
        if values:
            frame = panel(picture, title, left, 430, 260, 140, steps, [values, [(0.0, 0.0)]])
            line(picture, frame, values, TRAIN)
    return picture


def legend(picture: Picture, entries: Sequence[tuple[str, str, str]], left: float = 70) -> None:
    """Which colour is what."""
    for name, colour, dashes in entries:
        more = {"stroke_dasharray": dashes} if dashes else {}
        picture.path(f"M{number(left)} 29h34", stroke=colour, width=2.5, **more)
        picture.text(left + 42, 34, name, fill=colour)
        left += 140


def panel(
    picture: Picture,
    title: str,
    left: float,
    top: float,
    width: float,
    height: float,
    steps: tuple[float, float],
    curves: Sequence[Points],
) -> Frame:
    """Axes with round numbers for these curves, a title above and steps below."""
    values = [value for curve in curves for _, value in curve]
    marks = ticks(min(values), max(values), max(3, int(height / 40)))
    frame = Frame(
        left=left, top=top, width=width, height=height, steps=steps, values=(marks[0], marks[-1])
    )
    picture.text(left, top - 8, title, bold=True)
    for mark in marks:
        y = frame.y(mark)
        picture.path(f"M{number(left)} {number(y)}h{number(width)}", stroke=GRID, width=1)
        picture.text(left - 8, y + 5, f"{mark:.4g}", anchor="end")
    for mark in (m for m in ticks(*steps, 6 if width > 400 else 4) if m <= steps[1]):
        picture.text(frame.x(mark), top + height + 22, f"{mark:g}", anchor="middle")
    picture.text(left + width / 2, top + height + 44, "step", anchor="middle")
    return frame


def line(
    picture: Picture,
    frame: Frame,
    curve: Points,
    colour: str,
    *,
    dashes: str = "",
    dots: bool = False,
) -> None:
    """A curve, with a dot at each point if that is asked for."""
    if not curve:
        return
    at = [(number(frame.x(step)), number(frame.y(value))) for step, value in curve]
    more = {"stroke_dasharray": dashes} if dashes else {}
    picture.path("M" + "L".join(f"{x} {y}" for x, y in at), stroke=colour, width=2, **more)
    for x, y in at if dots else ():
        picture.elements.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
