"""Scripts without spaces are those of Unicode, not of a list that somebody remembered."""

import sys
import unicodedata

import regex

from nanolm.data.words import MARKED


def test_complex_context_is_unicodes_line_break_class_sa():
    """U+19DA, a digit of New Tai Lue, has left the class in later versions of Unicode."""
    known = regex.compile(r"\p{Line_Break=SA}")
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        ours, theirs = bool(MARKED.match(character)), bool(known.match(character))
        if theirs or unicodedata.category(character) != "Cn":  # not assigned
            assert ours == theirs or character == "\u19da", f"U+{number:04X}"
