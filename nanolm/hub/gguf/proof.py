"""The proof of a GGUF file's tokenizer: SentencePiece itself, given the file's pieces, makes ids.

Byte-level vocabularies have no such second: the package `tokenizers` makes our ids of the file's
pieces and merges, and transformers' reader of GGUF cuts words otherwise than the model's authors.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.gguf.reading import read_values
from nanolm.hub.gguf.vocabulary import BYTE, KIND
from nanolm.hub.tokenizer_files import Encode, told

BPE = 2
Note = Callable[[str], None]


def told_vocabulary(tokenizer: Tokenizer, path: pathlib.Path, note: Note) -> int | None:
    """Sample texts that get other ids by SentencePiece with the file's pieces, told; None, with the
    reason told, where nothing was compared."""
    values = read_values(path)
    if values.get(KIND) != "llama":
        note(
            "the proof of the tokenizer was left out: the package tokenizers itself makes the ids "
            "of a byte-level vocabulary, and transformers' reader of GGUF cuts words otherwise; "
            "compare with the model's published folder"
        )
        return None
    try:
        encode = by_sentencepiece(values)
    except (ImportError, UserError) as error:
        note(f"the proof of the tokenizer was left out: SentencePiece does not open it ({error})")
        return None
    return told(tokenizer, encode, note, by="SentencePiece, of the file's own pieces,")


def by_sentencepiece(values: Mapping[str, Any]) -> Encode:
    """What encodes texts by the library, from a file's values alone.

    Raises ImportError without protobuf, and UserError for pieces that the library refuses.
    """
    import sentencepiece  # noqa: PLC0415  (protobuf beside it is not always installed)
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415

    messages: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported
    model = messages.ModelProto()
    rows = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*rows, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.byte_fallback = BYTE in values["tokenizer.ggml.token_type"]
    rules = model.normalizer_spec
    rules.add_dummy_prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    rules.remove_extra_whitespaces = values.get("tokenizer.ggml.remove_extra_whitespaces", False)
    rules.escape_whitespaces = True
    table = values.get("tokenizer.ggml.precompiled_charsmap", [])
    rules.precompiled_charsmap = bytes(byte % 256 for byte in table)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.SerializeToString())
    except RuntimeError as error:
        raise UserError((str(error).strip().splitlines() or ["no reason given"])[0]) from error
    return processor.encode
