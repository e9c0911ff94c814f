"""Gold answers as spans of their context: characters, bytes and tokens of the same stretch of text.

Tokens stand where `Tokenizer.encode_places` says. Used by the task `read`, before a batch exists
and after its answers came back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nanolm.data.tables.files import Record


class Answer(NamedTuple):
    """One gold answer and the character at which it stands in the context."""

    text: str
    start: int


def answers_of(record: Record) -> list[Answer] | None:
    """The gold answers, from SQuAD's list or from parallel lists; None when they are neither."""
    value = record.get("answers")
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            return None
        value = [{"text": t, "answer_start": s} for t, s in zip(texts, starts)]
    if not isinstance(value, list):
        return None
    try:
        found = [Answer(str(answer["text"]), int(answer["answer_start"])) for answer in value]
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found


def find_nearest(context: str, answer: Answer) -> int | None:
    """Where an answer's text begins in its context, as near as possible to where it should."""
    text, start = answer
    if start >= 0 and context.startswith(text, start):
        return start
    before = context.rfind(text, 0, max(0, start) + len(text))
    after = context.find(text, max(0, start))
    found = [place for place in (before, after) if place >= 0]
    return min(found, key=lambda place: abs(place - start)) if found else None


def token_span(
    context: str, answer: Answer, begins: np.ndarray, ends: np.ndarray
) -> tuple[int, int]:
    """The tokens, first and last, that cover an answer."""
    first_byte = len(context[: answer.start].encode())
    last_byte = first_byte + len(answer.text.encode())
    first = int(np.searchsorted(begins, first_byte, side="right")) - 1
    last = int(np.searchsorted(ends, last_byte, side="left"))
    return first, max(first, last)


def cut_out(context: str, begin: int, end: int) -> dict[str, Any]:
    """The text of bytes [begin, end) without the spaces around it, and its characters' bounds."""
    data = context.encode()
    before = len(data[:begin].decode(errors="ignore"))
    text = data[begin:end].decode(errors="ignore")
    stripped = text.strip()
    start = before + len(text) - len(text.lstrip()) if stripped else before
    return {"answer": stripped, "start": start, "end": start + len(stripped)}
