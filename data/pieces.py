"""What each piece of a vocabulary is worth in text: its bytes, and whether it continues a word.

Whole-word masking, spans, bits per byte and the places of tokens in a text ask these arrays, and
never a tokenizer's own conventions (▁, ##, byte pieces).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container

import numpy as np
import sentencepiece

from nanolm.data.json_pieces import JsonPieces
from nanolm.data.words import byte_joins_word, is_joined, joins_word


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Arrays over a vocabulary of V pieces.

    special_mask, joins_left, joins_right: bool[V]; byte_length: int32[V], the UTF-8 bytes of text
    that a piece stands for (a literal U+F4A1 or U+F4A2 counts double). Token i continues the word
    of token i - 1 iff `joins_left[i] and joins_right[i - 1]`; a character that is spelt in byte
    pieces is never split.
    """

    special_mask: np.ndarray
    byte_length: np.ndarray
    joins_left: np.ndarray
    joins_right: np.ndarray

    @classmethod
    def blank(cls, size: int) -> Pieces:
        """Of pieces that nothing is known of yet."""
        joins_left, joins_right = np.zeros(size, bool), np.zeros(size, bool)
        return cls(np.zeros(size, bool), np.zeros(size, np.int32), joins_left, joins_right)


def model_pieces(
    processor: sentencepiece.SentencePieceProcessor, reserved: Container[int], space: str
) -> Pieces:
    """Of a SentencePiece model, which writes a space as `space`; reserved: ids that no text has,
    beside those that the model names so itself."""
    found = Pieces.blank(processor.get_piece_size())
    for index in range(processor.get_piece_size()):
        if (
            index in reserved
            or processor.is_control(index)
            or processor.is_unknown(index)
            or processor.is_unused(index)
        ):
            found.special_mask[index] = True
        elif processor.is_byte(index):
            found.byte_length[index] = 1
            byte = int(processor.id_to_piece(index)[1:-1], 16)  # "<0xE4>"
            found.joins_left[index] = byte_joins_word(byte)
            found.joins_right[index] = byte >= 0x80 or is_joined(chr(byte))
        elif text := processor.id_to_piece(index).replace(space, " "):
            found.byte_length[index] = len(text.encode())
            found.joins_left[index] = joins_word(text[0])
            found.joins_right[index] = is_joined(text[-1])
    return found


def json_pieces(pieces: JsonPieces, size: int, reserved: Container[int]) -> Pieces:
    """Of a tokenizer.json of `size` pieces; reserved: ids that no text has, beside those that it
    names so itself."""
    found = Pieces.blank(size)
    for index in range(size):
        if index in reserved or pieces.is_special(index):
            found.special_mask[index] = True
        elif content := pieces.text_of(index):
            found.byte_length[index] = len(content)
            text = content.decode(errors="replace")
            first, last = text[0] != "\ufffd", text[-1] != "\ufffd"
            if pieces.word_pieces:
                found.joins_left[index] = pieces.continues_word(index)
                found.joins_right[index] = True
            else:
                found.joins_left[index] = (
                    joins_word(text[0]) if first else byte_joins_word(content[0])
                )
                found.joins_right[index] = is_joined(text[-1]) if last else True
    return found
