"""A SentencePiece model written as a Hugging Face `tokenizer.json`, which gives the same ids.

    normalizer    our escapes of a literal ▁ (tokenizer.py), the model's own rules, a space as ▁
    model         BPE: merges in the order of their pieces' scores; Unigram: the scores themselves
    decoder       all of that undone
    specials      control pieces; as everywhere in transformers, their names in a text are read as
                  these unless it is called with split_special_tokens=True

A name in a text that is to stay text may not reach the unigram's table, where control and byte
pieces stand like all others: its first character is cut off (`reserved_names`).

The package `tokenizers` computes a unigram in float64 and SentencePiece in float32, so splittings
that score alike may be chosen differently; BPE differs at most where one piece overlaps itself.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

from nanolm.data.tokenizer import ESCAPE, SPACE, STAND_IN, Tokenizer
from nanolm.errors import UserError

Frame = Callable[[Tokenizer], dict[str, Any] | None]

UNIGRAM, BPE = 1, 2
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6


def sentencepiece_json(tokenizer: Tokenizer, frame: Frame | None = None) -> bytes:
    """The tokenizer.json of a Tokenizer with a SentencePiece model.

    `frame` puts cls and sep around a text, as its trunk reads it (`cls_first`, `cls_last`). Raises
    UserError for a model that is neither BPE nor Unigram, and without the package protobuf.
    """
    model = parsed(tokenizer)
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": normalizers(model, tokenizer.lossless)},
        "pre_tokenizer": None,
        "post_processor": None if frame is None else frame(tokenizer),
        "decoder": {"type": "Sequence", "decoders": decoders(model, tokenizer.lossless)},
        "model": bpe(model) if model.trainer_spec.model_type == BPE else unigram(model),
    }
    if model.trainer_spec.model_type == UNIGRAM:
        described["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": reserved_names(model)},
            "behavior": "Isolated",
            "invert": False,
        }
    return json.dumps(described, ensure_ascii=False).encode()


def parsed(tokenizer: Tokenizer) -> Any:
    """The model's own description of itself."""
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415  (not always installed)
    except ImportError as error:
        raise UserError(
            "a SentencePiece model is written as tokenizer.json with the package protobuf, which "
            "is not installed; install it: pip install protobuf"
        ) from error
    messages: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported
    model = messages.ModelProto()
    model.ParseFromString(tokenizer.model_bytes)
    kind = model.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE):
        raise UserError(
            f"the tokenizer {tokenizer.path} is a SentencePiece model of words or characters, "
            f"which no tokenizer.json describes; train a BPE or unigram one with `nanolm prepare`"
        )
    return model


def added_tokens(model: Any) -> list[dict[str, Any]]:
    """Pieces that are looked for before the model is asked: those of roles, and longer ones that
    a user defined."""
    special = {UNKNOWN, CONTROL}
    return [
        {
            "id": index,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type in special,
        }
        for index, piece in enumerate(model.pieces)
        if piece.type in special or (piece.type == USER_DEFINED and len(piece.piece) > 1)
    ]


def normalizers(model: Any, lossless: bool) -> list[dict[str, Any]]:
    """From a text to what the pieces are looked for in."""
    rules, steps = model.normalizer_spec, []
    if lossless:
        steps += [replaced(ESCAPE, ESCAPE * 2), replaced(STAND_IN, ESCAPE + STAND_IN)]
        steps += [replaced(SPACE, STAND_IN)]
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps += [{"type": "Precompiled", "precompiled_charsmap": charsmap}]
    if rules.remove_extra_whitespaces:
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True}]
        steps += [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if rules.add_dummy_prefix:
        steps += [{"type": "Prepend", "prepend": SPACE}]
    return [*steps, replaced(" ", SPACE)]


def decoders(model: Any, lossless: bool) -> list[dict[str, Any]]:
    """From pieces to a text."""
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}, replaced(SPACE, " ")]
    if lossless:  # an escape is followed by itself or by a stand-in, so by a or b it marks a place
        first, second = ESCAPE + "a", ESCAPE + "b"
        steps += [replaced(ESCAPE * 2, second), replaced(ESCAPE + STAND_IN, first)]
        steps += [replaced(STAND_IN, SPACE), replaced(first, STAND_IN), replaced(second, ESCAPE)]
    if model.normalizer_spec.add_dummy_prefix:
        steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return steps


def replaced(old: str, new: str) -> dict[str, Any]:
    """One replacement, of a normalizer or of a decoder."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def bpe(model: Any) -> dict[str, Any]:
    """Merges: every way to cut a piece in two pieces, those of the best piece first."""
    pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
    ordinary = {piece.piece for piece in model.pieces if piece.type == 1}
    scored = sorted(
        (piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1),
        key=lambda piece: -piece.score,
    )
    merges = [
        [piece.piece[:cut], piece.piece[cut:]]
        for piece in scored
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in ordinary and piece.piece[cut:] in ordinary
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": pieces,
        "merges": merges,
    }


def unigram(model: Any) -> dict[str, Any]:
    """Pieces with their scores; what a user defined is better than anything else of its length."""
    best = max(piece.score for piece in model.pieces if piece.type == 1)
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": [
            [
                piece.piece,
                len(piece.piece.encode()) * best - 0.1
                if piece.type == USER_DEFINED
                else piece.score,
            ]
            for piece in model.pieces
        ],
    }


def reserved_names(model: Any) -> str:
    """A pattern of the first character of a name that no text may be read as."""
    names = [
        piece.piece
        for piece in model.pieces
        if piece.type in (UNKNOWN, CONTROL, UNUSED, BYTE) and len(piece.piece) > 1
    ]
    ordered = sorted(names, key=len, reverse=True)
    return "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in ordered)


def cls_first(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """cls A sep, and cls A sep B sep for two texts; None for a tokenizer without these."""
    return template(tokenizer, "cls:0 A:0 sep:0", "B:1 sep:1")


def cls_last(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A sep cls, and A sep B sep cls for two texts, cls in a segment of its own, as XLNet reads
    them; None for a tokenizer without these."""
    return template(tokenizer, "A:0 sep:0", "B:1 sep:1", end="cls:2")


def end_around(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """eos A eos, and eos A sep B eos for two texts, as a decoder reads what it decides about; two
    texts of a tokenizer without sep, which nothing is trained on, have nothing between them."""
    parted = "sep:0 B:0" if "sep" in tokenizer.roles() else "B:0"
    return template(tokenizer, "eos:0 A:0", parted, end="eos:0")


def template(tokenizer: Tokenizer, first: str, second: str, end: str = "") -> dict[str, Any] | None:
    """What stands around one text and two, each part with its segment; None for a tokenizer that
    lacks one of the roles."""
    roles = tokenizer.roles()
    wanted = {word.split(":")[0] for word in f"{first} {second} {end}".split()} - {"A", "B"}
    if not wanted <= roles.keys():
        return None
    names = {role: tokenizer.piece(roles[role]) for role in sorted(wanted)}

    def part(word: str) -> dict[str, Any]:
        name, segment = word.split(":")
        kind = "SpecialToken" if name in names else "Sequence"
        return {kind: {"id": names.get(name, name), "type_id": int(segment)}}

    known = {
        name: {"id": name, "ids": [roles[role]], "tokens": [name]} for role, name in names.items()
    }
    return {
        "type": "TemplateProcessing",
        "single": [part(word) for word in f"{first} {end}".split()],
        "pair": [part(word) for word in f"{first} {second} {end}".split()],
        "special_tokens": known,
    }
