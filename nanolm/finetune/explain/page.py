"""An explanation as one HTML page that needs nothing else, or as a PNG.

The page shows the text, each token coloured by what it did for the number (blue for, red against),
and every head's attention map as a small picture; moving over a map tells the two tokens and the
weight, which is read out of the picture itself (white 0, black 1).
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import pathlib
from typing import Any

import numpy as np

from nanolm.errors import UserError
from nanolm.files import write_text
from nanolm.finetune.explain.png import png

FOR, AGAINST = (37, 99, 176), (196, 59, 49)

STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
.text span { padding: .15em .1em; border-radius: .2em; white-space: pre }
.maps { border-collapse: collapse } .maps td { padding: 2px; text-align: center; color: #667 }
.maps img { width: 11em; height: 11em; image-rendering: pixelated; border: 1px solid #ccd }
#told { position: sticky; top: 0; background: #fffd; min-height: 1.6em; font-family: monospace }
td.number { text-align: right; font-family: monospace; padding: 0 .8em }
"""

SCRIPT = """
const told = document.getElementById('told'), canvas = document.createElement('canvas');
for (const map of document.querySelectorAll('.maps img')) map.onmousemove = event => {
  const n = names.length, cell = at => Math.min(n - 1, Math.max(0, Math.floor(at * n)));
  const s = cell(event.offsetX / map.clientWidth), t = cell(event.offsetY / map.clientHeight);
  canvas.width = canvas.height = n;
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  pen.drawImage(map, 0, 0);
  const weight = 1 - pen.getImageData(s, t, 1, 1).data[0] / 255;
  told.textContent = `${map.title}: ${names[t]} looks at ${names[s]}: ${weight.toFixed(2)}`;
};
"""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """All that is shown: pieces [T], the prediction, the number, attributions {method: [T]}, notes,
    and attention maps float [L, H, T', T'], T' >= T where an adapter puts vectors before them."""

    pieces: list[str]
    prediction: dict[str, Any]
    question: str
    value: float
    attributions: dict[str, list[float]]
    notes: list[str]
    maps_LHTT: np.ndarray

    @property
    def map_names(self) -> list[str]:
        """What stands at each row and column of a map."""
        added = self.maps_LHTT.shape[-1] - len(self.pieces)
        return [f"[{n + 1}]" for n in range(added)] + self.pieces

    def figures(self) -> dict[str, Any]:
        """Everything but the maps, for JSON."""
        return {
            "prediction": self.prediction,
            "explained": self.question,
            "value": self.value,
            "tokens": self.pieces,
            "attributions": self.attributions,
            "notes": self.notes,
        }


def write_page(explanation: Explanation, path: pathlib.Path) -> None:
    """The HTML page."""
    prediction = html.escape(json.dumps(explanation.prediction, ensure_ascii=False))
    sections = [
        "<!doctype html><meta charset=utf-8><title>nanolm explain</title>",
        f"<style>{STYLE}</style>",
        f"<h1>{html.escape(explanation.question)} = {explanation.value:.4f}</h1>",
        f"<p><code>{prediction}</code></p>",
        *(
            f"<h2>{html.escape(name)}</h2><p class=text>{coloured(explanation.pieces, values)}</p>"
            for name, values in explanation.attributions.items()
        ),
        "".join(f"<p>{html.escape(note)}</p>" for note in explanation.notes),
        numbers(explanation),
        "<h2>Attention</h2><p>Rows are queries, columns keys; a map shows where a head looks, not "
        "why the model decides.</p><p id=told></p>",
        maps(explanation.maps_LHTT),
        f"<script>const names = {script_text(explanation.map_names)};{SCRIPT}</script>",
    ]
    write_text(path, "\n".join(sections) + "\n")


def script_text(value: Any) -> str:
    """JSON that may stand inside a <script>: no `</` ends it early."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


def coloured(pieces: list[str], values: list[float]) -> str:
    """Tokens as spans whose strength of colour is the share of the largest attribution."""
    largest = max(map(abs, values)) or 1.0
    spans = []
    for piece, value in zip(pieces, values, strict=True):
        red, green, blue = FOR if value > 0 else AGAINST
        strength = 0.85 * abs(value) / largest
        style = f"background: rgba({red},{green},{blue},{strength:.2f})"
        shown = html.escape(piece.replace("▁", " "))
        spans.append(f'<span style="{style}" title="{value:+.4f}">{shown}</span>')
    return "".join(spans)


def numbers(explanation: Explanation) -> str:
    """The table of all attributions, folded."""
    names = list(explanation.attributions)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["token", *names])
    rows = []
    for place, piece in enumerate(explanation.pieces):
        cells = [f"<td>{html.escape(piece)}</td>"]
        cells += [
            f"<td class=number>{explanation.attributions[name][place]:+.4f}</td>" for name in names
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "".join(rows)
    return f"<details><summary>Numbers</summary><table><tr>{head}</tr>{body}</table></details>"


def maps(maps_LHTT: np.ndarray) -> str:
    """A table of pictures: a row a layer, a column a head."""
    rows = []
    for layer, heads in enumerate(maps_LHTT):
        cells = []
        for head, weights_TT in enumerate(heads):
            grey = np.round(255 * (1 - np.clip(weights_TT, 0, 1))).astype(np.uint8)
            data = base64.b64encode(png(np.repeat(grey[..., None], 3, axis=2))).decode()
            title = f"layer {layer + 1}, head {head + 1}"
            cells.append(f'<td><img title="{title}" src="data:image/png;base64,{data}"></td>')
        rows.append(f"<tr><td>{layer + 1}</td>{''.join(cells)}</tr>")
    return f"<table class=maps>{''.join(rows)}</table>"


def draw(explanation: Explanation, path: pathlib.Path) -> None:
    """A PNG: bars of the attributions above a grid of attention maps, layers downwards.

    Raises UserError when matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: PLC0415  (an extra)
    except ImportError:
        raise UserError("PNG files need matplotlib: pip install 'nanolm[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    n_layers, n_heads = explanation.maps_LHTT.shape[:2]
    pieces, places = explanation.pieces, np.arange(len(explanation.pieces))
    width = max(6.0, 0.28 * len(pieces), 1.6 * n_heads)
    figure = plt.figure(figsize=(width, 3.2 + 1.7 * n_layers), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[3.2, 1.7 * n_layers])
    above, below = halves
    axis = above.subplots()
    share = 0.8 / len(explanation.attributions)
    for number, (name, values) in enumerate(explanation.attributions.items()):
        axis.bar(places + share * number, values, share, label=name)
    axis.set_xticks(places + 0.4 - share / 2, pieces, rotation=90, fontsize=8, parse_math=False)
    axis.set_title(f"{explanation.question} = {explanation.value:.3f}", parse_math=False)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=8)
    for (layer, head), grid in np.ndenumerate(below.subplots(n_layers, n_heads, squeeze=False)):
        grid.imshow(explanation.maps_LHTT[layer, head], cmap="Greys", vmin=0, vmax=1)
        grid.set(xticks=[], yticks=[])
        grid.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
