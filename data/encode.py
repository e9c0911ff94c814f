"""Encoding: spooled text to token ids, one process a unit, and from there into shards.

`encode` writes what a unit gives each split as two plain arrays. `plan_shards` then cuts the long
row of all units into shards of the configured size at document ends, wherever units end; and
`assemble` copies one such range into its Arrow shard.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import numpy as np

from nanolm.data.dedup import kept
from nanolm.data.files import AtomicFile, write_json
from nanolm.data.shard_file import Shard, ShardWriter
from nanolm.data.shards import SPLITS
from nanolm.data.split import Split
from nanolm.data.spool import Unit, read_spool
from nanolm.data.tokenizer import Tokenizer

# Tokens with eos, and bytes of text, of one document.
LENGTH = np.dtype([("tokens", "<u4"), ("bytes", "<u4")])
DONE = ".encoded.json"


def encode(
    unit: Unit,
    documents: int,
    duplicates: list[pathlib.Path],
    split: Split,
    model: str,
) -> dict:
    """Encode one unit; returns its counts per split. Memory: the unit's ids and one batch."""
    done = unit.path(DONE)
    if done.exists():
        return json.loads(done.read_bytes())
    tokenizer = cached_tokenizer(model)
    keep = kept(unit, documents, duplicates)
    tokens: list[list[np.ndarray]] = [[] for _ in SPLITS]
    lengths: list[list[np.ndarray]] = [[] for _ in SPLITS]
    for first, texts, digests in read_spool(unit):
        where = np.where(keep[first : first + len(texts)], split.of(digests), -1)
        for number in range(len(SPLITS)):
            chosen = [texts[index] for index in np.flatnonzero(where == number)]
            if chosen:
                flat, sizes = encode_documents(chosen, tokenizer)
                tokens[number].append(flat)
                lengths[number].append(sizes)
    info = {}
    for number, name in enumerate(SPLITS):
        flat = np.concatenate([np.empty(0, tokenizer.dtype), *tokens[number]])
        sizes = np.concatenate([np.empty(0, LENGTH), *lengths[number]])
        for suffix, array in ((".tokens.npy", flat), (".lengths.npy", sizes)):
            with AtomicFile(unit.path(f".{name}{suffix}")) as file:
                np.lib.format.write_array(file, array)
        info[name] = {"tokens": len(flat), "documents": len(sizes)}
    write_json(done, info)
    return info


@functools.lru_cache(maxsize=1)
def cached_tokenizer(model: str) -> Tokenizer:
    """A worker's tokenizer: loaded once, not once a unit."""
    return Tokenizer.load(model)


def encode_documents(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of documents, each with its eos, end to end [n], and their lengths LENGTH[len(texts)]."""
    arrays = tokenizer.encode_batch(texts)
    lengths = np.empty(len(texts), LENGTH)
    lengths["tokens"] = np.fromiter(map(len, arrays), np.int64, len(arrays)) + 1
    lengths["bytes"] = [len(text.encode()) for text in texts]
    end = np.array([tokenizer.eos], tokenizer.dtype)
    return np.concatenate([part for array in arrays for part in (array, end)]), lengths


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard to be: its split, number, and the (unit, first document, last + 1) it takes."""

    split: str
    number: int
    ranges: tuple[tuple[Unit, int, int], ...]
    tokens: int

    @property
    def name(self) -> str:
        """The file name of the shard."""
        return f"{self.split}-{self.number:05d}.arrow"


def plan_shards(units: list[Unit], split: str, shard_tokens: int) -> list[ShardPlan]:
    """Cut a split's documents, in order, into shards of at most shard_tokens.

    Only a single document longer than that makes a longer shard.
    """
    plans: list[ShardPlan] = []
    ranges: list[tuple[Unit, int, int]] = []
    filled = 0

    def close() -> None:
        nonlocal ranges, filled
        if ranges:
            plans.append(ShardPlan(split, len(plans), tuple(ranges), filled))
        ranges, filled = [], 0

    for unit in units:
        lengths = np.load(unit.path(f".{split}.lengths.npy"))
        ends = np.cumsum(lengths["tokens"], dtype=np.int64)
        begin = 0
        while begin < len(ends):
            before = int(ends[begin - 1]) if begin else 0
            end = int(np.searchsorted(ends, before + shard_tokens - filled, side="right"))
            if end == begin:
                if filled:
                    close()
                    continue
                end = begin + 1
            ranges.append((unit, begin, end))
            filled += int(ends[end - 1]) - before
            begin = end
    close()
    return plans


def assemble(
    plan: ShardPlan, directory: pathlib.Path, note: pathlib.Path, model: str, source: str
) -> tuple[dict, np.ndarray]:
    """Write one shard; returns its manifest entry and how often each id occurs, int64[V].

    A shard whose note stands beside it is finished and only read again for its counts.
    """
    path = directory / plan.name
    tokenizer = cached_tokenizer(model)
    if note.exists() and path.exists():
        info = json.loads(note.read_bytes())
        return info, np.bincount(Shard(path).tokens, minlength=tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    with ShardWriter(
        path, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash, source=source
    ) as writer:
        for unit, begin, end in plan.ranges:
            lengths = np.load(unit.path(f".{plan.split}.lengths.npy"))
            ends = np.cumsum(lengths["tokens"], dtype=np.int64)
            tokens = np.load(unit.path(f".{plan.split}.tokens.npy"), mmap_mode="r")
            tokens = np.asarray(tokens[ends[begin - 1] if begin else 0 : ends[end - 1]])
            chosen = lengths[begin:end]
            writer.write(tokens, chosen["tokens"].astype(np.int64), int(chosen["bytes"].sum()))
            counts += np.bincount(tokens, minlength=len(counts))
    write_json(note, writer.info)
    return writer.info, counts
