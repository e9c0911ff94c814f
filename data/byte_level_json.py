"""Byte-level BPE (Radford et al. 2019) written as a Hugging Face `tokenizer.json`.

    pre-tokenizer   cuts a text into words, then spells their bytes as characters
    model           merges inside a word, the earliest of the list first
    decoder         characters back to bytes

Vocabularies of other formats, such as GGUF, hold pieces and merges, and of the
cutting at most a name. `WORDS` says what these names mean, as the tokenizers' authors published it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AROUND = r"[^\r\n\p{L}\p{N}]?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = rf"{ENGLISH}|{AROUND}\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{ENGLISH}|{AROUND}\p{{L}}+|\p{{N}}|{REST}"

Step = dict[str, Any]
BYTES: Step = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


@dataclasses.dataclass(frozen=True)
class Words:
    """How a text is cut into the words inside which pieces are merged."""

    steps: tuple[Step, ...]
    """Steps of the pre-tokenizer, the last of which spells bytes as characters."""
    whole_pieces: bool = False
    """Whether a word that is a piece is taken whole, whatever the merges make of it."""
    normal_form: str | None = None
    """The Unicode normal form that a text is brought to first."""


def by_pattern(
    pattern: str, *, whole_pieces: bool = False, normal_form: str | None = None
) -> Words:
    """Words are the matches of a pattern."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return Words((split, BYTES), whole_pieces, normal_form)


GPT2_WORDS = Words((BYTES | {"use_regex": True},))
SINGLE_DIGITS = Words(({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}))
WORDS: dict[str, Words] = {
    "gpt-2": GPT2_WORDS,
    "phi-2": GPT2_WORDS,
    "smollm": SINGLE_DIGITS,
    "starcoder": SINGLE_DIGITS,
    "refact": SINGLE_DIGITS,
    "llama-bpe": by_pattern(CL100K, whole_pieces=True),
    "llama3": by_pattern(CL100K, whole_pieces=True),
    "llama-v3": by_pattern(CL100K, whole_pieces=True),
    "qwen2": by_pattern(QWEN2, normal_form="NFC"),
}
"""Pre-tokenizers by the names that llama.cpp gives them."""


def byte_level_json(
    pieces: Sequence[str],
    merges: Iterable[tuple[str, str]],
    words: Words,
    *,
    special: Iterable[int] = (),
    looked_for: Iterable[int] = (),
    begins_with: int | None = None,
) -> bytes:
    """The tokenizer.json of a vocabulary: id i is pieces[i], bytes spelt as characters.

    `special` pieces stand for no text, `looked_for` ones are found in a text before it is cut, and
    the piece `begins_with` stands before every text.
    """
    special = set(special)
    added = [
        added_token(index, pieces[index], special=index in special)
        for index in sorted({*special, *looked_for})
    ]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if words.normal_form is None else {"type": words.normal_form},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(words.steps)},
        "post_processor": before_every_text(begins_with, pieces),
        "decoder": BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words.whole_pieces,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()


def added_token(index: int, piece: str, *, special: bool) -> dict[str, Any]:
    """One piece that the model itself does not make."""
    return {
        "id": index,
        "content": piece,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def before_every_text(index: int | None, pieces: Sequence[str]) -> dict[str, Any] | None:
    """The post-processor that puts one special piece before a text; None for no piece."""
    if index is None:
        return None
    name = pieces[index]
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    one, two = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, two],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }
