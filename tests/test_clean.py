"""Cleaning: what happens to each kind of document, and that every loss is counted."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.data.prepare.clean import CleaningOptions, clean
from nanolm.data.prepare.pii import mask_pii
from nanolm.errors import UserError


def cleaned(raw: bytes | str, **options) -> tuple[str | None, dict[str, int]]:
    counts: Counter = Counter()
    raw = raw.encode() if isinstance(raw, str) else raw
    return clean(raw, CleaningOptions(**options), counts), dict(counts)


def test_controls_and_line_ends():
    text, counts = cleaned("\ufeffa\r\nb\rc\x00\x0b\x7f\x85\td\n")
    assert text == "a\nb\nc\td\n"
    assert counts == {"changed/control characters removed": 5}
    assert cleaned("a\x00\x0b\x7fb\n\x0c\nc") == (
        "a\nb\n\nc",
        {"changed/control characters made line ends": 1, "changed/control characters removed": 1},
    )
    assert cleaned("a\r\n\x00", control_characters="keep")[0] == "a\r\n\x00"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("ab \n\t\r\x0b\x0c\x85\x1c\x1d\x1e\x1f\x00\x7f\ufeff")))
def test_cleaning_joins_no_words(text):
    """The words are those that Python finds once what is invisible and parts nothing has gone."""
    found, _ = cleaned(text, min_characters=0)
    words = "".join(character for character in text if character not in "\x00\x7f\ufeff").split()
    assert (found or "").split() == words
    assert not set(found or "") - set("ab \n\t")


def test_unicode_normalisation():
    raw = "e\u0301 \uff21 \u2460"
    assert cleaned(raw, unicode_normalisation="none") == (raw, {})
    assert cleaned(raw)[0] == "\u00e9 \uff21 \u2460"
    text, counts = cleaned(raw, unicode_normalisation="nfkc")
    assert text == "\u00e9 A 1"
    assert counts == {"changed/documents rewritten by NFKC": 1}


def test_undecodable_bytes_follow_the_policy():
    raw = b"good \xff bad"
    assert cleaned(raw) == (None, {"dropped/undecodable": 1})
    text, counts = cleaned(raw, undecodable="replace")
    assert text == "good \ufffd bad" and counts == {"changed/undecodable bytes replaced": 1}
    with pytest.raises(UserError, match=r"undecodable bytes after b'good '"):
        cleaned(raw, undecodable="refuse")


def test_lengths():
    options = {"min_characters": 3, "max_characters": 5}
    assert cleaned(" \n\t ", **options)[1] == {"dropped/empty": 1}
    assert cleaned("", **options)[1] == {"dropped/empty": 1}
    assert cleaned("ab", **options)[1] == {"dropped/too short": 1}
    assert cleaned("abcdef", **options)[1] == {"dropped/too long": 1}
    assert cleaned("abcde", **options) == ("abcde", {})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=80))
def test_cleaning_twice_changes_nothing_more(text: str):
    raw = text.encode()
    for options in ({}, {"unicode_normalisation": "nfkc", "mask_pii": True}):
        once, counts = cleaned(raw, **options)
        dropped = sum(n for key, n in counts.items() if key.startswith("dropped/"))
        assert dropped == (once is None)
        if once is not None and "mask_pii" not in options:
            assert cleaned(once, **options) == (once, {})


PERSONAL = [
    ("write to ann.lee+x@mail.example.org now", "write to [MAIL] now"),
    ("call +1 (555) 123-4567 or 555-123-4567.", "call [PHONE] or [PHONE]."),
    ("电话 13812345678。", "电话 [PHONE]。"),
    ("+44 20 7946 0958", "[PHONE]"),
    ("host 192.168.0.17, fe80::1ff:fe23:4567:890a", "host [IP], [IP]"),
    ("SSN 078-05-1120", "SSN [ID]"),
    ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [ID]."),
    ("card 4111 1111 1111 1111", "card [ID]"),
    ("身份证 11010519491231002X", "身份证 [ID]"),
]
HARMLESS = [
    "on 2024-01-31 at 12:30:45",
    "pi is 3.14159265358979",
    "version 1.2.3 of 300.1.2.999",
    "std::vector<int>::iterator x[::2]",
    "a 1,234,567 b 12345678",
    "0xdeadbeef12345678 and v123456789",
    "@decorator",
]


@pytest.mark.parametrize(("text", "masked"), PERSONAL)
def test_personal_data_is_masked_and_counted(text: str, masked: str):
    counts: Counter = Counter()
    assert mask_pii(text, counts) == masked
    assert sum(counts.values()) == masked.count("[")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_similar_stays(text: str):
    assert mask_pii(text, Counter()) == text
