"""A prepared directory: which shards belong together, in which splits, with which tokenizer.

`manifest.json` is written last, so a directory that has one is whole. Opening a split checks what
costs nothing (sizes, structure, counts, tokenizer); `verify` re-reads every byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from nanolm.data.files import file_sha256, write_json
from nanolm.data.shard_file import (
    FORMAT_VERSION,
    Shard,
    ShardWriter,
    check_ids,
    count_ids,
    damaged,
    token_dtype,
    total,
)
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError

__all__ = [
    "Manifest",
    "Shard",
    "ShardWriter",
    "open_shard",
    "open_split",
    "open_tokenizer",
    "token_dtype",
    "unigram_counts",
    "verify",
]

MANIFEST_FILE = "manifest.json"
UNIGRAM_FILE = "unigram.npy"
SPLITS = ("train", "val", "test")
COUNTED = ("tokens", "documents", "bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared directory holds.

    splits: split -> list of {file, sha256, size, tokens, documents, bytes}; totals: split ->
    {tokens, documents, bytes}; special_ids: role -> id; cleaning: `dropped/REASON` or
    `changed/WHAT` -> count; unigram: the file with int64 counts per token id over the train split
    (eos included); inputs: {source, pieces, bytes} of each source; config: what `prepare` was told.
    """

    format_version: int = FORMAT_VERSION
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    special_ids: dict[str, int]
    splits: dict[str, list[dict]]
    totals: dict[str, dict[str, int]]
    cleaning: dict[str, int]
    unigram: str
    unigram_sha256: str
    data_hash: str
    inputs: list[dict]
    config: dict

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> Manifest:
        """Read `manifest.json`; raises UserError when there is none or it cannot be used."""
        path = pathlib.Path(directory) / MANIFEST_FILE
        try:
            manifest = cls(**json.loads(path.read_bytes()))
        except FileNotFoundError as error:
            raise UserError(
                f"{directory} is not a prepared directory: it has no {MANIFEST_FILE}; "
                f"run `nanolm prepare --out {directory}` (again, if it was interrupted)"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the data again") from error
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {manifest.format_version}, this version reads "
                f"{FORMAT_VERSION}; prepare the data again"
            )
        return manifest

    def save(self, directory: str | pathlib.Path) -> None:
        """Write `manifest.json` atomically."""
        write_json(pathlib.Path(directory) / MANIFEST_FILE, dataclasses.asdict(self))


def split_totals(splits: dict[str, list[dict]]) -> dict[str, dict[str, int]]:
    """Tokens, documents and bytes of each split."""
    return {split: {key: total(shards, key) for key in COUNTED} for split, shards in splits.items()}


def data_hash(tokenizer_hash: str, splits: dict[str, list[dict]]) -> str:
    """Hex SHA-256 that names the data: the tokenizer and every shard of every split, in order."""
    lines = [tokenizer_hash]
    lines += [f"{split} {shard['sha256']}" for split in splits for shard in splits[split]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_shard(directory: pathlib.Path, manifest: Manifest, entry: dict) -> Shard:
    """Open one shard and check it against its manifest entry; raises UserError when they differ."""
    path = directory / entry["file"]
    if not path.is_file():
        raise UserError(f"shard {path} is missing; restore it or prepare the data again")
    if path.stat().st_size != entry["size"]:
        raise damaged(path, f"{path.stat().st_size} bytes instead of {entry['size']}")
    shard = Shard(path)
    if shard.metadata["tokenizer_hash"] != manifest.tokenizer_hash:
        raise UserError(
            f"shard {path} was written with another tokenizer than {manifest.tokenizer} of its "
            f"directory; prepare the data again"
        )
    if shard.metadata["vocab_size"] != manifest.vocab_size:
        raise damaged(path, "its vocabulary size is not the manifest's")
    for key in COUNTED:
        if shard.metadata[key] != entry[key]:
            raise damaged(path, f"{shard.metadata[key]} {key} instead of {entry[key]}")
    return shard


def open_split(
    directory: str | pathlib.Path, split: str, *, tokenizer_hash: str | None = None
) -> tuple[Manifest, list[Shard]]:
    """Open the shards of a split, memory-mapped.

    tokenizer_hash: the tokenizer that the caller will use (a checkpoint's, say). Raises UserError
    for a directory without manifest, an empty or unknown split, a missing, truncated or damaged
    shard, and another tokenizer.
    """
    directory = pathlib.Path(directory)
    manifest = Manifest.load(directory)
    if tokenizer_hash not in (None, manifest.tokenizer_hash):
        raise UserError(
            f"the shards of {directory} were written with tokenizer {manifest.tokenizer_hash[:12]}"
            f", not {tokenizer_hash[:12]}; use its {manifest.tokenizer}, or prepare the data again "
            f"with --tokenizer"
        )
    if not manifest.splits.get(split):
        held = ", ".join(name for name, shards in manifest.splits.items() if shards)
        raise UserError(
            f"{directory} has no {split} split (it has {held}); "
            f"prepare it with a larger {split}_fraction"
        )
    return manifest, [open_shard(directory, manifest, entry) for entry in manifest.splits[split]]


def open_tokenizer(directory: str | pathlib.Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared directory; raises UserError when it is not the one recorded."""
    tokenizer = Tokenizer.load(pathlib.Path(directory) / manifest.tokenizer)
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer that wrote the shards beside it; "
            f"restore it or prepare the data again"
        )
    return tokenizer


def unigram_counts(directory: str | pathlib.Path, manifest: Manifest) -> np.ndarray:
    """int64[V]: how often each token id occurs in the train split."""
    path = pathlib.Path(directory) / manifest.unigram
    try:
        counts = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged; prepare the data again") from error
    if counts.shape != (manifest.vocab_size,):
        raise UserError(f"{path} does not fit the vocabulary; prepare the data again")
    return counts


def verify(directory: str | pathlib.Path) -> Manifest:
    """Re-read everything: checksums, ids, boundaries, counts, tokenizer, unigram table.

    Returns the manifest; raises UserError at the first thing that is not as recorded.
    """
    directory = pathlib.Path(directory)
    manifest = Manifest.load(directory)
    tokenizer = open_tokenizer(directory, manifest)
    if tokenizer.vocab_size != manifest.vocab_size or tokenizer.roles() != manifest.special_ids:
        raise UserError(f"{directory / MANIFEST_FILE} does not describe its own tokenizer")
    counts = np.zeros(manifest.vocab_size, np.int64)
    for split, entries in manifest.splits.items():
        for entry in entries:
            shard = open_shard(directory, manifest, entry)
            if file_sha256(shard.path) != entry["sha256"]:
                raise damaged(shard.path, "its checksum is not the one recorded")
            check_ids(shard)
            if np.any(shard.tokens[shard.offsets[1:] - 1] != tokenizer.eos):
                raise damaged(shard.path, "a document does not end with eos")
            if split == "train":
                counts += count_ids(shard.tokens, manifest.vocab_size)
    if file_sha256(directory / manifest.unigram) != manifest.unigram_sha256 or np.any(
        counts != unigram_counts(directory, manifest)
    ):
        raise UserError(f"{directory / manifest.unigram} does not match the shards beside it")
    same = data_hash(manifest.tokenizer_hash, manifest.splits) == manifest.data_hash
    if not same or split_totals(manifest.splits) != manifest.totals:
        raise UserError(f"{directory / MANIFEST_FILE} contradicts itself; prepare the data again")
    return manifest
