"""Words of a user's table, found whole among token ids: synonyms, or words that mean the opposite.

A line of the file holds a word and those that may take its place, separated by tabs. A word may be
several tokens and may hold spaces; the longest match wins, and a word inside another one is none.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import require

Entries = dict[tuple[int, ...], list[list[int]]]


class WordTable:
    """{token ids of a word: those of what may take its place}, with and without a space before."""

    def __init__(self, entries: Entries, tokenizer: Tokenizer) -> None:
        self.entries, self.tokenizer = entries, tokenizer
        self.longest = max(map(len, entries))

    @classmethod
    def synonyms(cls, path: str, tokenizer: Tokenizer) -> WordTable:
        """The table as it is written: the first word of a line may be replaced by the others."""
        entries: Entries = {}
        for word, *others in read_lines(path, "augment.synonyms"):
            add(entries, tokenizer, word, others)
        return cls(entries, tokenizer)

    @classmethod
    def opposites(cls, path: str, tokenizer: Tokenizer) -> WordTable:
        """Both ways, since opposites are mutual, and also at the beginning of a sentence."""
        entries: Entries = {}
        for word, *others in read_lines(path, "augment.opposites"):
            for one, another in ((word, other) for other in others):
                for form in (str, str.capitalize):
                    add(entries, tokenizer, form(one), [form(another)])
                    add(entries, tokenizer, form(another), [form(one)])
        return cls(entries, tokenizer)

    def matches(self, ids: list[int]) -> Iterator[tuple[int, int]]:
        """(begin, end) of the words of the table in ids, from left to right, none overlapping."""
        at = 0
        while at < len(ids):
            ends = range(min(at + self.longest, len(ids)), at, -1)
            whole = (end for end in ends if self.stands_alone(ids, at, end))
            end = next((end for end in whole if tuple(ids[at:end]) in self.entries), None)
            if end is None:
                at += 1
            else:
                yield at, end
                at = end

    def stands_alone(self, ids: list[int], begin: int, end: int) -> bool:
        """Whether no word reaches over either edge of ids[begin:end]."""
        left, right = self.tokenizer.joins_left, self.tokenizer.joins_right
        edges = [at for at in (begin, end) if 0 < at < len(ids)]
        return not any(left[ids[at]] and right[ids[at - 1]] for at in edges)


def add(entries: Entries, tokenizer: Tokenizer, word: str, others: list[str]) -> None:
    """Enters a word, inside a text and at its beginning."""
    for space in ("", " "):
        found = entries.setdefault(tuple(tokenizer.encode(space + word).tolist()), [])
        encoded = [tokenizer.encode(space + other).tolist() for other in others]
        found += [ids for ids in encoded if ids not in found]


def read_lines(path: str, key: str) -> list[list[str]]:
    """The words of each line; raises UserError naming the file and line that is none."""
    file = pathlib.Path(path)
    require(file.is_file(), f"{key}: there is no file {path}")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = [part.strip() for part in line.split("\t")]
        if line.strip():
            require(
                len(words) >= 2 and all(words),
                f"{path} line {number} is not a word and what may take its place, separated by "
                f"tabs",
            )
            found.append(words)
    require(bool(found), f"{key}: {path} holds no words")
    return found
