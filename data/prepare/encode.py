"""Encoding: spooled text to token ids, one process a unit, and from there into shards.

`encode` writes what a unit gives each split as plain arrays into one file. `plan_shards` then cuts
the long row of all units into shards of the configured size at document ends, wherever units end;
and `assemble` copies one such range into its Arrow shard. Where sentences are wanted, their lengths
take the same way in a file of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import numpy as np

from nanolm.data.prepare.dedup import kept
from nanolm.data.prepare.split import Split
from nanolm.data.prepare.spool import Unit, read_spool
from nanolm.data.sentences import sentence_lengths
from nanolm.data.shards.directory import SPLITS
from nanolm.data.shards.shard_file import Shard, ShardWriter, count_ids
from nanolm.data.tokenizer import Tokenizer
from nanolm.files import AtomicFile, write_json

# Tokens with eos, and bytes of text, of one document.
LENGTH = np.dtype([("tokens", "<u4"), ("bytes", "<u4")])
# For each split the lengths, then the ids; the JSON beside it says where, and that it is finished.
ENCODED, DONE = ".encoded", ".encoded.json"
# For each split the tokens in each sentence, int32; only where sentences are wanted.
SENTENCES = ".sentences"


def encode(
    unit: Unit,
    documents: int,
    duplicates: list[pathlib.Path],
    split: Split,
    model: str,
    with_sentences: bool = False,
) -> dict:
    """Encode one unit; returns its counts per split. Memory: the unit's ids and one batch."""
    done = unit.path(DONE)
    if done.exists():
        return json.loads(done.read_bytes())
    tokenizer = cached_tokenizer(model)
    keep = kept(unit, documents, duplicates)
    tokens: list[list[np.ndarray]] = [[] for _ in SPLITS]
    lengths: list[list[np.ndarray]] = [[] for _ in SPLITS]
    sentences: list[list[np.ndarray]] = [[] for _ in SPLITS]
    for batch in read_spool(unit):
        stays = keep[batch.first : batch.first + len(batch.texts)]
        where = np.where(stays, split.of(batch.digests), -1)
        for number in range(len(SPLITS)):
            chosen = np.flatnonzero(where == number)
            if len(chosen):
                sizes = np.empty(len(chosen), LENGTH)
                texts = [batch.texts[index] for index in chosen]
                ids, sizes["tokens"] = tokenizer.encode_documents(texts)
                sizes["bytes"] = batch.sizes[chosen]
                tokens[number].append(ids)
                lengths[number].append(sizes)
                if with_sentences:
                    cuts = np.cumsum(sizes["tokens"], dtype=np.int64)[:-1]
                    sentences[number] += [
                        sentence_lengths(tokenizer, text, document)
                        for text, document in zip(texts, np.split(ids, cuts), strict=True)
                    ]
    info = {}
    if with_sentences:
        write_sentences(unit, sentences)
    with AtomicFile(unit.path(ENCODED)) as file:
        for number, name in enumerate(SPLITS):
            sizes = np.concatenate([np.empty(0, LENGTH), *lengths[number]])
            flat = np.concatenate([np.empty(0, tokenizer.dtype), *tokens[number]])
            file.write(sizes)
            file.write(flat)
            info[name] = {
                "tokens": len(flat),
                "documents": len(sizes),
                "itemsize": flat.itemsize,
                "end": file.size,
            }
    write_json(done, info)
    return info


def read_lengths(unit: Unit, split: str) -> np.ndarray:
    """LENGTH[documents]: what `encode` found of a unit's documents in a split."""
    info = json.loads(unit.path(DONE).read_bytes())[split]
    begin = info["end"] - info["tokens"] * info["itemsize"] - info["documents"] * LENGTH.itemsize
    return np.fromfile(unit.path(ENCODED), LENGTH, info["documents"], offset=begin)


def read_tokens(unit: Unit, split: str, begin: int, end: int, dtype: np.dtype) -> np.ndarray:
    """Token ids [begin, end) of those that `encode` wrote of a unit for a split."""
    info = json.loads(unit.path(DONE).read_bytes())[split]
    first = info["end"] - (info["tokens"] - begin) * dtype.itemsize
    return np.fromfile(unit.path(ENCODED), dtype, end - begin, offset=first)


def write_sentences(unit: Unit, sentences: list[list[np.ndarray]]) -> None:
    """Write the sentence lengths of each split's documents, one array after the other."""
    with AtomicFile(unit.path(SENTENCES)) as file:
        for lengths in sentences:
            np.lib.format.write_array(file, np.concatenate([np.empty(0, np.int32), *lengths]))


def read_sentences(unit: Unit, split: str, begin: int, end: int) -> np.ndarray | None:
    """int32: lengths of the sentences in a unit's tokens [begin, end), which are whole documents;
    None where sentences were not wanted."""
    if not unit.path(SENTENCES).exists():
        return None
    with open(unit.path(SENTENCES), "rb") as file:
        for name in SPLITS:
            lengths = np.lib.format.read_array(file)
            if name == split:
                break
    ends = np.cumsum(lengths, dtype=np.int64)
    first, last = np.searchsorted(ends, [begin, end], side="right")
    return lengths[first:last]


@functools.lru_cache(maxsize=1)
def cached_tokenizer(model: str) -> Tokenizer:
    """A worker's tokenizer: loaded once, not once a unit."""
    return Tokenizer.load(model)


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
        lengths = read_lengths(unit, split)
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
        return info, count_ids(Shard(path).tokens, tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    with ShardWriter(
        path,
        tokens=plan.tokens,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        source=source,
    ) as writer:
        for unit, begin, end in plan.ranges:
            lengths = read_lengths(unit, plan.split)
            ends = np.cumsum(lengths["tokens"], dtype=np.int64)
            first = int(ends[begin - 1]) if begin else 0
            tokens = read_tokens(unit, plan.split, first, int(ends[end - 1]), tokenizer.dtype)
            chosen = lengths[begin:end]
            writer.write(
                tokens,
                chosen["tokens"].astype(np.int64),
                int(chosen["bytes"].sum()),
                read_sentences(unit, plan.split, first, first + len(tokens)),
            )
            counts += count_ids(tokens, len(counts))
    write_json(note, writer.info)
    return writer.info, counts
