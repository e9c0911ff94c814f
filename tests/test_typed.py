"""Plain values to dataclasses: every annotation, every refusal, words of a command line."""

import dataclasses
from typing import Any, Literal

import pytest

from nanolm.config.typed import checked, from_words, instance, n_words
from nanolm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
    n: int = 1
    parts: list[Part] = dataclasses.field(default_factory=list)
    part: Part | None = None


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float | None, None, None),
        (float | None, 2, 2.0),
        (int | float, 2, 2),
        (str, "3", "3"),
        (bool, False, False),
        (Literal["a", "b"], "a", "a"),
        (list[int | None], [1, None], [1, None]),
        (tuple[float, float], [0, 1.5], (0.0, 1.5)),
        (dict[str, dict[str, Any]], {"a": {"b": [1]}}, {"a": {"b": [1]}}),
        (list[str] | None, ["x"], ["x"]),
    ],
)
def test_right_values(kind, given, value):
    got = checked(kind, given, "key")
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        (int, "x", "key: expected an integer, got 'x'"),
        (int, 3.0, "key: expected an integer, got 3.0"),
        (int, True, "key: expected an integer, got true"),
        (int, None, "key: expected an integer, got null"),
        (float, "3", "key: expected a number, got '3'"),
        (float, float("nan"), "key: expected a number, got nan"),
        (float, float("inf"), "key: expected a number, got inf"),
        (float, True, "key: expected a number, got true"),
        (bool, 1, "key: expected true or false, got 1"),
        (str, 5, "key: expected text, got 5"),
        (int | None, "x", "key: expected an integer or null, got 'x'"),
        (Literal["a", "b"], "c", "key: expected one of a, b, got 'c'"),
        (Literal["a"], 1, "key: expected one of a, got 1"),
        (list[int], 5, "key: expected a list, each item an integer, got 5"),
        (list[int], [1, "x"], "key[1]: expected an integer, got 'x'"),
        (list[int] | None, ["x"], "key[0]: expected an integer, got 'x'"),
        (tuple[float, float], [1], "key: expected a list of 2: a number, a number, got [1]"),
        (dict[str, int], {"a": "x"}, "key.a: expected an integer, got 'x'"),
        (Part, "x", "key: expected keys and values, got 'x'"),
        (Part, {}, "key.path: a value is required"),
        (
            Whole,
            {"m": 1},
            "key.m: there is no such key (did you mean key.n?); there are key.n, key.parts, k",
        ),
        (
            Whole,
            {"parts": [{"path": "a"}, {"pth": "b"}]},
            "key.parts[1].pth: there is no such key ",
        ),
        (Whole, {"part": {"path": 1}}, "key.part.path: expected text, got 1"),
        (Whole, {"part": 1}, "key.part: expected keys and values or null, got 1"),
        (Whole, {1: 2}, "key.1: there is no such key"),
    ],
)
def test_wrong_values_are_one_sentence_that_begins_with_the_key(kind, given, sentence):
    with pytest.raises(UserError) as error:
        checked(kind, given, "key")
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_nested_dataclasses():
    whole = instance(Whole, {"n": 2, "parts": [{"path": "a", "weight": 2}], "part": {"path": "b"}})
    assert whole == Whole(2, [Part("a", 2.0)], Part("b"))
    assert type(whole.parts[0].weight) is float


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        (int, ["3"], 3),
        (float, ["3e-4"], 3e-4),
        (str, ["2024"], "2024"),
        (str, ["null"], "null"),
        (str | None, ["null"], None),
        (str | None, ["a b"], "a b"),
        (Literal["none", "1"], ["1"], "1"),
        (bool, [], True),
        (bool, ["false"], False),
        (list[str], ["a:b", "[c"], ["a:b", "[c"]),
        (list[str], ["['a', b]"], ["a", "b"]),
        (list[int | None], ["128", "null"], [128, None]),
        (list[int | None], ["[128, null]"], [128, None]),
        (list[str] | None, ["null"], None),
        (Literal["balanced"] | list[float] | None, ["balanced"], "balanced"),
        (Literal["balanced"] | list[float] | None, ["1", "2.5"], [1, 2.5]),
        (Literal["balanced"] | list[float] | None, ["null"], None),
        (tuple[float, float], ["0.9", "0.95"], [0.9, 0.95]),
        (list[Part], ["[{path: a}]"], [{"path": "a"}]),
    ],
)
def test_words_of_a_command_line(kind, words, value):
    assert from_words(kind, words, "key") == value
    assert n_words(kind, words) == len(words)


def test_how_many_words_an_option_takes():
    assert n_words(int, ["3", "rest"]) == 1
    assert n_words(bool, ["run"]) == 0 and n_words(bool, ["true", "run"]) == 1
    assert n_words(list[str], ["a", "b"]) == 2
    for kind, words in ((int, []), (str, [])):
        with pytest.raises(UserError, match=r"^key: expected .*, got nothing$"):
            from_words(kind, words, "key")
