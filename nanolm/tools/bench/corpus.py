"""A corpus of any size, grown from the sentences of a small one, for measurements of preparation.

Documents are drawn at random, with replacement, from the first sentences of the sources. So words,
sentence lengths and script are real, and hardly any document is a duplicate. The same sources and
size give the same bytes. Bytes that are no UTF-8 are left out of the sentences.
"""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from nanolm.data.prepare.config import PrepareConfig
from nanolm.data.prepare.pipeline import list_pieces
from nanolm.data.prepare.tokenizer_training import sentences
from nanolm.errors import require

POOL_BYTES = 20_000_000
"""Text whose sentences are drawn from."""
FILE_BYTES = 64_000_000
"""Text of one file of the grown corpus."""
DOCUMENT_SENTENCES = 20
"""Sentences of a document."""


def sentence_pool(sources: list[str], text_field: str) -> list[str]:
    """Sentences of the sources' first `POOL_BYTES`; raises UserError when there are none."""
    config = PrepareConfig(out="", sources=sources, text_field=text_field)
    pieces, *_ = list_pieces(config)
    counts: Counter = Counter()
    pool: list[str] = []
    size = 0
    for piece in pieces:
        for raw in piece.documents(counts):
            text = raw if isinstance(raw, str) else raw.decode(errors="ignore")
            found = list(sentences(text))
            pool += found
            size += sum(len(sentence.encode()) for sentence in found)
            if size > POOL_BYTES:
                return pool
    require(bool(pool), f"{', '.join(sources)}: no sentence to grow a corpus from")
    return pool


def documents(pool: list[str], size: int) -> Iterator[str]:
    """Documents of at least `size` bytes in all."""
    rng = np.random.default_rng(0)
    written = 0
    while written < size:
        chosen = rng.integers(len(pool), size=DOCUMENT_SENTENCES)
        text = " ".join(pool[index] for index in chosen)
        written += len(text.encode())
        yield text


def grow(sources: list[str], text_field: str, size: int, folder: pathlib.Path) -> str:
    """Writes files of `text_field` records, of at least `size` bytes of text in all, to `folder`;
    returns it as a source."""
    folder.mkdir()
    texts = documents(sentence_pool(sources, text_field), size)
    for number in range(size // FILE_BYTES + 1):
        with (folder / f"part-{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            written = 0
            while written < FILE_BYTES and (text := next(texts, None)) is not None:
                file.write(json.dumps({text_field: text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
    return str(folder)
