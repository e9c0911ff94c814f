"""Records out of JSON: one object a line, the elements of an array, or objects one after the other.

Which of them a file is, and whether its records have the wished field at all, is judged by its
first MiB, once for the whole file. What a single record lacks is counted, wherever it stands.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from nanolm.data.text_files import PROBE_BYTES

RECORD_BYTES = 1 << 26
ENDS = tuple(" \t\r\n,]")
BETWEEN = re.compile(r"[ \t\r\n,\ufeff]*")


def is_lines(head: bytes) -> bool:
    """Whether a .json file that begins like this holds one object a line."""
    line, newline, _ = head.lstrip().partition(b"\n")
    if not newline and len(head) >= PROBE_BYTES:  # a line longer than we look
        return line.startswith(b"{")
    return isinstance(parsed(line), dict)


def parsed(line: bytes) -> Any:
    """The value of a line; None when it is no JSON (or null, which is no record either)."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is one, too
        return None


def fields_in(head: bytes, *, by_line: bool) -> list[str]:
    """The fields of all records in the beginning of a file, in order of appearance."""
    records = map(parsed, head.split(b"\n")) if by_line else whole_values(head)
    return list(
        dict.fromkeys(key for record in records if isinstance(record, dict) for key in record)
    )


def whole_values(head: bytes) -> Iterator[Any]:
    """The values in the beginning of a file, as far as they go."""
    try:
        yield from values(io.BytesIO(head))
    except ValueError:
        return


def values(file: IO[bytes], limit: int = RECORD_BYTES) -> Iterator[Any]:
    """The elements of the arrays at the top of a stream, and the values that stand in none.

    Holds one element and about as much again. Raises ValueError where the stream is no JSON.
    """
    # Bytes that are no UTF-8 stay what they are, for the policy that deals with them.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan, text, position, inside, ended = json.JSONDecoder().raw_decode, "", 0, False, False
    while True:
        position = cast(re.Match, BETWEEN.match(text, position)).end()
        mark = text[position : position + 1]
        if mark == ("]" if inside else "["):
            inside, position = not inside, position + 1
            continue
        try:
            value, end = scan(text, position)
            # A number that what was read cuts has read well, too: 1 of 1.5.
            whole = ended or isinstance(value, dict | list | str) or text[end : end + 1] in ENDS
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        except json.JSONDecodeError as error:
            if ended and not mark:
                return
            if ended or len(text) - position > limit:
                raise ValueError(f"{error.msg}: {text[position : position + 40]!r}") from error
            whole = False
        if whole:
            yield value
            position = end
        else:
            block = file.read(max(PROBE_BYTES, len(text) - position))
            text, position, ended = text[position:] + decode(block, not block), 0, not block
