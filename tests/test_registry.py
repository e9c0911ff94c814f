"""Registries: names are unique, unknown ones list the choices."""

import dataclasses

import pytest

from nanolm.errors import UserError
from nanolm.registry import Options, Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThingOptions(Options):
    name: str = "thing"


def test_register_get_names():
    things = Registry("thing")
    build = things.register("thing", options=ThingOptions)(lambda: 1)
    things.register("plain")(len)
    assert things.get("thing").build is build and things.get("thing").options is ThingOptions
    assert things.get("plain").options is None
    assert things.names() == ["plain", "thing"]


def test_a_taken_name_raises_and_keeps_the_first():
    things = Registry("thing")
    things.register("a")(len)
    with pytest.raises(ValueError, match=r"thing 'a' is registered already, by builtins"):
        things.register("a")(print)
    assert things.get("a").build is len


def test_options_must_default_to_their_name():
    with pytest.raises(ValueError, match=r"ThingOptions.*'other'"):
        Registry("thing").register("other", options=ThingOptions)(len)


def test_an_unknown_name_lists_the_choices():
    things = Registry("thing")
    things.register("a")(len)
    with pytest.raises(UserError, match=r"unknown thing 'b'; choose from a, .*plugins"):
        things.get("b")


def test_a_variant_takes_over_in_its_case_alone():
    things = Registry("thing")
    things.register("a")(len)
    assert things.register_variant("a", "tall")(print) is print
    assert things.get("a").builder("tall") is print
    assert things.get("a").builder("short") is things.get("a").build is len
    with pytest.raises(ValueError, match="thing 'a' has a variant for tall already"):
        things.register_variant("a", "tall")(max)
    with pytest.raises(ValueError, match="thing 'b' is not registered"):
        things.register_variant("b", "tall")(max)
