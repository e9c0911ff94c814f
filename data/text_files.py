"""Opening files of text: what they are compressed with, and which encoding they are in.

Both are decided once for a file, before it is cut into pieces: the compression by the name, the
encoding by a byte-order mark, else by what the user named, else it is UTF-8. Whatever it is, who
reads gets UTF-8; bytes that are none in the file's own encoding become the byte FF, which is none
in UTF-8 either, so that the policy for undecodable text is asked as for any other file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
from typing import IO, Any, cast

import pyarrow as pa

from nanolm.errors import UserError

COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
PROBE_BYTES = 1 << 20
BINARY_PROBE_BYTES = 1 << 13
READ_BYTES = 1 << 18

AUTO = "auto"
UTF8 = "utf-8"
# That of UTF-32 (little endian) begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, UTF8),
)
UNDECODABLE = "\udcff"
UNDECODABLE_BYTES = UNDECODABLE.encode(UTF8, "surrogatepass")
codecs.register_error(
    "nanolm.undecodable", lambda error: (UNDECODABLE, cast(UnicodeDecodeError, error).end)
)


def check_encoding(name: str) -> None:
    """Raises UserError unless Python knows a text encoding of this name."""
    try:
        known = name == AUTO or "x".encode(name).decode(name) == "x"
    except (LookupError, UnicodeError, ValueError):
        known = False
    if not known:
        raise UserError(
            f"encoding={name!r} is no text encoding; use auto, or a name such as utf-16-le, "
            f"cp1251, gb18030 or latin-1"
        )


def encoding_of(head: bytes, asked: str = AUTO) -> str:
    """The encoding of the file that begins like this: its byte-order mark decides before what was
    asked for."""
    marked = (name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark))
    return next(marked, UTF8 if asked == AUTO else asked)


def holds_nul(head: bytes, encoding: str) -> bool:
    """Whether there is a NUL character in the beginning of a file, which no text has."""
    return b"\0" in recoded_head(head[:BINARY_PROBE_BYTES], encoding)


def unmarked_encoding(head: bytes) -> str | None:
    """The UTF-16 or UTF-32 that a file with NUL bytes and without a byte-order mark seems to be."""
    head = head[:BINARY_PROBE_BYTES]
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = head[: len(head) // 4 * 4].decode(name)
        except UnicodeDecodeError:
            continue
        # Letters of one script share their high bytes: in the wrong order they are no letters.
        good = sum(character.isalnum() or character.isspace() for character in text)
        if text and "\0" not in text and good >= 0.7 * len(text) and text.count(" ") > 0:
            return name
    return None


def recoded_head(head: bytes, encoding: str) -> bytes:
    """The beginning of a file as UTF-8, without a character that is cut."""
    if encoding == UTF8:
        return head
    decoder = codecs.getincrementaldecoder(encoding)("nanolm.undecodable")
    return _utf8(decoder.decode(head))


def _utf8(text: str) -> bytes:
    return text.encode(UTF8, "surrogatepass").replace(UNDECODABLE_BYTES, b"\xff")


def open_text(path: str, encoding: str = UTF8) -> IO[bytes]:
    """Open a plain or compressed file for reading its text as UTF-8 bytes."""
    file = _open_bytes(path)
    return file if encoding == UTF8 else io.BufferedReader(Recoded(file, encoding), READ_BYTES)


def _open_bytes(path: str) -> IO[bytes]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".zst":
        return io.BufferedReader(ZstdStream(path), READ_BYTES)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)
    return opener(path, "rb")


class ZstdStream(io.RawIOBase):
    """A zstd file as a raw stream, through the decoder that pyarrow carries."""

    def __init__(self, path: str) -> None:
        self._stream = pa.CompressedInputStream(pa.OSFile(path), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()


class Recoded(io.RawIOBase):
    """A stream of bytes in another encoding as a raw stream of UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("nanolm.undecodable")
        self._rest, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._ended:
            block = self._file.read(READ_BYTES)
            self._ended = not block
            self._rest = _utf8(self._decoder.decode(block, self._ended))
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()
