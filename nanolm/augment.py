"""Augmentation of labelled examples: noise that keeps the label (Wei & Zou 2019; Xie et al. 2020).

    record -> item -> Augmented.example: each segment of each sequence, its special tokens apart
        synonyms   words of the user's table, replaced            (changes lengths)
        dropout    tokens left out                                 (changes lengths)
        swap       pairs of tokens exchanged
        mask       tokens replaced by <mask>                       (keeps every token's place)

Only the training rows pass through here. All randomness comes from the generator that the loader
keys by (seed, epoch, row id), so workers, ranks and resumes change nothing. Tasks whose targets
point at tokens (tag, read, prompt) can only have what keeps every token's place. Numpy only.

Shapes: T tokens of a segment.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.task_config import AugmentConfig


class Augmented:
    """A task whose examples are augmented; everything else is the task's own."""

    def __init__(self, task: Any, config: AugmentConfig, tokenizer: Tokenizer) -> None:
        name = task.options.name
        require(
            not task.generates,
            f"augment cannot go with objective={name}, whose answers are its tokens",
        )
        require(
            config.mask == 0 or "mask" in tokenizer.roles(),
            "augment.mask needs a tokenizer with a mask token, and this one has none",
        )
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self.table = read_synonyms(config.synonyms, tokenizer) if config.synonyms else {}

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # asked for by copies in worker processes, before there is one
            raise AttributeError(name)
        return getattr(self.task, name)

    def example(self, row: Any, rng: np.random.Generator, draw: Any) -> Any:
        """The task's item with noise in its sequences."""
        item = self.task.example(row, rng, draw)
        require(
            item.extra is None or not self.config.moves,
            f"objective={self.task.options.name} has targets at single tokens, which "
            f"augment.dropout, swap and synonyms would move; use augment.mask",
        )
        return dataclasses.replace(
            item, sequences=[self.sequence(sequence, rng) for sequence in item.sequences]
        )

    def sequence(self, sequence: Any, rng: np.random.Generator) -> Any:
        """A framed sequence with noise in each of its two segments."""
        room = self.task.length - len(sequence.tokens)
        halves = np.split(sequence.tokens, [sequence.second])
        first = self.segment(halves[0], rng, room)
        second = self.segment(halves[1], rng, room - max(0, len(first) - len(halves[0])))
        return dataclasses.replace(
            sequence, tokens=np.concatenate([first, second]), second=len(first)
        )

    def segment(self, tokens_T: np.ndarray, rng: np.random.Generator, room: int) -> np.ndarray:
        """The tokens between special ones with noise, `room` tokens longer at most."""
        config, special = self.config, self.tokenizer.special_mask[tokens_T]
        inner = np.flatnonzero(~special)
        if len(inner) == 0:
            return tokens_T
        begin, end = inner[0], inner[-1] + 1
        words = tokens_T[begin:end]
        if self.table:
            words = self.replace_words(words, rng, room)
        if config.dropout > 0:
            words = leave_out(words, config.dropout, rng)
        if config.swap > 0:
            words = swap(words, config.swap, rng)
        if config.mask > 0:
            hidden = (rng.random(len(words)) < config.mask) & ~self.tokenizer.special_mask[words]
            words = np.where(hidden, self.tokenizer.role("mask"), words)
        return np.concatenate([tokens_T[:begin], words, tokens_T[end:]])

    def replace_words(
        self, tokens_T: np.ndarray, rng: np.random.Generator, room: int
    ) -> np.ndarray:
        """Words of the table replaced, each with its probability; longest match first."""
        ids, at, out = tokens_T.tolist(), 0, []
        longest = max(map(len, self.table))
        while at < len(ids):
            lengths = range(min(longest, len(ids) - at), 0, -1)
            found = (n for n in lengths if self.stands_alone(ids, at, at + n))
            length = next((n for n in found if tuple(ids[at : at + n]) in self.table), 0)
            new = ids[at : at + max(length, 1)]
            if length and rng.random() < self.config.synonym_rate:
                others = self.table[tuple(new)]
                other = others[rng.integers(len(others))]
                if len(other) - length <= room:
                    room -= len(other) - length
                    new = other
            out += new
            at += max(length, 1)
        return np.array(out, dtype=tokens_T.dtype)

    def stands_alone(self, ids: list[int], begin: int, end: int) -> bool:
        """Whether no word reaches over either edge of ids[begin:end]."""
        left, right = self.tokenizer.joins_left, self.tokenizer.joins_right
        edges = [at for at in (begin, end) if 0 < at < len(ids)]
        return not any(left[ids[at]] and right[ids[at - 1]] for at in edges)


def leave_out(tokens_T: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Each token is left out with this probability; if all would be, one of them stays."""
    kept = rng.random(len(tokens_T)) >= share
    if not kept.any():
        kept[rng.integers(len(tokens_T))] = True
    return tokens_T[kept]


def swap(tokens_T: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """About this share of the tokens trade places, two and two, anywhere in the segment."""
    count = int(rng.binomial(len(tokens_T), share)) // 2 * 2
    places = rng.permutation(len(tokens_T))[:count]
    swapped = tokens_T.copy()
    swapped[places] = tokens_T[np.concatenate([places[count // 2 :], places[: count // 2]])]
    return swapped


def read_synonyms(path: str, tokenizer: Tokenizer) -> dict[tuple[int, ...], list[list[int]]]:
    """{token ids of a word: those of its synonyms}, with and without a space before them.

    Raises UserError naming the file and line that is no word with its synonyms.
    """
    file = pathlib.Path(path)
    require(file.is_file(), f"augment.synonyms: there is no file {path}")
    table: dict[tuple[int, ...], list[list[int]]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        word, *others = (part.strip() for part in line.split("\t"))
        if not line.strip():
            continue
        require(
            bool(word) and bool(others) and all(others),
            f"{path} line {number} is not a word and its synonyms, separated by tabs",
        )
        for space in ("", " "):
            ids = tuple(tokenizer.encode(space + word).tolist())
            found = table.setdefault(ids, [])
            found += [tokenizer.encode(space + other).tolist() for other in others]
    require(bool(table), f"augment.synonyms: {path} holds no words")
    return table
