"""`nanolm figures`: the committed pictures are what the command draws, they can be read at 720
pixels on white and on black, and they show what the code and the runs say."""

import itertools
import json
import math
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolm import cli
from nanolm.commands.figures import PICTURES
from nanolm.errors import UserError
from nanolm.ops.masks import KINDS
from nanolm.tools.figures import journey, masks
from nanolm.tools.figures.curves import curves, ticks, unigram_loss
from nanolm.tools.figures.svg import ADVANCE, COLOURS, SIZE, WIDTH, Picture
from nanolm.training.runs import read_run

ROOT = pathlib.Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def run_folder(folder, lines):
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def metrics(steps=40):
    for step in range(1, steps + 1):
        loss = 6 / step**0.3
        yield {"step": step, "kind": "train", "loss": loss, "lr": 1e-3 * step, "grad_norm": 1.0}
        if step % 20 == 0:
            val = {"loss": loss + 0.1, "nll": loss + 0.1, "bits_per_byte": 2.0}
            yield {"step": step, "kind": "val", **val, "unigram_bits_per_byte": 3.0}


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run-a", metrics())


def drawn(tmp_path):
    """All pictures that the command draws: those of the code, and one of a run."""
    found = {name: str(draw()) for name, draw in PICTURES.items()}
    found["curves_demo.svg"] = (ROOT / "docs" / "curves_demo.svg").read_text(encoding="utf-8")
    return found | {"curves": str(curves(read_run(run_folder(tmp_path / "run-b", metrics()))))}


def test_the_committed_pictures_are_what_the_command_draws(tmp_path, capsys):
    cli.run(["figures", f"--out={tmp_path}"])
    out = capsys.readouterr().out
    assert set(PICTURES) == {path.name for path in tmp_path.iterdir()} != set()
    for path in tmp_path.iterdir():
        told = f"docs/{path.name} is old: run `nanolm figures`"
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes(), told
        assert f"wrote {path}" in out


def texts(svg):
    """(element, size, whether code) of every text."""
    for element in svg.iter(f"{SVG}text"):
        yield element, float(element.get("font-size", svg.get("font-size")))


def luminance(colour):
    """Relative luminance by WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def box(element, size):
    """(left, top, right, bottom) of a text that is not turned, generously."""
    width = len(element.text) * ADVANCE[element.get("class", "")] * size
    x, y = float(element.get("x")), float(element.get("y"))
    left = x - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor", "start")]
    return left, y - 0.75 * size, left + width, y + 0.2 * size


def test_pictures_are_large_enough_named_and_on_a_card_of_their_own(tmp_path):
    for name, text in drawn(tmp_path).items():
        svg = ElementTree.fromstring(text)
        left, top, width, height = map(float, svg.get("viewBox").split())
        assert (left, top, width) == (0, 0, WIDTH) == (0, 0, 720) and svg.get("role") == "img"
        ids = {element.get("id"): element for element in svg}
        for label in svg.get("aria-labelledby").split():
            assert len(ids[label].text) > 20, name
        assert {ids[label].tag for label in svg.get("aria-labelledby").split()} == {
            f"{SVG}title",
            f"{SVG}desc",
        }
        card = svg.find(f"{SVG}rect")
        assert float(card.get("width")) >= 719 and float(card.get("height")) >= height - 1
        assert not re.search(r"(href|src)=|@import", text) and "font-size:" not in text
        fills = {rect.get("fill") for rect in svg.iter(f"{SVG}rect")} - {masks.SEEN}
        boxes = []
        for element, size in texts(svg):
            assert size >= SIZE == 16, element.text
            assert all(contrast(element.get("fill"), fill) >= 4.5 for fill in fills), element.text
            if element.get("transform") is None:
                boxes.append((box(element, size), element.text))
                (x1, y1, x2, y2), _ = boxes[-1]
                assert x1 >= 0 and x2 <= WIDTH and y1 >= 0 and y2 <= height, (name, element.text)
        for (a, first), (b, second) in itertools.combinations(boxes, 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{name}: {first!r} lies on {second!r}"


def test_a_text_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        Picture(title="t", description="d", height=9).text(0, 0, "x" * 40, room=300)


def test_the_journey_names_rooms_that_are_there():
    for room in (*journey.BEFORE, *journey.STEP_ROOMS):
        assert (ROOT / room.path).exists(), room.path
        assert room.path in (ROOT / "docs" / "journey.svg").read_text(encoding="utf-8")


def test_masks_are_drawn_as_they_are():
    svg = ElementTree.fromstring(str(masks.masks()))
    paths = [p.get("d") for p in svg.iter(f"{SVG}path") if p.get("fill") == masks.SEEN]
    assert len(paths) == len(masks.PANELS) == 10
    names = [t.text for t in svg.iter(f"{SVG}text") if t.get("font-weight") == "bold"]
    assert names == list(masks.PANELS)
    for index, (path, panel) in enumerate(zip(paths, masks.PANELS.values(), strict=True)):
        corners = [tuple(map(float, c.split())) for c in re.findall(r"M(\S+ \d+)h", path)]
        row, column = divmod(index, masks.COLUMNS)
        x, y = 44 + column * masks.COLUMN, masks.TOP + row * masks.ROW + 26
        cells = {((b - y) / masks.CELL, (a - x) / masks.CELL) for a, b in corners}
        assert cells == set(map(tuple, panel.mask.dense(16, 16)[0, 0].nonzero().tolist()))
    kinds = {kind for panel in masks.PANELS.values() for kind in panel.mask.kinds()}
    assert kinds == set(KINDS)


def test_curves_show_train_val_and_the_unigram_model_apart(run):
    text = str(curves(read_run(run)))
    svg = ElementTree.fromstring(text)
    lines = {p.get("stroke"): p for p in svg.iter(f"{SVG}path") if p.get("stroke-width") == "2"}
    assert {COLOURS["blue"], COLOURS["orange"], COLOURS["grey"]} <= set(lines)
    assert lines[COLOURS["grey"]].get("stroke-dasharray")
    last = 6 / 40**0.3
    assert unigram_loss(read_run(run))[-1] == (40, pytest.approx((last + 0.1) * 1.5))
    heights = {m: y for m, y in axis(svg)}
    per_nat = (heights[2.0] - heights[5.0]) / 3
    level = float(re.match(r"M\S+ (\S+)L", lines[COLOURS["grey"]].get("d"))[1])
    assert heights[2.0] - level == pytest.approx(((last + 0.1) * 1.5 - 2) * per_nat, abs=0.2)
    assert f"validation split {last + 0.1:.3f}" in text and f"training loss is {last:.3f}" in text


def skeleton(text):
    """All of a picture of curves that does not hang on its run's numbers: the root and its style;
    each kind of element with how it is drawn and, of words, where it stands; numbers as 0."""
    found = {}
    for element in ElementTree.fromstring(text).iter():
        words = re.sub(r"-?\d[\d.e+-]*", "0", element.text or "")
        moving = set() if element.get("stroke-width") == "2.5" else {"d", "cx", "cy"}  # the legend
        moving |= {"x", "y"} if words == "0" else set()
        how = tuple(sorted((k, v) for k, v in element.attrib.items() if k not in moving))
        found[element.tag.removeprefix(SVG), how, words] = None
    return list(found)


CURVES = "nanolm figures runs/demo --out docs"


def test_the_committed_curves_are_drawn_as_their_command_draws(tmp_path, capsys):
    """The demo's numbers are of the machine that trained it; all else is the command's."""
    kept = (ROOT / "docs" / "curves_demo.svg").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert f"{CURVES}\n" in page and "(curves_demo.svg)" in page
    (tmp_path / "runs").mkdir()
    run_folder(tmp_path / "runs" / "demo", metrics(200))
    _, command, _, option, out = CURVES.split()
    cli.run([command, str(tmp_path / "runs" / "demo"), option, str(tmp_path / out)])
    drawn = (tmp_path / out / "curves_demo.svg").read_text(encoding="utf-8")
    told = f"docs/curves_demo.svg is old: `make demo`, then `{CURVES}`"
    assert sorted(skeleton(kept)) == sorted(skeleton(drawn)), told
    words = [word for _, _, word in skeleton(kept) if word.strip() and word != "0"]
    assert {"train", "validation", "unigram model", "learning rate", "gradient norm"} <= set(words)


def axis(svg):
    """(value, y) of the marks beside the loss."""
    for element in svg.iter(f"{SVG}text"):
        if element.get("text-anchor") == "end" and float(element.get("x")) == 62:
            yield float(element.text), float(element.get("y")) - 5


@given(
    low=st.floats(-1e6, 1e6),
    size=st.floats(0, 1e6),
    most=st.integers(3, 9),
)
def test_ticks_enclose_what_is_drawn_and_are_few(low, size, most):
    high = low + size
    marks = ticks(low, high, most)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert 2 <= len(marks) <= most and marks[0] <= low + slack and marks[-1] >= high - slack
    apart = {round((b - a) / (marks[1] - marks[0]), 3) for a, b in itertools.pairwise(marks)}
    assert apart == {1.0}


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1, "kind": "train", "loss": 2.0}],
        [{"step": s, "kind": "train", "loss": 2.0, "lr": 0.0, "grad_norm": 0.0} for s in (1, 2)],
        [{"step": 1, "kind": "train", "loss": 2.0}, {"step": 2, "kind": "train", "loss": math.nan}],
        [{"step": 1, "kind": "train", "loss": 2.0}, {"step": 1, "kind": "val", "loss": 3.0}],
    ],
)
def test_short_and_odd_runs_are_drawn(tmp_path, lines, capsys):
    folder = run_folder(tmp_path / "odd", lines)
    cli.run(["figures", str(folder)])
    text = (folder / "curves.svg").read_text(encoding="utf-8")
    assert "nan" not in text.lower() and ElementTree.fromstring(text) is not None
    assert f"wrote {folder}/curves.svg" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_told_in_a_sentence(tmp_path, run):
    with pytest.raises(UserError, match="has logged no training step yet"):
        cli.run(["figures", str(run_folder(tmp_path / "new", []))])
    (tmp_path / "other").mkdir()
    same = run_folder(tmp_path / "other" / "run-a", metrics(3))
    with pytest.raises(UserError, match="two runs would both be drawn as"):
        cli.run(["figures", str(run), str(same), f"--out={tmp_path}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        cli.run(["figures", f"--out={tmp_path}/file"])
