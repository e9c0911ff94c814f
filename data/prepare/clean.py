"""Cleaning: raw bytes to one tidy document, or to a counted reason why there is none.

Second stop of a batch's journey. The order is fixed: decode, newlines and control characters,
Unicode normalisation, personal data, length. Every document that is dropped and every change that
loses information is counted (`dropped/REASON`, `changed/WHAT`), so that the summary adds up.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from typing import Any

from nanolm.data.prepare.pii import mask_pii
from nanolm.errors import UserError

# Everything in Unicode's Cc but tab and newline, byte-order marks, and the two non-characters that
# mark a wrong byte order. A lone carriage return ends a line.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")

# Of these, the ones that end a line or part words (Unicode's UAX 14: BK and NL; UAX 9: B and S).
SEPARATORS = "\x0b\x0c\x85\x1c-\x1f"
# Only where nothing else parts the words already: next to a space or a line's end they just go.
_CONTROLS = CONTROL.pattern[1:-1]
JOINT = re.compile(
    rf"(?<=[^\s{_CONTROLS}])[{_CONTROLS}]*[{SEPARATORS}][{_CONTROLS}]*(?=[^\s{_CONTROLS}])"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningOptions:
    """How documents are cleaned; see the fields of the same names in `PrepareConfig`."""

    unicode_normalisation: str = "nfc"
    control_characters: str = "remove"
    undecodable: str = "drop"
    mask_pii: bool = False
    min_characters: int = 1
    max_characters: int | None = None


def decode(raw: bytes, policy: str, counts: Counter) -> str | None:
    """UTF-8 to text; policy says what happens to bytes that are none: drop, replace or refuse."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if policy == "refuse":
            raise UserError(
                f"undecodable bytes after {raw[max(0, error.start - 20) : error.start]!r} "
                f"({error.reason}); convert the text to UTF-8, or set "
                f"undecodable to drop or replace"
            ) from error
        if policy == "drop":
            counts["dropped/undecodable"] += 1
            return None
        counts["changed/undecodable bytes replaced"] += 1
        return raw.decode("utf-8", "replace")


def remove_controls(text: str, counts: Counter) -> str:
    """CRLF and CR become LF, and so do characters that part two words, as form feeds do; other
    control characters and byte-order marks go."""
    if not CONTROL.search(text):
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, parted = JOINT.subn("\n", text)
    text, removed = CONTROL.subn("", text)
    counts["changed/control characters removed"] += removed
    if parted:
        counts["changed/control characters made line ends"] += parted
    return text


def clean(raw: bytes, options: CleaningOptions, counts: Counter) -> str | None:
    """The cleaned document, or None when it is dropped (its reason then counted in `counts`).

    Raises UserError for undecodable bytes under the policy "refuse".
    """
    text = decode(raw, options.undecodable, counts)
    if text is None:
        return None
    if options.control_characters == "remove":
        text = remove_controls(text, counts)
    form: Any = options.unicode_normalisation.upper()
    if form != "NONE" and not text.isascii() and not unicodedata.is_normalized(form, text):
        text = unicodedata.normalize(form, text)
        counts[f"changed/documents rewritten by {form}"] += 1
    if options.mask_pii:
        text = mask_pii(text, counts)
    if not text or text.isspace():
        counts["dropped/empty"] += 1
    elif len(text) < options.min_characters:
        counts["dropped/too short"] += 1
    elif options.max_characters is not None and len(text) > options.max_characters:
        counts["dropped/too long"] += 1
    else:
        return text
    return None
