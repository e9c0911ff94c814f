"""A prepared directory: which shards belong together, in which splits, with which tokenizer.

`manifest.json` is written last, so a directory that has one is whole. Opening a split checks what
costs nothing (sizes, structure, counts, tokenizer); `verify` re-reads every byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import re
from typing import Any

import numpy as np

from nanolm.config.schema import CacheConfig
from nanolm.data.object_store import RETRY_SECONDS, MissingError, ObjectStore, is_remote
from nanolm.data.shards.shard_file import (
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
from nanolm.files import write_json

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
PASSED_OVER = "passed over"
SPLITS = ("train", "val", "test")
COUNTED = ("tokens", "documents", "bytes")
FIELD_KINDS = {"int": int, "str": str, "dict": dict, "list": list}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared directory holds.

    splits: split -> list of {file, sha256, size, tokens, documents, bytes}; totals: split ->
    {tokens, documents, bytes}; special_ids: role -> id; cleaning: `dropped/REASON`,
    `changed/WHAT` or `passed over/KIND OF FILE` -> count; unigram: the file with int64 counts per
    token id over the train split (eos included); inputs: {source, pieces, bytes} of each source;
    config: what `prepare` was told.
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
    def load(cls, directory: str | pathlib.Path, retry_seconds: float = RETRY_SECONDS) -> Manifest:
        """Read `manifest.json`; raises UserError when there is none or it cannot be used."""
        path = f"{directory}/{MANIFEST_FILE}"
        try:
            manifest = cls(**json.loads(read_file(directory, MANIFEST_FILE, retry_seconds)))
            manifest.check()
        except (FileNotFoundError, MissingError) as error:
            if is_remote(directory):
                raise UserError(
                    f"{error}; prepare into a local folder and copy all of its files there"
                ) from error
            raise UserError(
                f"{directory} is not a prepared directory: it has no {MANIFEST_FILE}; "
                f"run `nanolm prepare --out {directory}` (again, if it was interrupted)"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the data again") from error
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {manifest.format_version}, this version reads "
                f"{FORMAT_VERSION}; prepare the data again"
            )
        return manifest

    def check(self) -> None:
        """Raises ValueError for the first thing that cannot be what `prepare` wrote."""
        for field in dataclasses.fields(self):
            kind = FIELD_KINDS[str(field.type).partition("[")[0]]
            value = getattr(self, field.name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{field.name} is {str(value)[:40]!r}")
        for name in (self.tokenizer, self.unigram):
            check_name(name)
        for split, entries in self.splits.items():
            if not isinstance(entries, list):
                raise ValueError(f"the shards of {split} are no list")
            for entry in entries:
                check_entry(entry)

    def save(self, directory: str | pathlib.Path) -> None:
        """Write `manifest.json` atomically."""
        write_json(pathlib.Path(directory) / MANIFEST_FILE, dataclasses.asdict(self), indent=1)


def check_name(name: str) -> None:
    """Raises ValueError for a name that leads out of its folder."""
    if name in ("", ".", "..") or pathlib.PurePath(name).name != name:
        raise ValueError(f"{name[:40]!r} is no file name")


def check_entry(entry: Any) -> None:
    """Raises ValueError when this cannot be a shard's entry."""
    if not isinstance(entry, dict):
        raise ValueError("an entry of a shard is no mapping")
    kinds: dict[str, type] = {
        "file": str,
        "sha256": str,
        "size": int,
        **dict.fromkeys(COUNTED, int),
    }
    for key, kind in kinds.items():
        value: Any = entry.get(key)
        other = not isinstance(value, kind) or isinstance(value, bool)
        if other or (kind is int and value < 0):
            raise ValueError(f"a shard's {key} is {str(value)[:40]!r}")
    check_name(entry["file"])
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise ValueError(f"the SHA-256 of {entry['file']} is no SHA-256")
    sums = entry.get("blocks", {"bytes": 1, "crc32": ""})
    whole = isinstance(sums, dict) and isinstance(sums.get("crc32"), str)
    if not whole or not isinstance(sums.get("bytes"), int) or sums["bytes"] < 1:
        raise ValueError(f"the checksums of {entry['file']} are none")
    if not re.fullmatch("([0-9a-f]{8})*", sums["crc32"]):
        raise ValueError(f"the checksums of {entry['file']} are no numbers")


def read_file(
    directory: str | pathlib.Path, name: str, retry_seconds: float = RETRY_SECONDS
) -> bytes:
    """A small file of a prepared directory, local or in a bucket."""
    if is_remote(directory):
        return ObjectStore(str(directory), retry_seconds).read_all(name)
    return (pathlib.Path(directory) / name).read_bytes()


def split_totals(splits: dict[str, list[dict]]) -> dict[str, dict[str, int]]:
    """Tokens, documents and bytes of each split."""
    return {split: {key: total(shards, key) for key in COUNTED} for split, shards in splits.items()}


def data_hash(tokenizer_hash: str, splits: dict[str, list[dict]]) -> str:
    """Hex SHA-256 that names the data: the tokenizer and every shard of every split, in order."""
    lines = [tokenizer_hash]
    lines += [f"{split} {shard['sha256']}" for split in splits for shard in splits[split]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_shard(
    directory: str | pathlib.Path,
    manifest: Manifest,
    entry: dict,
    cache: CacheConfig | None = None,
) -> Shard:
    """Open one shard and check it against its manifest entry; raises UserError when they differ."""
    if is_remote(directory):
        from nanolm.data.shards.remote_shard import RemoteShard  # noqa: PLC0415  (most runs need none)

        cache = cache or CacheConfig()
        store = ObjectStore(str(directory), cache.retry_seconds)
        shard: Shard = RemoteShard(store, entry, cache)
    else:
        shard = _open_local(pathlib.Path(directory) / entry["file"], entry)
    path = shard.path
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


def _open_local(path: pathlib.Path, entry: dict) -> Shard:
    if not path.is_file():
        raise UserError(f"shard {path} is missing; restore it or prepare the data again")
    if path.stat().st_size != entry["size"]:
        raise damaged(path, f"{path.stat().st_size} bytes instead of {entry['size']}")
    return Shard(path)


def open_split(
    directory: str | pathlib.Path,
    split: str,
    *,
    tokenizer_hash: str | None = None,
    cache: CacheConfig | None = None,
) -> tuple[Manifest, list[Shard]]:
    """Open the shards of a split, memory-mapped, or of a bucket through this node's `cache`.

    tokenizer_hash: the tokenizer that the caller will use (a checkpoint's, say). Raises UserError
    for a directory without manifest, an empty or unknown split, a missing, truncated or damaged
    shard, and another tokenizer.
    """
    cache = cache or CacheConfig()
    manifest = Manifest.load(directory, cache.retry_seconds)
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
            f"prepare it into another folder with --{split}_fraction above 0"
        )
    entries = manifest.splits[split]
    return manifest, [open_shard(directory, manifest, entry, cache) for entry in entries]


def open_tokenizer(directory: str | pathlib.Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared directory; raises UserError when it is not the one recorded."""
    where = f"{directory}/{manifest.tokenizer}"
    tokenizer = Tokenizer(read_file(directory, manifest.tokenizer), where)
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer that wrote the shards beside it; "
            f"restore it or prepare the data again"
        )
    return tokenizer


def unigram_counts(directory: str | pathlib.Path, manifest: Manifest) -> np.ndarray:
    """int64[V]: how often each token id occurs in the train split."""
    path = f"{directory}/{manifest.unigram}"
    try:
        counts = np.load(io.BytesIO(read_file(directory, manifest.unigram)))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged; prepare the data again") from error
    if counts.shape != (manifest.vocab_size,):
        raise UserError(f"{path} does not fit the vocabulary; prepare the data again")
    return counts


def verify(directory: str | pathlib.Path) -> Manifest:
    """Re-read everything: checksums, ids, boundaries, counts, tokenizer, unigram table.

    Returns the manifest; raises UserError at the first thing that is not as recorded.
    """
    manifest = Manifest.load(directory)
    tokenizer = open_tokenizer(directory, manifest)
    if tokenizer.vocab_size != manifest.vocab_size or tokenizer.roles() != manifest.special_ids:
        raise UserError(f"{directory}/{MANIFEST_FILE} does not describe its own tokenizer")
    counts = np.zeros(manifest.vocab_size, np.int64)
    for split, entries in manifest.splits.items():
        for entry in entries:
            shard = open_shard(directory, manifest, entry)
            sha256, tokens = shard.sha256_and_tokens()
            if sha256 != entry["sha256"]:
                raise damaged(shard.path, "its checksum is not the one recorded")
            check_ids(shard, tokens)
            if shard.sentences is not None:
                shard.sentence_starts()
            if np.any(tokens[shard.offsets[1:] - 1] != tokenizer.eos):
                raise damaged(shard.path, "a document does not end with eos")
            if split == "train":
                counts += count_ids(tokens, manifest.vocab_size)
    recorded = hashlib.sha256(read_file(directory, manifest.unigram)).hexdigest()
    if recorded != manifest.unigram_sha256 or np.any(counts != unigram_counts(directory, manifest)):
        raise UserError(f"{directory}/{manifest.unigram} does not match the shards beside it")
    same = data_hash(manifest.tokenizer_hash, manifest.splits) == manifest.data_hash
    if not same or split_totals(manifest.splits) != manifest.totals:
        raise UserError(f"{directory}/{MANIFEST_FILE} contradicts itself; prepare the data again")
    return manifest
