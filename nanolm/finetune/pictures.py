"""What all pictures share: matplotlib, and installed fonts for the scripts that they show.

matplotlib takes each character from the first font of a list that has it, and draws a box where
none has. Its own font knows no Chinese, Japanese, Korean, Devanagari, Thai, … so the characters
that it lacks are looked for in the fonts of this machine: first in those of `PREFERRED`, then in
all others. What no font has is told in a sentence.
"""

from __future__ import annotations

import contextlib
import functools
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from nanolm.errors import UserError

PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK TC",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "AR PL UMing CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Hiragino Sans",
    "Microsoft YaHei",
    "SimHei",
    "IPAGothic",
    "NanumGothic",
    "Malgun Gothic",
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Noto Sans Thai",
    "Lohit Devanagari",
    "FreeSans",
    "Arial Unicode MS",
    "Unifont",
)
"""Fonts for many scripts that systems commonly have, those with even strokes first."""
PLACEHOLDER = "Last Resort"
"""What the names of fonts begin with that have a box for every character."""
MOST_TOLD = 5


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; raises UserError when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: PLC0415  (an extra)
    except ImportError:
        raise UserError("PNG files need matplotlib: pip install 'nanolm[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt


@contextlib.contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[list[str]]:
    """Inside, matplotlib finds the characters of these texts wherever an installed font has them;
    gives what a user should know: a sentence about those that none has, or nothing."""
    families, missing = chosen_fonts({c for text in texts for c in text if is_drawn(c)})
    some = ", ".join(f"{c} (U+{ord(c):04X})" for c in sorted(missing)[:MOST_TOLD])
    more = ", …" if len(missing) > MOST_TOLD else ""
    notes = [
        f"no installed font has {some}{more}: the picture shows boxes in their place; install a "
        f"font for that script, such as Noto Sans CJK for Chinese, Japanese and Korean"
    ]
    with pyplot().rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the note says so
        yield notes * bool(missing)


def chosen_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """(families of fonts that together have these characters, matplotlib's own first, and the
    characters that no font has)."""
    from matplotlib import font_manager  # noqa: PLC0415

    own = font_manager.FontProperties().get_name()
    families, missing = [own], characters - coverage(font_manager.findfont(own))
    fonts = {  # of each family the upright face of ordinary weight, where it has one
        font.name: font.fname
        for font in sorted(
            font_manager.fontManager.ttflist,
            key=lambda font: (font.style == "normal", font.weight in (400, "normal"), font.fname),
        )
        if not font.name.startswith(PLACEHOLDER)
    }
    names = [name for name in PREFERRED if name in fonts]
    for name in [*names, *sorted(fonts.keys() - {own, *names})]:
        if not missing:
            break
        found = missing & coverage(fonts[name])
        if found:
            families.append(name)
            missing = missing - found
    return families, missing


@functools.cache
def coverage(path: str) -> frozenset[str]:
    """The characters that a font file has; none of a file that cannot be read as a font."""
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def is_drawn(character: str) -> bool:
    """Whether a character leaves a mark, so that a font must have it."""
    return not character.isspace() and unicodedata.category(character)[0] != "C"
