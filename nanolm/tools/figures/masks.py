"""Each kind of mask, drawn from `Mask.dense` itself."""

from __future__ import annotations

import dataclasses

import torch

from nanolm.ops.masks import Mask
from nanolm.tools.figures.svg import CARD, COLOURS, WIDTH, Picture

N = 16
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
ORDER = torch.tensor([[3, 9, 0, 14, 6, 1, 12, 4, 8, 15, 2, 11, 5, 13, 7, 10]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A mask with the condition that it stands for: t is the query, s the key."""

    mask: Mask
    condition: str


PANELS = {
    "bidirectional": Panel(mask=Mask(), condition="every key"),
    "causal": Panel(mask=Mask(causal=True), condition="s ≤ t"),
    "window": Panel(mask=Mask(window=4), condition="|t − s| < 4"),
    "causal, window": Panel(mask=Mask(causal=True, window=4), condition="s ≤ t and t − s < 4"),
    "documents": Panel(mask=Mask(documents=DOCUMENTS), condition="same document"),
    "causal, documents": Panel(
        mask=Mask(causal=True, documents=DOCUMENTS), condition="s ≤ t, same document"
    ),
    "prefix": Panel(
        mask=Mask(causal=True, prefix_lengths=torch.tensor([6])), condition="s ≤ t or s < 6"
    ),
    "lengths": Panel(mask=Mask(key_lengths=torch.tensor([11])), condition="s < 11"),
    "order": Panel(mask=Mask(order=ORDER), condition="order(s) ≤ order(t)"),
    "order, strict": Panel(mask=Mask(order=ORDER, strict=True), condition="order(s) < order(t)"),
}
SEEN, HIDDEN = "#1f5fa8", "#dfe3e8"
CELL, COLUMNS, COLUMN, ROW, TOP = 11, 3, 228, 268, 64


def masks() -> Picture:
    """All of them in one picture, with a legend."""
    rows = -(-len(PANELS) // COLUMNS)
    words = "; ".join(f"{name}: {panel.condition}" for name, panel in PANELS.items())
    picture = Picture(
        title="Who may attend to whom, by mask",
        description=f"A grid of {N} queries (rows, t) and {N} keys (columns, s) for each mask; a "
        f"dark cell is a key that the query may see. {words}.",
        height=TOP + rows * ROW + 8,
    )
    for x, fill, meaning in ((44, SEEN, "the query may see the key"), (330, HIDDEN, "hidden")):
        picture.rect(x, 22, 18, 18, fill)
        picture.text(x + 28, 37, meaning)
    for index, (name, panel) in enumerate(PANELS.items()):
        row, column = divmod(index, COLUMNS)
        draw(picture, 44 + column * COLUMN, TOP + row * ROW, name, panel)
    return picture


def draw(picture: Picture, x: float, y: float, name: str, panel: Panel) -> None:
    """One mask: its name, its grid with axes, its condition."""
    allowed = panel.mask.dense(N, N)[0, 0]
    side, top = CELL * N, y + 26
    picture.text(x, y + 16, name, bold=True, room=side + 8)
    picture.path(f"M{x} {top}h{side}v{side}h-{side}z", fill=HIDDEN, stroke="none")
    cells = "".join(
        f"M{x + s * CELL} {top + t * CELL}h{CELL}v{CELL}h-{CELL}z"
        for t, s in allowed.nonzero().tolist()
    )
    picture.path(cells, fill=SEEN, stroke="none")
    lines = [f"M{x + i * CELL} {top}v{side}M{x} {top + i * CELL}h{side}" for i in range(1, N)]
    picture.path("".join(lines), stroke=CARD, width=1)
    grey = COLOURS["grey"]
    picture.text(x - 8, top + side / 2, "← query t", fill=grey, anchor="middle", turned=True)
    picture.text(x + side / 2, top + side + 18, "key s →", fill=grey, anchor="middle")
    picture.text(x, top + side + 40, panel.condition, room=WIDTH - x)
