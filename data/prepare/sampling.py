"""The bounded sample of text that a tokenizer is trained on.

Documents of the train split are cut into chunks; a chunk is taken iff the keyed hash of its
document's digest and its number falls below the sampling rate. So the sample is spread evenly, has
the wished size to within a few chunks, and is the same for any number of workers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from nanolm.data.prepare.dedup import kept
from nanolm.data.prepare.split import HASHES, TRAIN, Split, mix
from nanolm.data.prepare.spool import Unit, read_spool

CHUNK_CHARACTERS = 1000


def chunks(text: str) -> Iterator[str]:
    """Cut a text into chunks of about 1,000 characters, at a newline or space if there is one."""
    begin = 0
    while len(text) - begin > CHUNK_CHARACTERS:
        middle, end = begin + CHUNK_CHARACTERS // 2, begin + CHUNK_CHARACTERS
        cut = max(text.rfind("\n", middle, end), text.rfind(" ", middle, end)) + 1
        yield text[begin : cut or end]
        begin = cut or end
    yield text[begin:]


def sample(
    unit: Unit, documents: int, duplicates: list[pathlib.Path], split: Split, rate: float
) -> list[str]:
    """The sampled chunks of one unit's training documents, in order."""
    keep = kept(unit, documents, duplicates)
    bound = int(rate * HASHES)
    found: list[str] = []
    for batch in read_spool(unit):
        stays = keep[batch.first : batch.first + len(batch.texts)]
        for index in np.flatnonzero(stays & (split.of(batch.digests) == TRAIN)):
            parts = list(chunks(batch.texts[index]))
            # The split used mix(digest, seed); another stream of the same hash decides here.
            values = mix(batch.digests[index] + np.arange(len(parts), dtype=np.uint64), ~split.seed)
            found += [part for part, u in zip(parts, values.tolist(), strict=True) if u < bound]
    return found
