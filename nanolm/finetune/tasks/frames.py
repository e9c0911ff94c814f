"""Frames: the special tokens around a task's texts, as the trunk knows them from pretraining.

encoder      <cls> A <sep>    <cls> A <sep> B <sep>       (Devlin et al. 2019)
             <s> A </s>       <s> A </s></s> B </s>       (Liu et al. 2019b), if the tokenizer says
two_stream   A <sep> <cls>    A <sep> B <sep> <cls>       (Yang et al. 2019)
decoder      <eos> A <eos>    <eos> A <sep> B <eos>       every document begins behind an end
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from nanolm.data.tokenizer import Tokenizer
from nanolm.finetune.tasks.items import Sequence


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

    def n_specials(self, n_texts: int, separators: int = 1) -> int:
        """How many special tokens frame so many texts, `separators` of them between each two."""
        return len(self.begin) + len(self.end) + (n_texts - 1) * separators

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
        begin, end = (list(map(tokenizer.role, r)) for r in (self.begin, self.end))
        room = length - self.n_specials(1 if second is None else 2, tokenizer.separators)
        total = len(first) + (0 if second is None else len(second))
        if second is None:
            first = first[:room]
            parts: list[ArrayLike] = [begin, first, end]
        else:
            half = room // 2
            keep = min(len(first), max(half, room - len(second)))
            first, second = first[:keep], second[: room - keep]
            parts = [begin, first, [tokenizer.sep] * tokenizer.separators, second, end]
        tokens = np.concatenate(parts).astype(np.int64)
        begins_second = len(tokens) if second is None else len(tokens) - len(second) - len(end)
        sequence = Sequence(tokens, begins_second, mark_shared, self.apart)
        return sequence, max(0, total - room)


FRAMES = {
    "encoder": Frame(begin=("cls",), end=("sep",), pooling="mean"),
    "two_stream": Frame(begin=(), end=("sep", "cls"), pooling="last", apart=1),
    "decoder": Frame(begin=("eos",), end=("eos",), pooling="last", two_sided=False),
}
"""The frame of each trunk that reads labelled texts."""


def frame_of(trunk: str) -> Frame:
    """The frame of a trunk; a plug-in's trunk is read as a decoder is."""
    return FRAMES.get(trunk, FRAMES["decoder"])
