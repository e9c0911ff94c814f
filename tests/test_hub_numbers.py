"""Numbers of a published config.json, in every family: an odd one is refused by its key."""

import math

import pytest
import transformers

from nanolm.errors import UserError
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from tests.published import SHAPES

ODD = ["x", "1", True, -1, [1], {}, math.nan, math.inf, 10**400]
ASKED: list[tuple[str, str]] = []


class Recording(Published):
    """A config.json that keeps which numbers were asked for."""

    def size(self, key):
        ASKED.append((key, "size"))
        return super().size(key)

    def number(self, key, default):
        ASKED.append((key, "number"))
        return super().number(key, default)

    def amount(self, key, default):
        ASKED.append((key, "amount"))
        return super().amount(key, default)


def published(name):
    """config.json of a small model as transformers writes it."""
    shape = SHAPES.get(name, ("", {}))[1]
    return getattr(transformers, FAMILIES[name].classes.config)(**shape).to_dict()


def planted(value, key, odd):
    """A mapping with another value under a key, wherever it stands."""
    if not isinstance(value, dict):
        return value
    return {k: odd if k == key else planted(v, key, odd) for k, v in value.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_odd_number_is_refused_by_its_key(name):
    values = published(name)
    ASKED.clear()
    FAMILIES[name].to_model(Recording("config.json", values, name))
    asked = sorted(set(ASKED))
    assert len(asked) >= 5
    for key, how in asked:
        for odd in ODD + [1.5] * (how != "number"):
            given = planted(values, key, odd)
            given = values | {key: odd} if given == values else given
            with pytest.raises(UserError, match=f"config.json gives {key} as .*; it must be a"):
                FAMILIES[name].to_model(Published("config.json", given, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_of_another_type_is_refused_or_harmless(name):
    """No key of any family ends in another exception than the user's."""
    values = published(name)
    layers, refused = values.get("num_hidden_layers", 2), 0
    for key in values:
        for odd in (["x"], [{}], [{}] * layers, {"x": 1}, {"x": []}, 5, "x"):
            try:
                FAMILIES[name].to_model(Published("config.json", values | {key: odd}, name))
            except UserError as error:
                refused += "config.json" in str(error)
    assert refused > 20


def test_whole_numbers_may_be_written_as_others():
    config = Published("config.json", {"a": 2.0, "b": 0, "c": None}, "t5")
    assert [config.amount(key, 7) for key in "abcd"] == [2, 0, 7, 7]
    assert config.number("a", 1) == 2.0
