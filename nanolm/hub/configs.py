"""A config.json, asked key by key; what each family makes of it stands in `families/`.

A key that is missing there has the family's published default where there is one; sizes have none.
A value that would be computed differently here is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nanolm.errors import UserError, require

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
OURS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}

MOST = 1 << 31
"""Of anything that is counted, as in our own configs."""
LARGEST = 1e100
"""JSON knows no end of numbers: 1e999 is read as infinite, and an integer may be longer still."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A config.json, asked key by key."""

    path: str
    values: Mapping[str, Any]
    family: str

    def size(self, key: str) -> int:
        """A size; raises UserError unless it is there."""
        value: Any = self.values.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST
        require(whole, f"{self.path} gives {key} as {value!r}; it must be a positive whole number")
        return int(value)

    def get(self, key: str, default: Any) -> Any:
        """A value, or the family's default where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A number that is not negative, or the family's default."""
        value = self.get(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and 0 <= value <= LARGEST
        require(good, f"{self.path} gives {key} as {value!r}; it must be a number")
        return float(value)

    def amount(self, key: str, default: int) -> int:
        """A whole number that is not negative, or the family's default."""
        value = self.number(key, default)
        whole = value.is_integer() and value <= MOST
        require(whole, f"{self.path} gives {key} as {value!r}; it must be a whole number")
        return int(value)

    def only(self, **wanted: Any) -> None:
        """Raises UserError for a key that is there with another value than the one we compute."""
        for key, value in wanted.items():
            if self.get(key, value) != value:
                raise UserError(
                    f"{self.path} sets {key} to {self.values[key]!r}, and nanolm computes "
                    f"{self.family} only with {value!r}; choose another checkpoint"
                )

    def activation(self, key: str, default: str) -> str:
        """Our name of the feed-forward's activation."""
        name = self.get(key, default)
        known = ", ".join(OURS)
        require(
            isinstance(name, str) and name in OURS,
            f"{self.path} sets {key} to {name!r}, and nanolm computes {self.family} only with "
            f"{known}; choose another checkpoint",
        )
        return OURS[name]
