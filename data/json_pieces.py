"""The pieces of a Hugging Face `tokenizer.json`, asked as SentencePiece's processor is.

Byte-level BPE, WordPiece, and pieces with ▁ for a space; the `tokenizers` package does the work, so
ids are those of the model's authors. Text that looks like a special piece stays text.

tokenizer.json itself does not say which piece plays which role, nor how a dialogue is written.
`with_roles` adds what the files beside it say, under keys of its own, and `published` takes them
out again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanolm.errors import UserError

JSON_FILE = "tokenizer.json"
ROLES_KEY, TEMPLATE_KEY = "nanolm_roles", "nanolm_chat_template"
CONTINUES = "##"


def is_json(content: bytes) -> bool:
    """Whether a tokenizer's file is a tokenizer.json."""
    return content.lstrip()[:1] == b"{"


def with_roles(content: bytes, roles: Mapping[str, str], template: str | None = None) -> bytes:
    """A tokenizer.json that also says which pieces play which roles, and has a chat template."""
    more: dict[str, Any] = {ROLES_KEY: dict(roles)}
    if template is not None:
        more[TEMPLATE_KEY] = template
    return json.dumps({**json.loads(content), **more}, ensure_ascii=False).encode()


def published(content: bytes) -> bytes:
    """A tokenizer.json as others read it."""
    parsed = json.loads(content)
    for key in (ROLES_KEY, TEMPLATE_KEY):
        parsed.pop(key, None)
    return json.dumps(parsed, ensure_ascii=False).encode()


class JsonPieces:
    """A tokenizer.json behind the methods of a SentencePieceProcessor that `Tokenizer` calls.

    Raises UserError when the file is none, or the package that reads it is not installed.
    """

    def __init__(self, content: bytes, path: str = "") -> None:
        try:
            import tokenizers  # noqa: PLC0415  (only who has such a model needs it)
        except ImportError as error:
            raise UserError(
                f"{path or 'the tokenizer'} is a tokenizer.json, which the package tokenizers "
                f"reads; install it: pip install tokenizers"
            ) from error
        try:
            parsed: dict[str, Any] = json.loads(content)
            self.roles: dict[str, str] = parsed.pop(ROLES_KEY, {})
            self.chat_template: str | None = parsed.pop(TEMPLATE_KEY, None)
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        except Exception as error:
            raise UserError(
                f"{path or 'the tokenizer'} is no tokenizer.json that the package tokenizers "
                f"{tokenizers.__version__} reads ({error}); give a whole one"
            ) from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self._ids = self._inner.get_vocab(with_added_tokens=True)
        self._pieces = {index: piece for piece, index in self._ids.items()}
        self._special = {
            int(token["id"]) for token in parsed.get("added_tokens") or [] if token["special"]
        }
        steps = json.dumps([parsed.get("pre_tokenizer"), parsed.get("decoder")])
        self.byte_level = '"ByteLevel"' in steps
        self.word_pieces = parsed["model"].get("type") == "WordPiece"
        self._unknown = parsed["model"].get("unk_token")

    def get_piece_size(self) -> int:
        """One more than the highest id."""
        return max(self._ids.values()) + 1

    def encode(self, texts: list[str] | str, **_: Any) -> Any:
        """The ids of a text, or of each text of a list, int32, without special pieces."""
        if isinstance(texts, str):
            return np.array(self._inner.encode(texts, add_special_tokens=False).ids, np.int32)
        found = self._inner.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters [begin, end) of the text that each of its pieces stands for."""
        return self._inner.encode(text, add_special_tokens=False).offsets

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._inner.decode(ids, skip_special_tokens=False)

    def id_to_piece(self, index: int) -> str:
        """The piece as the file writes it; an id without one has an empty piece."""
        return self._pieces.get(index, "")

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece; that of no piece is -1."""
        return self._ids.get(piece, -1)

    def is_special(self, index: int) -> bool:
        """Whether a piece stands for no text."""
        piece = self._pieces.get(index)
        return piece is None or index in self._special or piece == self._unknown

    def opening(self) -> list[int]:
        """The special pieces that the file itself puts before a text."""
        found = self._inner.encode("a", add_special_tokens=True)
        masked = found.special_tokens_mask
        return found.ids[: masked.index(0)] if 0 in masked else []

    def between(self) -> list[int]:
        """The special pieces that the file itself puts between two texts."""
        found = self._inner.encode("a", "b", add_special_tokens=True)
        texts = found.sequence_ids
        if 0 not in texts or 1 not in texts:
            return []
        return found.ids[len(texts) - texts[::-1].index(0) : texts.index(1)]

    def around(self, n_texts: int) -> list[list[int]]:
        """The special pieces that the file itself puts before one text or two, between them, and
        behind; raises KeyError where the letters that ask for it are no pieces."""
        second = "b" if n_texts == 2 else None
        found = self._inner.encode("a", second, add_special_tokens=True)
        parts: list[list[int]] = [[]]
        for number, text in zip(found.ids, found.sequence_ids, strict=True):
            if text is None:
                parts[-1].append(number)
            elif text == len(parts) - 1:
                parts.append([])
        if len(parts) != n_texts + 1:
            raise KeyError("ab"[len(parts) - 1])
        return parts

    def text_of(self, index: int) -> bytes:
        """The bytes of text that an ordinary piece stands for; a space that WordPiece drops does
        not count."""
        piece = self._pieces[index]
        if self.byte_level:
            table = byte_alphabet()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
        if self.word_pieces:
            return piece.removeprefix(CONTINUES).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode()

    def continues_word(self, index: int) -> bool:
        """Whether WordPiece marks the piece as one inside a word."""
        return self._pieces[index].startswith(CONTINUES)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """character -> byte of byte-level BPE (Radford et al. 2019): printable bytes stand for
    themselves, the others for the characters from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }
