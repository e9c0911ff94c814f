"""Tokenizer: text to token ids and back, byte for byte, on a SentencePiece model; or on a
tokenizer.json, which came with a published model.

A batch's journey begins here: `prepare` encodes every document once, training reads only ids, and
generation decodes them. SentencePiece keeps a space as U+2581 (▁) inside its pieces, so a ▁ that
stands in a text would come back as a space. Two private-use characters make the code reversible:

    ▁ -> A        A -> BA        B -> BB        (A = U+F4A1, B = U+F4A2)

Roles (pad, mask, …) are control pieces: no text can produce them, `<mask>` in a corpus is plain
text. A model trained elsewhere is taken as it is; its roles are found by the names of its pieces.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import pathlib
import re
from typing import cast

import numpy as np
import sentencepiece

from nanolm.data.json_pieces import JSON_FILE, JsonPieces, is_json
from nanolm.data.object_store import ObjectStore, is_remote
from nanolm.data.pieces import Pieces, json_pieces, model_pieces
from nanolm.data.rank_files import json_of_ranks, named_rank_file
from nanolm.errors import UserError

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
STAND_IN, ESCAPE = "\uf4a1", "\uf4a2"

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
ROLE_PIECES = {role: f"<{role}>" for role in ROLES}
EXTRA_TOKENS = 32
"""Extra pieces of a tokenizer that is trained here, unless told otherwise."""
EXTRA_PIECES = ("<extra_{}>", "<extra_id_{}>")
"""What they are called here and by T5's tokenizers."""
# What other people's models call the same roles.
FOREIGN_PIECES = {
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|endoftext|>"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}
BATCH = 64
"""Texts from which SentencePiece is given a list: it starts a thread for each list, which costs as
much as 60 short texts, and far more where all cores are busy."""
PROBE = "  \uff21\ufb01\tx \n\u4e00"


def escape(text: str) -> str:
    """The reversible form of `text` that holds no literal ▁."""
    if ESCAPE in text:
        text = text.replace(ESCAPE, ESCAPE + ESCAPE)
    if STAND_IN in text:
        text = text.replace(STAND_IN, ESCAPE + STAND_IN)
    return text.replace(SPACE, STAND_IN) if SPACE in text else text


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    if STAND_IN not in text and ESCAPE not in text:
        return text
    return re.sub(
        f"{ESCAPE}([{STAND_IN}{ESCAPE}])|{STAND_IN}", lambda match: match[1] or SPACE, text
    )


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Tokenizer:
    """A SentencePiece model or tokenizer.json, its roles, and what each piece is worth in text.

    special_mask, joins_left, joins_right: bool[V]; byte_length: int32[V]: as `Pieces` says of them.
    separators: how many sep pieces stand between the two texts of a pair, as
    many as a tokenizer.json puts there itself, two for RoBERTa (Liu et al. 2019b, in their code);
    else one.
    """

    def __init__(self, model_bytes: bytes, path: str = "") -> None:
        self.model_bytes = model_bytes
        self.path = path
        self.hash = hashlib.sha256(model_bytes).hexdigest()
        self._json = JsonPieces(model_bytes, path) if is_json(model_bytes) else None
        self.file_name = MODEL_FILE if self._json is None else JSON_FILE
        self._processor = self._json or opened_model(model_bytes, path)
        self.vocab_size = self._processor.get_piece_size()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.lossless = (
            self._processor.decode(list(map(int, self._processor.encode(PROBE)))) == PROBE
        )
        self._roles = {role: self._find_role(role) for role in ROLES}
        if self._json is not None and self._roles["eos"] is None:
            self._roles["eos"] = self._roles["sep"]  # what ends BERT's texts
        self.separators = self._count_separators()
        self.extra_ids = self._find_extra_ids()
        pieces = self._describe_pieces()
        self.special_mask, self.byte_length = pieces.special_mask, pieces.byte_length
        self.joins_left, self.joins_right = pieces.joins_left, pieces.joins_right

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Tokenizer:
        """Open a `.model` file, a rank file, or the tokenizer of a prepared directory (a folder or
        s3://…).

        A rank file becomes a tokenizer.json (`rank_files`). In a folder a tokenizer.model comes
        before a tokenizer.json. Raises UserError when there is none or it cannot be read as one.
        """
        if is_remote(path):
            return cls(ObjectStore(str(path)).read_all(MODEL_FILE), f"{path}/{MODEL_FILE}")
        encoding, file = named_rank_file(path) or (None, pathlib.Path(path))
        if encoding is None and file.is_dir():
            other = file / JSON_FILE
            file = file / MODEL_FILE
            file = other if other.is_file() and not file.is_file() else file
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer {file} ({error.strerror}); "
                f"give a .model file or a directory written by `nanolm prepare`"
            ) from error
        if encoding is not None:
            content = json_of_ranks(content, encoding, str(file))
        return cls(content, str(file))

    def __reduce__(self) -> tuple:
        return (Tokenizer, (self.model_bytes, self.path))

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: [n] uint16 (uint32 when V > 65536), without special pieces."""
        return self.encode_batch([text])[0]

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids as `encode`, begins, ends): the UTF-8 bytes [begin, end) of the text that each token
        stands for, int64[n]. What no token stands for (spaces beside WordPiece) lies between them.

        Raises UserError where the tokenizer changes the text and does not say where (`can_place`).
        """
        ids = self.encode(text)
        return ids, *self.places(text, ids)

    def places(self, text: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(begins, ends) of `encode_places`, for a text whose ids are known already."""
        if self.lossless:
            ends = np.cumsum(self.byte_length[ids].astype(np.int64))
            return ends - self.byte_length[ids], ends
        if self._json is None:
            raise UserError(
                f"the tokenizer {self.path} changes the text and does not say what its pieces "
                f"stand for; use one that `nanolm prepare` trained"
            )
        starts = np.cumsum([0, *(len(character.encode()) for character in text)])
        begins, ends = np.array(self._json.offsets(text), np.int64).reshape(-1, 2).T
        return starts[begins], starts[ends]

    @property
    def can_place(self) -> bool:
        """Whether it can be told which bytes of a text a token stands for."""
        return self.lossless or self._json is not None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text."""
        return [array.astype(self.dtype) for array in self._encode_int32(texts)]

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of documents end to end, each closed by eos, and their lengths.

        ids: [n] uint16|uint32; lengths: int64[len(texts)], eos included. Fastest of the three: the
        work for each document is left to SentencePiece.
        """
        arrays = self._encode_int32(texts)
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays)) + 1
        ends = np.cumsum(lengths)
        ids = np.full(int(ends[-1]) if len(ends) else 0, self.eos, self.dtype)
        inside = np.ones(len(ids), bool)
        inside[ends - 1] = False
        ids[inside] = np.concatenate([np.empty(0, np.int32), *arrays])
        return ids, lengths

    def decode(self, ids: np.ndarray | list[int], *, specials: bool = False) -> str:
        """The text of ids; special pieces are left out, or shown by name when asked for.

        Bytes that form no character (possible only in sampled ids) become U+FFFD.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"ids run from {ids.min()} to {ids.max()}, not 0…{self.vocab_size - 1}"
            )
        hidden = self.special_mask[ids] & (ids != self._roles["unk"])
        if not specials:
            return self._decode_text(ids[~hidden])
        cuts = np.flatnonzero(hidden)
        parts: list[str] = []
        begin = 0
        for cut in cuts.tolist():
            parts += [self._decode_text(ids[begin:cut]), self.piece(int(ids[cut]))]
            begin = cut + 1
        return "".join([*parts, self._decode_text(ids[begin:])])

    def piece(self, index: int) -> str:
        """The piece of an id as SentencePiece writes it (▁ for a space)."""
        return self._processor.id_to_piece(index)

    def piece_id(self, piece: str) -> int:
        """The id of a piece that is written like this; raises KeyError where there is none."""
        index = self._lookup(piece)
        if index is None:
            raise KeyError(piece)
        return index

    def role(self, name: str) -> int:
        """The id of a role; raises UserError when this model has no piece for it."""
        index = self._roles[name]
        if index is None:
            named = self.missing.get(name)
            looked_for = ", ".join(FOREIGN_PIECES[name]) if named is None else named
            raise UserError(
                f"the tokenizer {self.path} has no {name} piece (looked for {looked_for}); train "
                f"one with `nanolm prepare` instead"
            )
        return index

    @property
    def missing(self) -> dict[str, str]:
        """The roles whose piece a published tokenizer names and its vocabulary lacks."""
        named = {} if self._json is None else self._json.roles
        return {role: piece for role, piece in named.items() if self._roles.get(role) is None}

    def roles(self) -> dict[str, int]:
        """The roles that this model has, with their ids."""
        return {role: index for role, index in self._roles.items() if index is not None}

    pad = property(lambda self: self.role("pad"), doc="Fills short rows; never a target.")
    unk = property(lambda self: self.role("unk"), doc="Unused where there is byte fallback.")
    bos = property(lambda self: self.role("bos"), doc="Begins a text.")
    eos = property(lambda self: self.role("eos"), doc="Ends every document.")
    cls = property(lambda self: self.role("cls"), doc="Begins a BERT row; pooled heads read it.")
    sep = property(lambda self: self.role("sep"), doc="Ends a segment of a BERT row.")
    mask = property(lambda self: self.role("mask"), doc="Stands where a token is hidden.")

    @property
    def chat_template(self) -> str | None:
        """How a published model's authors write a dialogue, in Jinja; None where nobody said."""
        return None if self._json is None else self._json.chat_template

    @property
    def opening(self) -> list[int]:
        """What stands before a text that a decoder continues: an end of a document, as in training
        by nanolm; of a tokenizer.json what it says itself, or its bos or eos if that is nothing."""
        if self._json is None:
            return [self.eos]
        return self._json.opening() or [self._roles["bos"] or self.eos]

    def around(self, n_texts: int) -> list[list[int]]:
        """The special pieces before one text or two, between them and behind, as a tokenizer.json
        itself puts them; raises UserError where there is none that says it."""
        if self._json is None:
            raise UserError(
                f"the tokenizer {self.path} does not say what stands around a text, as a "
                f"tokenizer.json does; leave objective.frame out"
            )
        try:
            return self._json.around(n_texts)
        except KeyError as error:
            raise UserError(
                f"the tokenizer {self.path} has no piece for the letter {error.args[0]}, and so "
                f"does not say what it puts around a text; leave objective.frame out"
            ) from error

    def _count_separators(self) -> int:
        between = [] if self._json is None else self._json.between()
        return len(between) if set(between) == {self._roles["sep"]} else 1

    def _encode_int32(self, texts: list[str]) -> list[np.ndarray]:
        if self.lossless and self._json is None:
            whole = "".join(texts)
            if any(mark in whole for mark in (SPACE, STAND_IN, ESCAPE)):
                texts = [escape(text) for text in texts]
        encode = functools.partial(self._processor.encode, return_type="numpy")
        try:
            if len(texts) < BATCH:
                for text in texts:
                    text.encode()  # half a surrogate pair is refused in a list alone
                return [encode(text) for text in texts]
            return encode(texts, num_threads=1)
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair, or a byte of no character
            odd = next((text for text in texts if not _is_unicode(text)), None)
            if odd is None:
                raise
            raise UserError(
                f"the text {odd[:60]!a} holds bytes or code points that are no Unicode text; "
                f"give it in UTF-8"
            ) from None

    def _decode_text(self, ids: np.ndarray) -> str:
        text = self._processor.decode(ids.tolist()) if ids.size else ""
        return unescape(text) if self.lossless and self._json is None else text

    def _lookup(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        return index if index >= 0 and self._processor.id_to_piece(index) == piece else None

    def _find_role(self, role: str) -> int | None:
        if self._json is not None and role in self._json.roles:
            return self._lookup(self._json.roles[role])
        if self._json is None and role in ("pad", "unk", "bos", "eos"):
            index = getattr(self._processor, f"{role}_id")()
            if index >= 0:
                return index
        found = (self._lookup(piece) for piece in FOREIGN_PIECES[role])
        return next((index for index in found if index is not None), None)

    def _find_extra_ids(self) -> tuple[int, ...]:
        for pattern in EXTRA_PIECES:
            ids = (self._lookup(pattern.format(index)) for index in itertools.count())
            found = tuple(itertools.takewhile(lambda index: index is not None, ids))
            if found:
                return cast(tuple[int, ...], found)
        return ()

    def _describe_pieces(self) -> Pieces:
        reserved = {*self.roles().values(), *self.extra_ids}
        if self._json is not None:
            return json_pieces(self._json, self.vocab_size, reserved)
        return model_pieces(
            cast(sentencepiece.SentencePieceProcessor, self._processor), reserved, SPACE
        )


def opened_model(model_bytes: bytes, path: str) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model; raises UserError when the bytes are none."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model_bytes)
    except RuntimeError as error:
        raise UserError(
            f"{path or 'the tokenizer'} is no SentencePiece model; "
            f"give the .model file of a trained tokenizer"
        ) from error
    return processor
