"""Which characters make a word, in scripts with and without spaces, as far as a character can tell.

Whole-word masks, spans and labels of words are made of tokens that continue each other; whether one
does is asked of its first character and of the last before it.
"""

from __future__ import annotations

import re
import unicodedata

# Scripts written without spaces: one character is one word, unless a segmenter says otherwise.
IDEOGRAPHIC = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
# Line-break class SA, "complex context", of the Unicode character database (LineBreak.txt, UAX 14):
# Thai, Lao, Burmese, Khmer, Tai Le, New Tai Lue, Tai Tham, Burmese extended, Tai Viet, Ahom.
COMPLEX_CONTEXT = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ebd\u0ec0-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u108f"
    "\u109a-\u109f\u1780-\u17d3\u17d7\u17dc\u17dd\u1950-\u1974\u1980-\u19c9\u19da\u19de\u19df"
    "\u1a20-\u1a7c\u1aa0-\u1aad\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaac2\uaadb-\uaadf"
    "\U00011700-\U0001172b\U0001173a\U0001173b\U0001173f-\U00011746"
)
UNSPACED = re.compile(f"[{IDEOGRAPHIC}{COMPLEX_CONTEXT}]")
MARKED = re.compile(f"[{COMPLEX_CONTEXT}]")


def joins_word(character: str) -> bool:
    """Whether a character continues the word of a letter before it.

    A vowel sign or tone mark does in every script, so that no letter loses its own.
    """
    mark = unicodedata.category(character)[0] == "M"
    return mark or (character.isalnum() and not UNSPACED.match(character))


def is_joined(character: str) -> bool:
    """Whether what follows a character may continue its word, be it only a mark on its letter."""
    return joins_word(character) or bool(MARKED.match(character))


def byte_joins_word(byte: int) -> bool:
    """Whether a byte piece continues the word before it.

    The middle of a character always does, so that no character is split. A first byte tells the
    script in the rough: Latin to Indic letters (C3-E1) and Hangul syllables (EA-ED) continue a
    word; punctuation, kana, Chinese characters and symbols (E2-E9, EE and above) begin one.
    """
    if byte < 0x80:
        return joins_word(chr(byte))
    return byte < 0xE2 or 0xEA <= byte <= 0xED
