"""A text with <mask> as an encoder reads it."""

from __future__ import annotations

from nanolm.errors import require
from nanolm.saved import Saved

MASK = "<mask>"


def mask_ids(text: str, saved: Saved) -> list[int]:
    """<cls> text <sep> with the mask's id where <mask> stands.

    The text is cut at <mask> and its parts are tokenized; the spaces before a mask are left out,
    since a piece that begins a word carries its own. Raises UserError for a text without a mask, or
    one that is too long.
    """
    tokenizer = saved.tokenizer
    parts = text.split(MASK)
    require(len(parts) > 1, f"--text has no {MASK}; write it where a token is to be guessed")
    ids = [tokenizer.cls]
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        ids += tokenizer.encode(part if last else part.rstrip(" ")).tolist()
        ids.append(tokenizer.sep if last else tokenizer.mask)
    limit = saved.config.model.max_length
    require(len(ids) <= limit, f"--text has {len(ids)} tokens; the model reads {limit} at most")
    return ids
