"""`nanolm masks draw --out FOLDER`: each kind of mask as a PNG, drawn from `Mask.dense` itself."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import numpy as np
import torch

from nanolm.config.ranges import Within
from nanolm.finetune.explain.png import png
from nanolm.ops.masks import Mask

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
ORDER = torch.tensor([[3, 9, 0, 14, 6, 1, 12, 4, 8, 15, 2, 11, 5, 13, 7, 10]])
PICTURES = {
    "bidirectional": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(window=4),
    "causal_window": Mask(causal=True, window=4),
    "documents": Mask(documents=DOCUMENTS),
    "causal_documents": Mask(causal=True, documents=DOCUMENTS),
    "prefix": Mask(causal=True, prefix_lengths=torch.tensor([6])),
    "padding": Mask(key_lengths=torch.tensor([11])),
    "order_content": Mask(order=ORDER),
    "order_query": Mask(order=ORDER, strict=True),
}
SEEN, HIDDEN, LINE = (38, 70, 83), (233, 236, 239), (255, 255, 255)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to draw."""

    out: str = "docs/masks"
    """Folder for the pictures."""
    cell: Annotated[int, Within(2, 256)] = 14
    """Pixels of one query-key pair."""


def picture(allowed: np.ndarray, cell: int) -> np.ndarray:
    """uint8 [T * cell, S * cell, 3]: queries downwards, keys to the right, dark where seen."""
    pixels = np.where(allowed[..., None], np.array(SEEN, np.uint8), np.array(HIDDEN, np.uint8))
    pixels = pixels.repeat(cell, axis=0).repeat(cell, axis=1)
    pixels[::cell], pixels[:, ::cell] = LINE, LINE
    return pixels


def run(arguments: Arguments) -> None:
    """Write the pictures."""
    folder = pathlib.Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in PICTURES.items():
        allowed = mask.dense(16, 16)[0, 0].numpy()
        (folder / f"{name}.png").write_bytes(png(picture(allowed, arguments.cell)))
    print(f"{len(PICTURES)} pictures in {folder}")
