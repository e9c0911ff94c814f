"""An explanation as one HTML page that needs nothing else, or as a PNG.

The page shows the text, each token coloured by what it did for the number (blue and underlined for,
red and underlined with dots against), and every head's attention map as a small picture. Moving
over a token tells its number; moving over a map tells the two tokens and the weight, which is read
out of the picture itself (white 0, black 1). Whoever uses the keyboard reaches each text and each
map with the tabulator and moves in it with the arrows; every map has a text of its own.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import pathlib
from typing import Any

import numpy as np

from nanolm.files import write_text
from nanolm.finetune.explain.png import png
from nanolm.finetune.pictures import fonts_for, pyplot

FOR, AGAINST = (37, 99, 176), (196, 59, 49)
LEAST_MARKED = 0.02
"""Strength of colour from which a token also has its line: weaker ones do next to nothing."""

STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
.text span { padding: .15em .1em; border-radius: .2em; white-space: pre-wrap }
.for { border-bottom: 2px solid rgb(37,99,176) }
.against { border-bottom: 3px dotted rgb(196,59,49) }
.text span.here { outline: 2px solid #000 } .text:focus, img:focus { outline: 3px solid #555 }
.maps { border-collapse: collapse } .maps td, .maps th { padding: 2px; color: #445 }
.maps img { width: 11em; height: 11em; image-rendering: pixelated; border: 1px solid #ccd }
#told { position: sticky; top: 0; background: #fff; min-height: 1.6em; font-family: monospace }
td.number { text-align: right; font-family: monospace; padding: 0 .8em }
"""

SCRIPT = """
const told = document.getElementById('told'), canvas = document.createElement('canvas');
const within = (at, n) => Math.min(n - 1, Math.max(0, at));
const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const onArrows = (element, act) => element.addEventListener('keydown', event => {
  if (!(event.key in steps)) return;
  event.preventDefault();
  act(...steps[event.key]);
});
for (const text of document.querySelectorAll('.text')) {
  const spans = [...text.children];
  let here = 0;
  const tell = at => {
    spans[here].classList.remove('here');
    here = within(at, spans.length);
    spans[here].classList.add('here');
    told.textContent = `${here + 1} of ${spans.length}: ${spans[here].title}`;
  };
  text.onfocus = () => tell(here);
  text.onblur = () => spans[here].classList.remove('here');
  spans.forEach((span, at) => { span.onmouseenter = () => tell(at); });
  onArrows(text, (right, down) => tell(here + right + down));
}
for (const map of document.querySelectorAll('.maps img')) {
  const n = names.length;
  let s = 0, t = 0;
  const tell = (key, query) => {
    s = within(key, n); t = within(query, n);
    canvas.width = canvas.height = n;
    const pen = canvas.getContext('2d', {willReadFrequently: true});
    pen.drawImage(map, 0, 0);
    const weight = 1 - pen.getImageData(s, t, 1, 1).data[0] / 255;
    told.textContent = `${map.title}: ${names[t]} looks at ${names[s]}: ${weight.toFixed(2)}`;
  };
  map.onmousemove = event => tell(Math.floor(event.offsetX / map.clientWidth * n),
                                  Math.floor(event.offsetY / map.clientHeight * n));
  map.onfocus = () => tell(s, t);
  onArrows(map, (right, down) => tell(s + right, t + down));
}
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


def write_page(explanation: Explanation, path: pathlib.Path) -> list[str]:
    """The HTML page; there is nothing to say about it."""
    prediction = html.escape(json.dumps(explanation.prediction, ensure_ascii=False))
    sections = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>nanolm explain</title>",
        f"<style>{STYLE}</style>",
        f"<h1>{html.escape(explanation.question)} = {explanation.value:.4f}</h1>",
        f"<p><code>{prediction}</code></p>",
        "<p>A line under a token: it speaks <span class=for>for</span> the number; dots under it: "
        "<span class=against>against</span>. The stronger its colour, the more it does. Tab goes "
        "to the next text or map, the arrow keys move in it.</p><p id=told aria-live=polite></p>",
        *(
            f"<h2>{html.escape(name)}</h2>{text_of(name, explanation.pieces, values)}"
            for name, values in explanation.attributions.items()
        ),
        "".join(f"<p>{html.escape(note)}</p>" for note in explanation.notes),
        numbers(explanation),
        "<h2>Attention</h2><p>Rows are queries, columns keys; a map shows where a head looks, not "
        "why the model decides.</p>",
        maps(explanation.maps_LHTT, explanation.map_names),
        f"<script>const names = {script_text(explanation.map_names)};{SCRIPT}</script>",
    ]
    write_text(path, "\n".join(sections) + "\n")
    return []


def script_text(value: Any) -> str:
    """JSON that may stand inside a <script>: no `</` ends it early."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


def text_of(name: str, pieces: list[str], values: list[float]) -> str:
    """The text, its tokens as spans whose strength of colour is the share of the largest
    attribution, and whose line says the sign."""
    largest = max(map(abs, values)) or 1.0
    spans = []
    for piece, value in zip(pieces, values, strict=True):
        side, (red, green, blue) = ("for", FOR) if value > 0 else ("against", AGAINST)
        strength = 0.7 * abs(value) / largest
        style = f"background: rgba({red},{green},{blue},{strength:.2f})"
        kind = f' class="{side}"' if strength >= LEAST_MARKED else ""
        shown = html.escape(piece.replace("▁", " "))
        said = html.escape(f"{piece} {value:+.4f}")
        spans.append(f'<span{kind} style="{style}" title="{said}">{shown}</span>')
    label = html.escape(f"{name}: {len(pieces)} tokens, move with the arrow keys")
    return f'<p class=text dir=auto tabindex=0 role=group aria-label="{label}">{"".join(spans)}</p>'


def numbers(explanation: Explanation) -> str:
    """The table of all attributions, folded."""
    names = list(explanation.attributions)
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in ["token", *names])
    rows = []
    for place, piece in enumerate(explanation.pieces):
        cells = [f"<td>{html.escape(piece)}</td>"]
        cells += [
            f"<td class=number>{explanation.attributions[name][place]:+.4f}</td>" for name in names
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "".join(rows)
    return f"<details><summary>Numbers</summary><table><tr>{head}</tr>{body}</table></details>"


def maps(maps_LHTT: np.ndarray, names: list[str]) -> str:
    """A table of pictures: a row a layer, a column a head; `names` are those of rows and columns of
    a map."""
    rows = []
    for layer, heads in enumerate(maps_LHTT):
        cells = []
        for head, weights_TT in enumerate(heads):
            grey = np.round(255 * (1 - np.clip(weights_TT, 0, 1))).astype(np.uint8)
            data = base64.b64encode(png(np.repeat(grey[..., None], 3, axis=2))).decode()
            title = f"layer {layer + 1}, head {head + 1}"
            said = html.escape(f"Attention map of {title}: {strongest(weights_TT, names)}")
            cells.append(
                f'<td><img title="{title}" alt="{said}" tabindex=0 '
                f'src="data:image/png;base64,{data}"></td>'
            )
        rows.append(f"<tr><th scope=row>{layer + 1}</th>{''.join(cells)}</tr>")
    return f"<table class=maps>{''.join(rows)}</table>"


def strongest(weights_TT: np.ndarray, names: list[str]) -> str:
    """Where a head looks most, in words: its three greatest weights."""
    order = np.argsort(-weights_TT, axis=None, kind="stable")[:3]
    pairs = (divmod(int(place), len(names)) for place in order)
    return "; ".join(f"{names[t]} looks at {names[s]} {weights_TT[t, s]:.2f}" for t, s in pairs)


def draw(explanation: Explanation, path: pathlib.Path) -> list[str]:
    """A PNG; says what its reader should know. Raises UserError when matplotlib is not
    installed."""
    plt = pyplot()
    with fonts_for([*explanation.pieces, explanation.question]) as notes:
        figure = bars_and_maps(plt, explanation)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return notes


def bars_and_maps(plt: Any, explanation: Explanation) -> Any:
    """Bars of the attributions, up for and down against, above a grid of attention maps, layers
    downwards."""
    n_layers, n_heads = explanation.maps_LHTT.shape[:2]
    pieces, places = explanation.pieces, np.arange(len(explanation.pieces))
    width = max(6.0, 0.28 * len(pieces), 1.6 * n_heads)
    figure = plt.figure(figsize=(width, 3.2 + 1.7 * n_layers), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[3.2, 1.7 * n_layers])
    above, below = halves
    axis = above.subplots()
    share = 0.8 / len(explanation.attributions)
    for number, (name, values) in enumerate(explanation.attributions.items()):
        axis.bar(places + share * number, values, share, label=name, hatch="//" * number)
    axis.set_xticks(places + 0.4 - share / 2, pieces, rotation=90, fontsize=8, parse_math=False)
    axis.set_title(f"{explanation.question} = {explanation.value:.3f}", parse_math=False)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=8)
    for (layer, head), grid in np.ndenumerate(below.subplots(n_layers, n_heads, squeeze=False)):
        grid.imshow(explanation.maps_LHTT[layer, head], cmap="Greys", vmin=0, vmax=1)
        grid.set(xticks=[], yticks=[])
        grid.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
    return figure
