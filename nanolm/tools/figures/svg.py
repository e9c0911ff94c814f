"""A picture as SVG: 720 wide, text of 16 or more, a card of its own to stand on.

The card is opaque, so that a picture reads alike on a white and on a black page: whether a page is
dark is not known to a picture that it only links. Every text is of INK or of a colour in COLOURS,
all of which have a contrast of 4.5 or more to the card and to the fills of boxes.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from xml.sax.saxutils import escape, quoteattr

WIDTH, SIZE = 720, 16
CARD, INK, EDGE = "#ffffff", "#1a1a1a", "#767676"
COLOURS = {"blue": "#1f5fa8", "orange": "#a8480c", "grey": "#595959"}
FONTS = {"": "Helvetica, Arial, sans-serif", "code": "Menlo, Consolas, monospace"}
# Widths of a character by its height, on the generous side: what a viewer's own fonts need.
ADVANCE = {"": 0.56, "code": 0.62}


def width_of(text: str, kind: str = "", size: int = SIZE) -> float:
    """About how wide the text is drawn."""
    return len(text) * ADVANCE[kind] * size


@dataclasses.dataclass
class Picture:
    """The elements of a picture, in the order in which they are drawn."""

    title: str
    description: str
    height: int
    elements: list[str] = dataclasses.field(default_factory=list)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = EDGE
    ) -> None:
        """A box with round corners."""
        self.elements.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" '
            f'height="{number(height)}" rx="6" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        kind: str = "",
        fill: str = INK,
        bold: bool = False,
        anchor: str = "start",
        room: float = WIDTH,
        turned: bool = False,
    ) -> None:
        """A line of text at its base line; raises ValueError when it is wider than its room."""
        if width_of(text, kind) > room:
            raise ValueError(f"{text!r} does not fit into {room} of {WIDTH}")
        extra = f' class="{kind}"' if kind else ""
        extra += ' font-weight="bold"' if bold else ""
        extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
        extra += f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
        self.elements.append(
            f'<text x="{number(x)}" y="{number(y)}" fill="{fill}"{extra}>{escape(text)}</text>'
        )

    def path(
        self, steps: str, *, stroke: str = EDGE, fill: str = "none", width: float = 1.5, **more: Any
    ) -> None:
        """A path; `more` are further attributes, such as stroke_dasharray."""
        extra = "".join(f" {key.replace('_', '-')}={quoteattr(str(v))}" for key, v in more.items())
        self.elements.append(
            f'<path d="{steps}" fill="{fill}" stroke="{stroke}" stroke-width="{width}"{extra}/>'
        )

    def arrow(self, steps: str, **more: Any) -> None:
        """A path that ends in an arrow's head."""
        self.path(steps, marker_end="url(#head)", **more)

    def __str__(self) -> str:
        """The whole file."""
        code = f".code {{ font-family: {FONTS['code']} }}"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'role="img" aria-labelledby="title description" font-family="{FONTS[""]}" '
                f'font-size="{SIZE}">',
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="description">{escape(self.description)}</desc>',
                f"<style>{code}</style>",
                '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
                f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{EDGE}"/>'
                "</marker></defs>",
                f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="10" '
                f'fill="{CARD}" stroke="{EDGE}"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def number(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
