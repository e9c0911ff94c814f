"""Frames: the special tokens around a task's texts, as the trunk knows them from pretraining.

encoder      <cls> A <sep>    <cls> A <sep> B <sep>       (Devlin et al. 2019)
             <s> A </s>       <s> A </s></s> B </s>       (Liu et al. 2019), if the tokenizer says
two_stream   A <sep> <cls>    A <sep> B <sep> <cls>       (Yang et al. 2019)
decoder      <eos> A <eos>    <eos> A <sep> B <eos>       every document begins behind an end
"""

from __future__ import annotations

import dataclasses
from typing import Literal


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

    def n_specials(self, n_texts: int) -> int:
        """How many special tokens frame so many texts, one of them between each two."""
        return len(self.begin) + len(self.end) + n_texts - 1


FRAMES = {
    "encoder": Frame(begin=("cls",), end=("sep",), pooling="mean"),
    "two_stream": Frame(begin=(), end=("sep", "cls"), pooling="last", apart=1),
    "decoder": Frame(begin=("eos",), end=("eos",), pooling="last", two_sided=False),
}
"""The frame of each trunk that reads labelled texts."""


def frame_of(trunk: str) -> Frame:
    """The frame of a trunk; a plug-in's trunk is read as a decoder is."""
    return FRAMES.get(trunk, FRAMES["decoder"])
