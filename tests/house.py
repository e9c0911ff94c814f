"""A picture of the house: rooms on their floors, and who imports whom, read from the code.

    make house          writes docs/house.svg and prints the arrows

A line joins two rooms where a module of the upper one imports one of the lower; the darker, the
more imports. Lines that would run up or sideways are red, and tests/test_imports.py fails then.
"""

import collections
import pathlib
import sys
from xml.sax.saxutils import escape

from tests.test_imports import FLOOR_OF, FLOORS, MODULES, imports, inside, room

WIDTH, ROW, BOX = 720, 78, 40
STYLE = """
  text { font: 16px sans-serif; text-anchor: middle; fill: #111 }
  rect { fill: #eef3fb; stroke: #3a6ea5 } .ground { fill: #fff } .up { stroke: #c00 !important }
  line { stroke: #3a6ea5 }
"""


def arrows() -> collections.Counter:
    """(room, room that it imports) -> number of imports."""
    found: collections.Counter = collections.Counter()
    for name, path in MODULES.items():
        for used in set(imports(path)):
            own, other = room(name), room(used) if inside(used, "nanolm") else None
            if own in FLOOR_OF and other in FLOOR_OF and own != other:
                found[own, other] += 1
    return found


def places() -> dict[str, tuple[float, float]]:
    """The middle of each room's box, the ground floor at the bottom."""
    found = {}
    for floor, rooms in enumerate(FLOORS):
        for number, name in enumerate(sorted(rooms)):
            x = WIDTH * (number + 1) / (len(rooms) + 1)
            found[name] = (x, ROW * (len(FLOORS) - floor) - ROW / 2)
    return found


def draw(found: collections.Counter) -> str:
    """The picture as SVG."""
    where, lines, boxes = places(), [], []
    for (upper, lower), count in sorted(found.items()):
        (x1, y1), (x2, y2) = where[upper], where[lower]
        shade = min(0.15 + count / 40, 0.9)
        kind = "" if FLOOR_OF[lower] < FLOOR_OF[upper] else ' class="up"'
        lines.append(
            f'<line x1="{x1:.0f}" y1="{y1 + BOX / 2:.0f}" x2="{x2:.0f}" y2="{y2 - BOX / 2:.0f}" '
            f'stroke-opacity="{shade:.2f}"{kind}><title>{upper} imports {lower}: {count}'
            "</title></line>"
        )
    for name, (x, y) in where.items():
        width = 11 * len(name) + 24
        boxes.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - BOX / 2:.0f}" width="{width}" height="{BOX}" '
            f'rx="6"/><text x="{x:.0f}" y="{y + 5:.0f}">{escape(name)}</text>'
        )
    height = ROW * len(FLOORS)
    title = "The rooms of nanolm on their floors; lines show imports, all of which run down"
    told = (
        "From the ground floor up: " + "; ".join(", ".join(sorted(f)) for f in FLOORS) + ". A line "
        "joins two rooms where one imports the other; the darker, the more imports."
    )
    body = "\n".join([*lines, *boxes])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-labelledby="title description"><title id="title">{title}</title>'
        f'<desc id="description">{told}</desc><style>{STYLE}</style>'
        f'<rect class="ground" width="{WIDTH}" height="{height}" stroke="none"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Writes the picture; prints who imports whom, the upper floors first."""
    found = arrows()
    pathlib.Path(sys.argv[1]).write_text(draw(found), encoding="utf-8")
    for floor in reversed(FLOORS):
        for name in sorted(floor):
            used = [f"{lower} {count}" for (upper, lower), count in found.items() if upper == name]
            print(f"{name:<12} {', '.join(sorted(used)) or '–'}")
    up = [pair for pair in found if FLOOR_OF[pair[1]] >= FLOOR_OF[pair[0]]]
    print(f"{len(found)} pairs of rooms, {len(up)} that run up or sideways")


if __name__ == "__main__":
    main()
