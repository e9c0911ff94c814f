"""Where sentences end: in a text of any script, and among the tokens of a document.

The rules are the core of Unicode's (UAX 29, section 5, without its dictionaries): a sentence ends
behind a sign that ends sentences and the quotes and brackets that close there, and at the end of a
line. A full stop, `!` and `?` want a space behind them, so that 3.14 and a.b stay whole, and after
a full stop the next letter must not be small. Thai, which has no such sign, ends its sentences
where lines end. Abbreviations before a capital (Dr. Who) are cut: no rule knows them all.

A space between two sentences belongs to the second, as it does in the pieces of a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from nanolm.data.tokenizer import Tokenizer

FULL_STOPS = ".\u2024\u2026\ufe52"
SPACED = FULL_STOPS + "!?"
"""Signs that end a sentence only before a space."""
# Sentence_Terminal of the Unicode character database but for those above, and Tibetan's shad,
# which ends phrases and sentences alike.
UNSPACED = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d-\u083e\u0964-\u0965"
    "\u0f0d-\u0f0e\u104a-\u104b\u1362\u1367-\u1368\u166e\u1735-\u1736\u17d4-\u17d5\u1803\u1809"
    "\u1944-\u1945\u1aa8-\u1aab\u1b4e-\u1b4f\u1b5a-\u1b5b\u1b5e-\u1b5f\u1b7d-\u1b7f\u1c3b-\u1c3c"
    "\u1c7e-\u1c7f\u203c-\u203d\u2047-\u2049\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53-\u2e54\u2e60-\u2e61"
    "\u3002\ua4ff\ua60e-\ua60f\ua6f3\ua6f7\ua876-\ua877\ua8ce-\ua8cf\ua92f\ua9c8-\ua9c9"
    "\uaa5d-\uaa5f\uaaf0-\uaaf1\uabeb\ufe12\ufe15-\ufe16\ufe56-\ufe57\uff01\uff0e\uff1f\uff61"
    "\U00010a56-\U00010a57\U00010f55-\U00010f59\U00010f86-\U00010f89\U00011047-\U00011048"
    "\U000110be-\U000110c1\U00011141-\U00011143\U000111c5-\U000111c6\U000111cd"
    "\U000111de-\U000111df\U00011238-\U00011239\U0001123b-\U0001123c\U000112a9"
    "\U000113d4-\U000113d5\U0001144b-\U0001144c\U000115c2-\U000115c3\U000115c9-\U000115d7"
    "\U00011641-\U00011642\U0001173c-\U0001173e\U00011944\U00011946\U00011a42-\U00011a43"
    "\U00011a9b-\U00011a9c\U00011c41-\U00011c42\U00011ef7-\U00011ef8\U00011f43-\U00011f44"
    "\U00016a6e-\U00016a6f\U00016af5\U00016b37-\U00016b38\U00016b44\U00016d6e-\U00016d6f"
    "\U00016e98\U0001bc9f\U0001da88"
)
CLOSING = "\"')\\]}\u00ab\u00bb\u2019\u201d\u203a\u3009\u300b\u300d\u300f\u3011\u3015\uff09\uff3d"
# Each run is taken whole and once, so a text of nothing but dots or line ends costs no more.
END = re.compile(
    rf"(?P<line>\n(?:[^\S\n]*\n)*)"
    rf"|(?P<signs>[{SPACED}{UNSPACED}]+)(?:[{CLOSING}]|[\u00a0\u202f]\u00bb)*(?P<space>[^\S\n]*)"
)
NEEDS_SPACE = re.compile(f"[{SPACED}]+")


def ends(text: str) -> Iterator[int]:
    """Where sentences of a text end, the last one excepted: ascending, inside (0, len(text)).

    No sentence is spaces alone: they belong to the one before them, or to the first.
    """
    held = 0
    for match in END.finditer(text):
        if match["line"] is None and not is_end(text, match):
            continue
        end = match.end() if match["line"] else match.start("space")
        if not text[held:end].isspace():
            if held:
                yield held
            held = end
        elif held:
            held = end
    if held and text[held:] and not text[held:].isspace():
        yield held


def is_end(text: str, match: re.Match[str]) -> bool:
    """Whether the signs that were found end a sentence."""
    if not NEEDS_SPACE.fullmatch(match["signs"]):
        return True
    small = text[match.end() : match.end() + 1].islower()
    return bool(match["space"]) and not (small and match["signs"][-1] in FULL_STOPS)


def sentence_lengths(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> np.ndarray:
    """int32[sentences]: tokens in each sentence of a document.

    ids: its tokens with eos, which belongs to the last sentence. A token that lies across an end
    belongs to the sentence before it. Raises UserError where the tokenizer cannot say which part of
    the text a token stands for (`Tokenizer.can_place`).
    """
    cuts = list(ends(text))
    parts = [text[begin:end].encode() for begin, end in zip([0, *cuts], cuts)]
    begins, _ = tokenizer.places(text, ids[:-1])
    starts = np.searchsorted(begins, np.cumsum([len(part) for part in parts], dtype=np.int64))
    # Two ends in one token are one, and behind the last token nothing begins.
    inside = np.unique(starts[(starts > 0) & (starts < len(begins))])
    return np.diff(inside, prepend=0, append=len(ids)).astype(np.int32)
