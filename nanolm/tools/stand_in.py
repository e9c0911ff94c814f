"""What stands in for a tokenizer where ids are random or come ready made: the benches measure steps
on them, `nanolm estimate` counts what a run would hold."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import numpy as np

from nanolm.data.tokenizer import Tokenizer

ROLES = {"pad": 0, "mask": 1, "cls": 2, "sep": 3}


def stand_in_tokenizer(vocab_size: int, **more: Any) -> Tokenizer:
    """One of this size, for who asks for no more of a tokenizer than it has; `more` are further
    fields of it."""
    return cast(Tokenizer, StandInTokenizer(vocab_size, **more))


@dataclasses.dataclass(frozen=True)
class StandInTokenizer:
    """As much of a tokenizer as collating rows and records asks for: the first `specials` ids of
    ROLES, then ordinary tokens."""

    vocab_size: int
    specials: int = len(ROLES)
    hash: str = "random ids"
    pad: ClassVar[int] = ROLES["pad"]
    mask: ClassVar[int] = ROLES["mask"]
    cls: ClassVar[int] = ROLES["cls"]
    sep: ClassVar[int] = ROLES["sep"]
    eos: ClassVar[int] = ROLES["sep"]

    def roles(self) -> dict[str, int]:
        """The roles that it has, with their ids."""
        return {role: index for role, index in ROLES.items() if index < self.specials}

    @property
    def special_mask(self) -> np.ndarray:
        """bool[V]: the specials."""
        return np.arange(self.vocab_size) < self.specials

    @property
    def extra_ids(self) -> tuple[int, ...]:
        """The last hundred ids, which may stand for spans."""
        return tuple(range(max(self.specials, self.vocab_size - 100), self.vocab_size))
