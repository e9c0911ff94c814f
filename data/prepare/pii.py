"""Masking personal data: mail addresses, phone numbers, IP addresses and ID-like numbers.

Patterns, not understanding: they find what has the shape of such data, and miss what has not.
Each find is replaced by a word in brackets and counted.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+", re.ASCII)
ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})(?![\w:]|\.\d)",
    re.ASCII,
)
# Country code first; (area) number; or groups of 3 or 4 digits with one kind of separator.
PHONE = re.compile(
    r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{2,5}\)[ .-]?\d{3,4}[ .-]?\d{3,5}"
    r"|\d{3}([ .-])\d{3,4}\1\d{4}"
    r"|1[3-9]\d{9})(?![\w-]|\.\d)",
    re.ASCII,
)
# US social security, IBAN, card in groups of four, and any bare run of 9 to 19 digits (the last one
# may be an X, as in Chinese resident numbers).
IDENTITY = re.compile(
    r"(?<![\w.-])(?:\d{3}-\d{2}-\d{4}|[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"
    r"|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{9,18}[\dXx]?)(?![\w-]|\.\d)",
    re.ASCII,
)
DIGITS = re.compile(r"\d\d", re.ASCII)


def mask_pii(text: str, counts: Counter) -> str:
    """Replace personal data by [MAIL], [IP], [PHONE] and [ID], counting each."""
    if "@" in text:
        text = _replace(MAIL, "[MAIL]", text, counts)
    if "::" in text or DIGITS.search(text) or text.count(".") > 2:
        text = ADDRESS.sub(lambda match: _address(match, counts), text)
        text = _replace(PHONE, "[PHONE]", text, counts)
        text = _replace(IDENTITY, "[ID]", text, counts)
    return text


def _replace(pattern: re.Pattern, word: str, text: str, counts: Counter) -> str:
    text, found = pattern.subn(word, text)
    if found:
        counts[f"changed/{word} masked"] += found
    return text


def _address(match: re.Match, counts: Counter) -> str:
    if ":" in match[0] and len(match[0].replace(":", "")) < 4:  # slices, scopes: x[::2], a::b
        return match[0]
    try:
        ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    counts["changed/[IP] masked"] += 1
    return "[IP]"
