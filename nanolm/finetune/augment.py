"""Augmentation of labelled examples: noise that keeps the label (Wei & Zou 2019; Xie et al. 2020),
and counterfactuals, whose label is the other one (Kaushik et al. 2020).

    record -> item -> Augmented.example: one word of the first text
        opposites  a word of the user's table, replaced, and the answer turned
    then each segment of each sequence, its special tokens apart
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

import numpy as np

from nanolm.data.tables.stream import TaskRow
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require
from nanolm.finetune.config import AugmentConfig
from nanolm.finetune.tasks.base import Task
from nanolm.finetune.tasks.items import Item, Sequence
from nanolm.finetune.word_table import WordTable
from nanolm.objectives.base import Draw


class Augmented:
    """What a task gives the loader, its examples augmented (`RowObjective`)."""

    def __init__(self, task: Task, config: AugmentConfig, tokenizer: Tokenizer) -> None:
        name = task.options.name
        require(
            not task.generates,
            f"augment cannot go with objective={name}, whose answers are its tokens",
        )
        require(
            task.movable or not config.moves,
            f"objective={name} has targets at single tokens, which augment.dropout, swap, synonyms "
            f"and opposites would move; use augment.mask",
        )
        require(
            config.mask == 0 or "mask" in tokenizer.roles(),
            "augment.mask needs a tokenizer with a mask token, and this one has none",
        )
        self.task, self.config, self.tokenizer = task, config, tokenizer
        require(
            config.opposites is None or task.has_counterfactual,
            f"augment.opposites turns an answer into the other one: it needs a choice between two "
            f"candidates or objective=classify with two labels, not objective={name}",
        )
        self.synonyms: WordTable | None = None
        self.opposites: WordTable | None = None
        if config.synonyms:
            self.synonyms = WordTable.synonyms(config.synonyms, tokenizer)
        if config.opposites:
            self.opposites = WordTable.opposites(config.opposites, tokenizer)

    def collate(self, examples: list[Item]) -> dict[str, np.ndarray]:
        """The task's own."""
        return self.task.collate(examples)

    def counts(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """The task's own."""
        return self.task.counts(batch)

    def example(self, row: TaskRow, rng: np.random.Generator, draw: Draw) -> Item:
        """The task's item, perhaps turned, with noise in its sequences."""
        item = self.task.example(row, rng, draw)
        if self.opposites and rng.random() < self.config.opposite_rate:
            item = self.counterfactual(self.opposites, item, rng)
        return dataclasses.replace(
            item, sequences=[self.sequence(sequence, rng) for sequence in item.sequences]
        )

    def sequence(self, sequence: Sequence, rng: np.random.Generator) -> Sequence:
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
        if self.synonyms:
            words = self.replace_words(self.synonyms, words, rng, room)
        if config.dropout > 0:
            words = leave_out(words, config.dropout, rng)
        if config.swap > 0:
            words = swap(words, config.swap, rng)
        if config.mask > 0:
            hidden = (rng.random(len(words)) < config.mask) & ~self.tokenizer.special_mask[words]
            words = np.where(hidden, self.tokenizer.role("mask"), words)
        return np.concatenate([tokens_T[:begin], words, tokens_T[end:]])

    def replace_words(
        self, table: WordTable, tokens_T: np.ndarray, rng: np.random.Generator, room: int
    ) -> np.ndarray:
        """Words of the table replaced, each with its probability; longest match first."""
        ids, done, out = tokens_T.tolist(), 0, []
        for begin, end in table.matches(ids):
            new = ids[begin:end]
            if rng.random() < self.config.synonym_rate:
                others = table.entries[tuple(new)]
                other = others[rng.integers(len(others))]
                if len(other) - len(new) <= room:
                    room -= len(other) - len(new)
                    new = other
            out += ids[done:begin] + new
            done = end
        return np.array(out + ids[done:], dtype=tokens_T.dtype)

    def counterfactual(self, table: WordTable, item: Item, rng: np.random.Generator) -> Item:
        """The item with one word of its first text replaced by an opposite, and the other answer;
        as it is where no word has one or the result would be too long. The first text stands in the
        first sequence and in all that hold two."""
        first = item.sequences[0].tokens[: item.sequences[0].second]
        holds = [i == 0 or s.second < len(s.tokens) for i, s in enumerate(item.sequences)]
        shared = all(
            np.array_equal(s.tokens[: s.second], first)
            for s, held in zip(item.sequences, holds, strict=True)
            if held
        )
        target, ids = self.task.counterfactual_target(item), first.tolist()
        places = list(table.matches(ids))
        if target is None or not shared or not places:
            return item
        begin, end = places[rng.integers(len(places))]
        others = table.entries[tuple(ids[begin:end])]
        other = others[rng.integers(len(others))]
        longest = max(len(sequence.tokens) for sequence in item.sequences)
        if longest + len(other) - (end - begin) > self.task.length:
            return item
        first = np.array(ids[:begin] + other + ids[end:], dtype=first.dtype)
        sequences = [
            begin_with(first, s) if held else s
            for s, held in zip(item.sequences, holds, strict=True)
        ]
        return dataclasses.replace(item, sequences=sequences, target=target)


def begin_with(first: np.ndarray, sequence: Sequence) -> Sequence:
    """The sequence with another first segment."""
    tokens = np.concatenate([first, sequence.tokens[sequence.second :]])
    return dataclasses.replace(sequence, tokens=tokens, second=len(first))


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
