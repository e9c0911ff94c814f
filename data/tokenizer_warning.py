"""A tokenizer for a command, which is warned of one that does not give texts back as they were."""

from __future__ import annotations

import os
import pathlib
import sys

from nanolm.data.tokenizer import SPACE, Tokenizer

WARNED_OF: set[str] = set()
"""Hashes of the tokenizers of which this process has said that they lose spaces."""


def load_with_warning(path: str | pathlib.Path) -> Tokenizer:
    """`Tokenizer.load`, and once a process, on the first rank alone, a sentence on the standard
    error where the tokenizer loses spaces."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.hash not in WARNED_OF and loses_spaces(tokenizer):
        WARNED_OF.add(tokenizer.hash)
        if os.environ.get("RANK", "0") == "0":  # torchrun's; data/ knows of no ranks otherwise
            print(
                f"nanolm: the tokenizer {tokenizer.path} gives spaces back as {SPACE}, since it "
                f"was trained on text without any; prepare the texts anew without --tokenizer, "
                f"with this version (nanolm prepare TEXTS --out FOLDER), and train on that",
                file=sys.stderr,
                flush=True,
            )
    return tokenizer


def loses_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a space comes back as ▁: a SentencePiece model that was trained on text without
    spaces has no piece for one, and writes the three bytes of ▁."""
    return tokenizer.decode(tokenizer.encode(" ")) == SPACE
