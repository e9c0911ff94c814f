"""Cutting bytes into documents: whole streams, lines or paragraphs, in blocks of bounded size.

A byte range [begin, end) owns the lines that begin in it, and the paragraphs up to the first blank
line at or after its end; so any partition of a file gives the documents of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import IO

DOCUMENT_BYTES = 1 << 20


def cut_point(block: bytes) -> int:
    """Where to cut a block that is too long: after a newline or space, or between characters."""
    for mark in (b"\n", b" "):
        if (cut := block.rfind(mark, len(block) // 2)) > 0:
            return cut + 1
    cut = len(block) - 1
    while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
        cut -= 1
    return max(1, cut)


def blocks(file: IO[bytes], counts: Counter, limit: int = DOCUMENT_BYTES) -> Iterator[bytes]:
    """A stream as one document, cut into several when it is longer than the limit."""
    rest = b""
    while block := file.read(limit + 1 - len(rest)):
        rest += block
        if len(rest) > limit:
            cut = cut_point(rest[:limit])
            yield rest[:cut]
            rest = rest[cut:]
            counts["changed/long documents cut"] += 1
    if rest:
        yield rest


def bounded(raw: bytes | str, counts: Counter, limit: int = DOCUMENT_BYTES) -> Iterator[bytes]:
    """A document as bytes, cut into several when it is longer than the limit."""
    rest = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    while len(rest) > limit:
        cut = cut_point(rest[:limit])
        yield rest[:cut]
        rest = rest[cut:]
        counts["changed/long documents cut"] += 1
    yield rest


def lines(
    file: IO[bytes], begin: int, end: int, counts: Counter, limit: int = DOCUMENT_BYTES
) -> Iterator[bytes]:
    """The lines that begin in [begin, end), without their ends; blank lines are no documents.

    A line beyond the limit is cut into several.
    """
    position = seek_line(file, begin)
    rest = b""
    while position < end or rest:
        block = file.readline(limit + 1 - len(rest))
        position += len(block)
        line = rest + block
        if len(line) > limit and not line.endswith(b"\n"):
            cut = cut_point(line[:limit])
            line, rest = line[:cut], line[cut:]
            counts["changed/long documents cut"] += 1
        elif not line:
            return
        else:
            rest = b""
        if line := line.rstrip(b"\r\n"):
            yield line


def paragraphs(file: IO[bytes], begin: int, end: int, counts: Counter) -> Iterator[bytes]:
    """Runs of lines between blank lines; a range ends at the first blank line at or after `end`."""
    position = seek_line(file, begin)
    skipping = begin > 0
    held: list[bytes] = []
    size = 0
    while line := file.readline(DOCUMENT_BYTES):
        starts_at = position
        position += len(line)
        if line.strip():
            if skipping:
                continue
            if size + len(line) > DOCUMENT_BYTES and held:
                counts["changed/long documents cut"] += 1
                yield b"".join(held)
                held, size = [], 0
            held.append(line)
            size += len(line)
            continue
        if held:
            yield b"".join(held).rstrip(b"\r\n")
            held, size = [], 0
        skipping = False
        if starts_at >= end:
            return
    if held:
        yield b"".join(held).rstrip(b"\r\n")


def seek_line(file: IO[bytes], begin: int) -> int:
    """Go to the first line that begins at or after `begin`; returns its position."""
    if begin == 0:
        return 0
    position = file.seek(begin - 1)
    while block := file.readline(DOCUMENT_BYTES):
        position += len(block)
        if block.endswith(b"\n"):
            break
    return position
