"""YAML as people expect it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.config import strict_yaml
from nanolm.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("10", 10),
        ("1e", "1e"),
        ("0x10", 16),
        ("e4", "e4"),
        ("1.2.3", "1.2.3"),
        ("null", None),
        ("true", True),
        ("'3e-4'", "3e-4"),
        ("2024-01-01x", "2024-01-01x"),
        ("2024-01-01", "2024-01-01"),
        ("010", 10),
        ("-007", -7),
        ("0o10", 8),
        ("-0x1F", -31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0b1", "0b1"),
        ("yes", "yes"),
        ("off", "off"),
        ("FALSE", False),
        ("~", None),
        ("٣", "٣"),
    ],
)
def test_scalars(text, value):
    parsed = strict_yaml.parse(text, "here")
    assert parsed == value and type(parsed) is type(value)


def test_infinities_are_numbers():
    assert strict_yaml.parse("[.inf, -.inf]", "here") == [math.inf, -math.inf]
    assert math.isnan(strict_yaml.parse(".nan", "here"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "line 3 .*'a' stands twice"),
        ("a:\n  b: 1\n  b: 1", "line 3 .*'b' stands twice"),
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\ta: 1", "line 1"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_refusals_name_the_place(text, problem):
    with pytest.raises(UserError, match=f"conf.yaml.*{problem}"):
        strict_yaml.parse(text, "conf.yaml")


def test_anchors_merge():
    text = "a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n"
    assert strict_yaml.parse(text, "here")["b"] == {"x": 1, "y": 3}


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    for text, value in (("", {}), ("# only a comment", {}), ("lr: 3e-4", {"lr": 3e-4})):
        path.write_text(text)
        assert strict_yaml.read_mapping(path) == value
    for content, problem in ((b"- 1", "keys and values"), (b"\xff\xfe\x00", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"a.yaml.*{problem}"):
            strict_yaml.read_mapping(path)
    with pytest.raises(UserError, match=r"none.yaml: No such file"):
        strict_yaml.read_mapping(tmp_path / "none.yaml")


ODD = [*"~.+-0189eExo_:<=>[]{}!&*?|#%@`,'\"\\ \t\n\r", "\x85", "\u2028", "\ufeff", "\x1b", "\x0c"]
NUMBERS = "1e3 1E5 010 0o17 0x1F 0b11 1_000 1:30 190:20:30 .5 1. +1 -0 .inf -.Inf .nan 2024-01-01"
NAMES = "yes No on OFF true False null NULL ~ << = - -- --- ... ? y n [] {} [a {b !!int !x &a *a #c"
MARKS = "@x %Y `c |2 >- 'q \"d ' \" '' \"\" 2001-12-14t21:59:43.10-05:00"
LONG = ["", " ", "a: b", "a #b", "- a", "? a", ": a", "a:", "[" * 101, "{" * 300, "\ud800", "\0"]
WORDS = [*f"{NUMBERS} {NAMES} {MARKS}".split(), *LONG]
texts = (
    st.sampled_from(WORDS)
    | st.text(st.sampled_from(ODD), max_size=8)
    | st.text(st.characters(), max_size=12)
    | st.text(st.characters(categories=["Cs", "Cc", "Zs", "Zl", "Zp", "Nd"]), max_size=5)
    | st.text("ab ", min_size=70, max_size=200)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(texts)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_every_text_is_written_so_that_it_is_read_again(text):
    for value in (text, [text], {text: text}, {"a": {"b": [text, [text]]}}):
        written = strict_yaml.dump(value).encode()
        assert strict_yaml.parse(written.decode(), "round trip") == value


@pytest.mark.parametrize("word", WORDS)
def test_every_word_that_could_be_something_else(word):
    assert strict_yaml.parse(strict_yaml.dump({word: word}), "round trip") == {word: word}


@given(values)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_what_is_dumped_is_parsed_again(value):
    assert strict_yaml.parse(strict_yaml.dump(value), "round trip") == value


def test_a_value_is_the_callers_own():
    """Texts are parsed once and kept."""
    text = "model: {sizes: [1, 2]}\n"
    strict_yaml.parse(text, "a.yaml")["model"]["sizes"].append(3)
    assert strict_yaml.parse(text, "a.yaml") == {"model": {"sizes": [1, 2]}}
