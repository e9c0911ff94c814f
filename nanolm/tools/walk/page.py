"""The walk as one HTML page that needs nothing else, legible on white and on black."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

from nanolm.files import write_text
from nanolm.tools.walk.stop import Stop
from nanolm.tools.walk.stops import LETTERS

STYLE = """
:root { color-scheme: light dark }
body { font: 17px/1.6 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em;
  background: Canvas; color: CanvasText }
li { margin: 1.4em 0 }
h2 { font-size: 1.1em; margin: 0 }
h1 { font-size: 1.3em; overflow-wrap: anywhere }
p { margin: .3em 0; overflow-wrap: anywhere; white-space: pre-wrap }
table { border-collapse: collapse; margin: .6em 0; font-size: 16px }
th, td { text-align: left; padding: .1em .9em .1em 0; border-bottom: 1px solid #8886 }
td { white-space: pre }
.number { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: 16px; opacity: .8 }
"""


def write_page(title: str, walk: Sequence[Stop], path: pathlib.Path) -> None:
    """Writes the page; raises UserError when that fails."""
    write_text(path, page(title, walk), "choose another --html FILE")


def page(title: str, walk: Sequence[Stop]) -> str:
    """The page."""
    head = html.escape(title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{head}</title>\n<style>{STYLE}</style>",
            f"<h1>{head}</h1>\n<p>{html.escape(LETTERS)}</p>\n<ol>",
            *map(item, walk),
            "</ol>\n</html>\n",
        ]
    )


def item(stop: Stop) -> str:
    """One stop."""
    places = "<br>".join(f"<code>{html.escape(str(place))}</code>" for place in stop.places)
    name, says = html.escape(stop.name), html.escape(stop.says)
    return f"<li><h2>{name}</h2><p>{says}</p>{table(stop)}<p>{places}</p></li>"


def table(stop: Stop) -> str:
    """The stop's rows, if it has any."""
    if not stop.rows:
        return ""
    kinds = [' class="number"' if column.number else "" for column in stop.columns]
    titles = [
        f'<th scope="col"{kind}>{html.escape(column.title)}</th>'
        for kind, column in zip(kinds, stop.columns, strict=True)
    ]
    rows = [
        "".join(
            f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)
        )
        for row in stop.rows
    ]
    body = "".join(f"<tr>{row}</tr>" for row in ["".join(titles), *rows])
    return f"<table>{body}</table>"
