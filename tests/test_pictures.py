"""Pictures and pages that everybody can read: fonts for all scripts, keyboard, alt texts."""

import html.parser
import pathlib

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, image

from nanolm.commands.plot import draw as draw_curves
from nanolm.finetune import pictures
from nanolm.finetune.explain.page import Explanation, draw, write_page
from nanolm.finetune.report import draw_confusion
from nanolm.finetune.tasks.metrics import Report
from nanolm.training.runs import read_run
from tests.finetuned import checkpoint

SHOWN = "国語"


def pieces_explained(pieces):
    n = len(pieces)
    maps = np.tril(np.ones((2, 3, n, n))) / np.arange(1, n + 1)[:, None]
    values = [(-1) ** i * i / n for i in range(n)]
    return Explanation(
        pieces, {"label": "a"}, f"logit of {pieces[0]}", 0.5, {"x": values}, [], maps
    )


def made_font(folder: pathlib.Path, characters: str) -> str:
    """A font of triangles for these characters; gives its family's name."""
    name = f"Nanolm Test {ord(characters[0]):X}"
    builder = FontBuilder(1000, isTTF=True)
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for character in characters:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0)), pen.lineTo((900, 0)), pen.lineTo((450, 800)), pen.closePath()
        glyphs[f"uni{ord(character):04X}"] = pen.glyph()
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(c): f"uni{ord(c):04X}" for c in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / f"{name}.ttf")
    return name


@pytest.fixture
def only_own_font(monkeypatch):
    """The fonts that matplotlib brings along, and no others of this machine."""
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def drawn(kind, text, path):
    """(the notes of a picture that shows the text, its pixels)."""
    if kind == "explain":
        notes = draw(pieces_explained([text, "b"]), path)
    elif kind == "confusion":
        notes = draw_confusion(Report({}, None, [text, "b"], [[1, 0], [0, 1]]), path, text)
    else:
        folder = path.parent / text
        folder.mkdir(exist_ok=True)
        source = checkpoint("mlm")
        for name in ("metrics.jsonl", "config.yaml", "summary.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        notes = draw_curves([read_run(folder)], path)
    return notes, image.imread(path)


@pytest.mark.parametrize("kind", ["explain", "confusion", "plot"])
@pytest.mark.filterwarnings("error")
def test_characters_come_from_any_installed_font_or_are_told(kind, only_own_font, tmp_path):
    plain, _ = drawn(kind, "plain žluť Ελλάς", tmp_path / "plain.png")
    assert plain == []
    notes, boxes = drawn(kind, SHOWN, tmp_path / "boxes.png")
    (note,) = notes
    assert "no installed font has" in note and "国 (U+56FD), 語 (U+8A9E): " in note
    for part in SHOWN:  # each from a font of its own
        font_manager.fontManager.addfont(tmp_path / f"{made_font(tmp_path, part)}.ttf")
    notes, pixels = drawn(kind, SHOWN, tmp_path / "found.png")
    assert notes == [] and not np.array_equal(boxes, pixels)


def test_preferred_fonts_come_first_and_only_those_that_are_needed(
    only_own_font, tmp_path, monkeypatch
):
    names = [made_font(tmp_path, SHOWN), made_font(tmp_path, "語国"), made_font(tmp_path, "は")]
    for name in names:
        font_manager.fontManager.addfont(tmp_path / f"{name}.ttf")
    assert pictures.chosen_fonts(set("abc")) == (["DejaVu Sans"], set())
    families, missing = pictures.chosen_fonts(set(SHOWN))
    assert families == ["DejaVu Sans", names[0]] and not missing
    monkeypatch.setattr(pictures, "PREFERRED", (names[1],))
    families, missing = pictures.chosen_fonts({*SHOWN, "は", "\ud55c"})
    assert families == ["DejaVu Sans", names[1], names[2]] and missing == {"\ud55c"}


class Elements(html.parser.HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def all(self, tag, **wanted):
        kept = [a for t, a in self.found if t == tag]
        return [a for a in kept if all(a.get(key) == value for key, value in wanted.items())]


def test_the_page_is_usable_without_mouse_colours_or_pictures(tmp_path):
    explanation = pieces_explained(["<cls>", "▁open", "</span>\"'", "国", "▁it"])
    write_page(explanation, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Elements(content)
    assert page.all("html")[0]["lang"] == "en" and page.all("p", id="told")[0]["aria-live"]
    images = page.all("img")
    assert len(images) == 6
    for picture in images:
        assert picture["tabindex"] == "0" and picture["title"] in picture["alt"]
        assert "<cls> looks at <cls> 1.00" in picture["alt"]
    (text,) = page.all("p", **{"class": "text"})
    assert text["tabindex"] == "0" and text["aria-label"].startswith("x: 5 tokens")
    spans = [a for a in page.all("span") if "title" in a]
    assert [a["title"].rsplit(" ", 1)[0] for a in spans] == explanation.pieces
    for span, value in zip(spans, explanation.attributions["x"], strict=True):
        sign = {True: "for", False: "against"}[value > 0]
        assert span.get("class") == (sign if value else None)
        assert span["title"].endswith(f"{value:+.4f}")
    lines = {"solid", "dotted"}
    styles = [line for line in content.splitlines() if line.startswith((".for", ".against"))]
    assert len(styles) == 2 and {s for s in lines for line in styles if s in line} == lines
    assert "keydown" in content and "ArrowLeft" in content
