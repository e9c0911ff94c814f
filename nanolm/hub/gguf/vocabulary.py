"""The vocabulary of a GGUF file as a Tokenizer of ours.

    gpt2    byte-level BPE: pieces, merges, and the name of what cuts a text into words
    llama   SentencePiece's BPE: pieces with scores and kinds, bytes for what has no piece

Either becomes a tokenizer.json, with special pieces by role and the chat template. Ids are those of
the library that the model's authors used; llama.cpp's own rules for names of special pieces in a
text are not imitated: they stay text.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

from nanolm.data.byte_level_json import WORDS, before_every_text, byte_level_json
from nanolm.data.json_pieces import with_roles
from nanolm.data.sentencepiece_json import added_tokens, bpe, decoders, normalizers
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.hub.gguf.reading import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, numbered as in SentencePiece."""
KIND = "tokenizer.ggml.model"
ROLE_KEYS = {
    "pad": "padding",
    "unk": "unknown",
    "bos": "bos",
    "eos": "eos",
    "cls": "cls",
    "sep": "seperator",
    "mask": "mask",
}
"""GGUF's names of our roles; it spells one of them so."""
BEGIN_ANYWAY = ("llama-bpe", "llama3", "llama-v3")
"""Pre-tokenizers whose texts begin with bos where the file says nothing."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a vocabulary, called as SentencePiece calls it."""

    piece: str
    score: float
    type: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """What SentencePiece's description of a model says of its training."""

    unk_id: int
    byte_fallback: bool


@dataclasses.dataclass(frozen=True)
class Rules:
    """What SentencePiece's description of a model says of a text before it is cut."""

    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    precompiled_charsmap: bytes


@dataclasses.dataclass(frozen=True)
class Described:
    """A SentencePiece model's description, as far as a GGUF file has it."""

    pieces: list[Piece]
    trainer_spec: Trained
    normalizer_spec: Rules


def read_vocabulary(file: GgufFile) -> Tokenizer:
    """The file's tokenizer; raises UserError for a kind that is not known, or a damaged one."""
    kind = file.values.get(KIND)
    makers = {"gpt2": byte_level, "llama": sentencepiece}
    if not isinstance(kind, str) or kind not in makers:
        raise UserError(
            f"{file.path} has a tokenizer of the kind {kind!r} ({KIND}); nanolm reads "
            f"{' and '.join(makers)}"
        )
    pieces = without_padding(file, listed(file, "tokens", str))
    twice = [piece for piece, count in Counter(pieces).items() if count > 1]
    require(
        not twice,
        f"{file.path} holds the piece {twice[0] if twice else ''!r} twice in "
        f"tokenizer.ggml.tokens; fetch the file again",
    )
    content = makers[kind](file, pieces)
    roles = {
        role: pieces[index]
        for role, name in ROLE_KEYS.items()
        if (index := one_id(file, f"{name}_token_id", len(pieces))) is not None
    }
    template = file.values.get("tokenizer.chat_template")
    require(
        template is None or isinstance(template, str),
        f"{file.path} gives tokenizer.chat_template as something else than a text; fetch the file "
        f"again",
    )
    return Tokenizer(with_roles(content, roles, template), file.path)


def byte_level(file: GgufFile, pieces: list[str]) -> bytes:
    """The tokenizer.json of byte-level BPE."""
    name = file.values.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in WORDS:
        raise UserError(
            f"{file.path} cuts words by the pre-tokenizer {name!r} (tokenizer.ggml.pre), and "
            f"nanolm knows {', '.join(WORDS)}; import the model's published folder instead"
        )
    known = set(pieces)
    merges = []
    for line in listed(file, "merges", str):
        first, _, second = line.partition(" ")
        require(
            first in known and second in known and first + second in known,
            f"{file.path} merges {line!r}, which are no pieces of it; fetch the file again",
        )
        merges.append((first, second))
    kinds = piece_kinds(file)[: len(pieces)]
    return byte_level_json(
        pieces,
        merges,
        WORDS[name],
        special=[index for index, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL, UNUSED)],
        looked_for=[index for index, kind in enumerate(kinds) if kind == USER_DEFINED],
        begins_with=first_id(file, len(pieces), usual=name in BEGIN_ANYWAY),
    )


def sentencepiece(file: GgufFile, pieces: list[str]) -> bytes:
    """The tokenizer.json of a SentencePiece BPE model."""
    every, scores = listed(file, "tokens", str), listed(file, "scores", float)
    kinds = piece_kinds(file)[: len(pieces)]
    require(
        len(scores) == len(every),
        f"{file.path} has {len(every)} pieces and {len(scores)} scores; fetch the file again",
    )
    scores = scores[: len(pieces)]
    unknown = one_id(file, "unknown_token_id", len(pieces))
    model = Described(
        [Piece(*row) for row in zip(pieces, scores, kinds, strict=True)],
        Trained(0 if unknown is None else unknown, BYTE in kinds),
        Rules(
            flag(file, "add_space_prefix", usual=True),
            flag(file, "remove_extra_whitespaces", usual=False),
            charsmap(file),
        ),
    )
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": normalizers(model, lossless=False)},
        "pre_tokenizer": None,
        "post_processor": before_every_text(first_id(file, len(pieces), usual=True), pieces),
        "decoder": {"type": "Sequence", "decoders": decoders(model, lossless=False)},
        "model": bpe(model),
    }
    return json.dumps(described, ensure_ascii=False).encode()


def listed(file: GgufFile, key: str, kind: type) -> list[Any]:
    """A list of the vocabulary; raises UserError where there is none."""
    value = file.values.get(f"tokenizer.ggml.{key}")
    good = isinstance(value, list) and all(isinstance(each, kind) for each in value)
    require(good and bool(value), f"{file.path} has no list tokenizer.ggml.{key}; fetch it again")
    return list(value or [])


def without_padding(file: GgufFile, pieces: list[str]) -> list[str]:
    """The pieces up to the last that is used: those behind it fill up an embedding's rows."""
    kinds = piece_kinds(file)
    return pieces[: max((n for n, kind in enumerate(kinds, 1) if kind != UNUSED), default=0)]


def piece_kinds(file: GgufFile) -> list[int]:
    """The kind of each piece."""
    kinds, size = listed(file, "token_type", int), len(listed(file, "tokens", str))
    require(
        len(kinds) == size,
        f"{file.path} has {size} pieces and {len(kinds)} kinds of them; fetch the file again",
    )
    return kinds


def one_id(file: GgufFile, key: str, size: int) -> int | None:
    """An id that the file gives, None where it gives none; raises UserError for no piece's."""
    value = file.values.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    require(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size,
        f"{file.path} gives tokenizer.ggml.{key} as {value!r}, and it has {size} pieces; fetch "
        f"the file again",
    )
    return int(value)


def first_id(file: GgufFile, size: int, *, usual: bool) -> int | None:
    """The id that stands before every text, if any does."""
    return one_id(file, "bos_token_id", size) if flag(file, "add_bos_token", usual=usual) else None


def flag(file: GgufFile, key: str, *, usual: bool) -> bool:
    """Yes or no."""
    value = file.values.get(f"tokenizer.ggml.{key}", usual)
    require(
        isinstance(value, bool),
        f"{file.path} gives tokenizer.ggml.{key} as {value!r}; it must be true or false",
    )
    return bool(value)


def charsmap(file: GgufFile) -> bytes:
    """SentencePiece's table of replaced characters, if the file has one."""
    value = file.values.get("tokenizer.ggml.precompiled_charsmap", [])
    good = isinstance(value, list) and all(isinstance(each, int) for each in value)
    require(good, f"{file.path} has a damaged tokenizer.ggml.precompiled_charsmap; fetch it again")
    return bytes(each % 256 for each in value)
