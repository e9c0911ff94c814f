"""The journey of a batch through the rooms, from raw text to the next step."""

from __future__ import annotations

import dataclasses

from nanolm.tools.figures.svg import COLOURS, EDGE, WIDTH, Picture

FILLS = {"data": "#e6f2e6", "objectives": "#f3eafa", "training": "#fdf0e1", "model": "#e6eefa"}
BOX, STEP, TOP = 54, 84, 58
COLUMN, GUTTER = 322, 36


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """A stop: where it stands in the repository, what happens there, what it hands on."""

    path: str
    says: str
    fill: str
    hands_on: str = ""


BEFORE = (
    Room(
        path="data/prepare",
        says="clean, each text once, split",
        fill="data",
        hands_on="documents",
    ),
    Room(
        path="data/tokenizer.py",
        says="text to pieces, byte for byte",
        fill="data",
        hands_on="ids",
    ),
    Room(
        path="data/shards",
        says="Arrow files, mapped into memory",
        fill="data",
        hands_on="blocks of ids",
    ),
    Room(
        path="data/stream.py",
        says="a keyed order: any step at once",
        fill="data",
        hands_on="rows",
    ),
    Room(
        path="nanolm/objectives",
        says="shift (clm) or mask (mlm) a row",
        fill="objectives",
        hands_on="tokens, targets [B, T]",
    ),
    Room(
        path="nanolm/training/loader.py",
        says="micro-batches, targets counted",
        fill="training",
    ),
)
STEP_ROOMS = (
    Room(
        path="nanolm/training/engine.py",
        says="calls the learner, on all ranks",
        fill="training",
        hands_on="tensors",
    ),
    Room(
        path="nanolm/model/trunk.py",
        says="embedding and positions",
        fill="model",
        hands_on="x [B, T, D]",
    ),
    Room(
        path="nanolm/model/blocks.py",
        says="n times: attention, feed-forward",
        fill="model",
        hands_on="hidden [B, T, D]",
    ),
    Room(
        path="nanolm/model/heads.py",
        says="loss without [B, T, V] at once",
        fill="model",
        hands_on="(sum, count) of each term",
    ),
    Room(
        path="nanolm/training/gradient.py",
        says="sum / count, then backward",
        fill="training",
        hands_on="gradient",
    ),
    Room(
        path="nanolm/training/update.py",
        says="norm, clip, optimizer, average",
        fill="training",
        hands_on="weights",
    ),
    Room(
        path="nanolm/training/trainer.py",
        says="log, checkpoint, evaluation",
        fill="training",
    ),
)
KERNELS = (
    "Attention, norms and the loss run in kernels that nanolm/ops chose when",
    "the model was built: torch's own, Triton's (kernels/), or yours.",
)
DESCRIPTION = (
    "Two columns. On the left the way to a batch: {left}. On the right one optimizer step: "
    "{right}. After the step the loader hands over the next batch."
)


def journey() -> Picture:
    """The picture."""
    height = TOP + len(STEP_ROOMS) * STEP + 64
    picture = Picture(
        title="A batch on its way through the rooms of nanolm",
        description=DESCRIPTION.format(left=listed(BEFORE), right=listed(STEP_ROOMS)),
        height=height,
    )
    left, right = 20, WIDTH - 20 - COLUMN
    picture.text(left, 36, "Text becomes a batch", bold=True, room=COLUMN)
    picture.text(right, 36, "One optimizer step", bold=True, room=COLUMN)
    column(picture, left, BEFORE)
    column(picture, right, STEP_ROOMS)
    middle = left + COLUMN + GUTTER / 2
    loader = TOP + (len(BEFORE) - 1) * STEP + BOX / 2
    trainer = TOP + (len(STEP_ROOMS) - 1) * STEP + BOX / 2
    engine = TOP + BOX / 2
    picture.arrow(f"M{left + COLUMN} {loader:g}H{middle:g}V{engine:g}H{right}")
    below = left + COLUMN / 2
    picture.arrow(f"M{right} {trainer:g}H{below:g}V{loader + BOX / 2:g}", stroke_dasharray="5 4")
    picture.text(below + 10, trainer - 8, "next step", fill=COLOURS["grey"])
    for number, line in enumerate(KERNELS):
        picture.text(left, height - 38 + 22 * number, line, room=WIDTH - 40)
    return picture


def column(picture: Picture, x: float, rooms: tuple[Room, ...]) -> None:
    """Rooms below each other, with what each hands to the next."""
    for index, room in enumerate(rooms):
        y = TOP + index * STEP
        picture.rect(x, y, COLUMN, BOX, FILLS[room.fill])
        picture.text(x + 12, y + 22, room.path, kind="code", bold=True, room=COLUMN - 24)
        picture.text(x + 12, y + 44, room.says, room=COLUMN - 24)
        if room.hands_on:
            picture.arrow(f"M{x + 20} {y + BOX}V{y + STEP - 1}", stroke=EDGE)
            picture.text(x + 32, y + BOX + 20, room.hands_on, fill=COLOURS["blue"], room=COLUMN)


def listed(rooms: tuple[Room, ...]) -> str:
    """The rooms in words."""
    return "; ".join(f"{room.path}, {room.says}" for room in rooms)
