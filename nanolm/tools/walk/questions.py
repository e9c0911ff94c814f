"""Which of a row's predictions the walk looks at, and how each objective made it.

    causal (clm, prefix)    position t reads the row up to t and predicts token t + 1
    masked (mlm, mlm_pair)  a masked position reads both sides and predicts what stood there

Both hand the vocabulary's head a flat list of N targets; `number` is the prediction's place in it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from nanolm.errors import UserError, require
from nanolm.objectives.base import IGNORED, Objective
from nanolm.objectives.clm import Clm
from nanolm.objectives.mlm import Mlm
from nanolm.registry import OBJECTIVES
from nanolm.tools.walk.place import Place, place_of
from nanolm.training.batch import MicroBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One prediction of the first row of a micro-batch: the position whose hidden state answers,
    its number among the head's N targets, and the id that is right."""

    position: int
    number: int
    target: int


class Reader(Protocol):
    """How a kind of objective makes predictions of the first row of a micro-batch."""

    changed: str
    """What it does to a row, in a word."""

    def raw(self, batch: MicroBatch) -> list[int]:
        """The ids of the row as they stood in the shards, with the specials around them."""

    def answers(self, batch: MicroBatch) -> dict[int, int]:
        """{position that predicts something: the id that is right there}, in order."""

    def number(self, batch: MicroBatch, position: int) -> int:
        """The place of a position's prediction among the head's targets."""

    def maker(self, objective: Objective) -> Place:
        """The function that changed the row."""


class Causal:
    """Inputs and targets are the same tokens, one apart; the head sees all positions, row after
    row."""

    changed = "shifted"

    def raw(self, batch: MicroBatch) -> list[int]:
        """The inputs, up to the last that predicts something, and what it predicts."""
        last, target = list(self.answers(batch).items())[-1]
        return [*batch.tensors["tokens"][0, : last + 1].tolist(), target]

    def answers(self, batch: MicroBatch) -> dict[int, int]:
        """The next token, but for a prefix and for what fills up a short row."""
        targets = batch.tensors["targets"][0].tolist()
        return {t: target for t, target in enumerate(targets) if target != IGNORED}

    def number(self, batch: MicroBatch, position: int) -> int:
        """The first row's come first."""
        return position

    def maker(self, objective: Any) -> Place:
        """What put inputs and targets one apart."""
        return place_of(objective.collate)


class Masked:
    """Some tokens are hidden, and the head sees these alone, row after row."""

    changed = "masked"

    def raw(self, batch: MicroBatch) -> list[int]:
        """The inputs with what was hidden put back."""
        tokens_T = batch.tensors["tokens"][0].clone()
        for position, target in self.answers(batch).items():
            tokens_T[position] = target
        lengths = batch.tensors.get("lengths")
        return tokens_T[: len(tokens_T) if lengths is None else int(lengths[0])].tolist()

    def answers(self, batch: MicroBatch) -> dict[int, int]:
        """What stood at the masked positions; the first row's are listed first."""
        length = batch.tensors["tokens"].shape[1]
        pairs = zip(
            batch.tensors["masked_index"].tolist(),
            batch.tensors["masked_targets"].tolist(),
            strict=True,
        )
        return {index: target for index, target in pairs if index < length}

    def number(self, batch: MicroBatch, position: int) -> int:
        """Its place in the list."""
        return list(self.answers(batch)).index(position)

    def maker(self, objective: Any) -> Place:
        """What hid them."""
        return place_of(objective.mask)


READERS: tuple[tuple[type, Callable[[], Reader]], ...] = ((Clm, Causal), (Mlm, Masked))


def reader_of(objective: str, run: pathlib.Path) -> Reader:
    """The reader of the rows of a registered objective; raises UserError when none is known."""
    made = OBJECTIVES.get(objective).build
    for kind, reader in READERS:
        if isinstance(made, type) and issubclass(made, kind):
            return reader()
    raise UserError(
        f"{run} trains objective={objective}, and `nanolm walk` follows causal and masked language "
        f"models: clm, prefix, mlm, mlm_pair and plug-ins that extend them; name a run of one of "
        f"these"
    )


def asked(reader: Reader, batch: MicroBatch, position: int | None) -> Question:
    """The prediction at the position, or in the middle of those that the row has.

    Raises UserError when nothing is predicted there.
    """
    answers = reader.answers(batch)
    found = list(answers)
    require(bool(found), "the first row of this step predicts nothing; take another --step")
    if position is None:
        position = found[len(found) // 2]
    shown = ", ".join(map(str, found)) if len(found) <= 40 else f"{found[0]} to {found[-1]}"
    require(
        position in answers,
        f"--position {position} of this row predicts nothing; these do: {shown}",
    )
    number = reader.number(batch, position)
    return Question(position=position, number=number, target=answers[position])
