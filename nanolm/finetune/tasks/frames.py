"""Frames: the special tokens around a task's texts, as the trunk knows them from pretraining.

encoder      <cls> A <sep>    <cls> A <sep> B <sep>       (Devlin et al. 2019)
             <s> A </s>       <s> A </s></s> B </s>       (Liu et al. 2019b), if the tokenizer says
two_stream   A <sep> <cls>    A <sep> B <sep> <cls>       (Yang et al. 2019)
decoder      <eos> A <eos>    <eos> A <sep> B <eos>       every document begins behind an end

Or (`objective.frame=tokenizer`) whatever a tokenizer.json itself puts around a text, which is what
a published model with a head of a task was trained on.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from nanolm.data.tokenizer import Tokenizer
from nanolm.finetune.tasks.items import Sequence

FrameName = Literal["trunk", "tokenizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around one text or two, which <sep> parts, and where what was read is found."""

    begin: tuple[str, ...]
    """Roles of the special tokens before the first text."""
    end: tuple[str, ...]
    """And behind the last one."""
    pooling: Literal["mean", "last"]
    """How a whole sequence is read unless a config says otherwise."""
    two_sided: bool = True
    """Whether tokens see what follows them, padding too unless its length is told."""
    apart: int = 0
    """How many of the last tokens have a segment of their own, the third."""

    def sides(self, tokenizer: Tokenizer, n_texts: int) -> list[list[int]]:
        """The special tokens before the first text, between it and a second, and behind the last:
        n_texts + 1 lists."""
        begin, end = (list(map(tokenizer.role, roles)) for roles in (self.begin, self.end))
        between = [tokenizer.sep] * tokenizer.separators if n_texts == 2 else []
        return [begin, between, end] if n_texts == 2 else [begin, end]

    def n_specials(self, tokenizer: Tokenizer, n_texts: int) -> int:
        """How many special tokens frame one text or two."""
        return sum(map(len, self.sides(tokenizer, n_texts)))

    def around(
        self,
        tokenizer: Tokenizer,
        length: int,
        first: np.ndarray,
        second: np.ndarray | None = None,
        *,
        mark_shared: bool = False,
    ) -> tuple[Sequence, int]:
        """(sequence of at most `length` tokens, tokens cut) of one text or two, as token ids; the
        longer one is cut."""
        begin, *between, end = self.sides(tokenizer, 1 if second is None else 2)
        room = length - sum(map(len, (begin, *between, end)))
        total = len(first) + (0 if second is None else len(second))
        if second is None:
            first = first[:room]
            parts: list[ArrayLike] = [begin, first, end]
        else:
            half = room // 2
            keep = min(len(first), max(half, room - len(second)))
            first, second = first[:keep], second[: room - keep]
            parts = [begin, first, *between, second, end]
        tokens = np.concatenate(parts).astype(np.int64)
        begins_second = len(tokens) if second is None else len(tokens) - len(second) - len(end)
        sequence = Sequence(tokens, begins_second, mark_shared, self.apart)
        return sequence, max(0, total - room)


class FrameOfFile(Frame):
    """What a tokenizer.json itself puts around a text; what else is known of a trunk stays."""

    def sides(self, tokenizer: Tokenizer, n_texts: int) -> list[list[int]]:
        """As the file says."""
        return tokenizer.around(n_texts)


FRAMES = {
    "encoder": Frame(begin=("cls",), end=("sep",), pooling="mean"),
    "two_stream": Frame(begin=(), end=("sep", "cls"), pooling="last", apart=1),
    "decoder": Frame(begin=("eos",), end=("eos",), pooling="last", two_sided=False),
}
"""The frame of each trunk that reads labelled texts."""
KINDS: dict[FrameName, type[Frame]] = {"trunk": Frame, "tokenizer": FrameOfFile}
FIELDS = dataclasses.fields(Frame)


def frame_of(trunk: str, kind: FrameName = "trunk") -> Frame:
    """The frame of a trunk, or with `tokenizer` that of the tokenizer's file; a plug-in's trunk is
    read as a decoder is."""
    frame = FRAMES.get(trunk, FRAMES["decoder"])
    return KINDS[kind](**{field.name: getattr(frame, field.name) for field in FIELDS})
