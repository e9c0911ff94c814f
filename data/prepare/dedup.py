"""Exact de-duplication in bounded memory: the first document in input order stays.

Every unit left its documents' digests (BLAKE2b, 128 bits) on disk, sorted. A partition is a range
of digest values; it gathers its slice from every unit (a binary search in each memory-mapped file),
sorts them together, and everything but the first of each digest is a duplicate. The number of
partitions follows from the number of documents, so each one fits its share of memory; the result
does not depend on it.
"""

from __future__ import annotations

import pathlib

import numpy as np

from nanolm.data.prepare.spool import KEY, Unit
from nanolm.files import AtomicFile

DUPLICATE = np.dtype([("unit", "<u4"), ("document", "<u4")])
# What one key costs while its partition is sorted: the table, its unit column, the sort's indices.
BYTES_PER_KEY = 128
PARTITION_MEMORY = 1 << 28


def partition_count(documents: int, memory: int = PARTITION_MEMORY) -> int:
    """How many partitions keep each within `memory` bytes on average."""
    return max(1, -(-documents * BYTES_PER_KEY // memory))


def find_duplicates(
    units: list[Unit], partition: int, partitions: int, path: pathlib.Path
) -> tuple[int, int]:
    """Write the duplicates of one partition, sorted by unit and document, to an .npy file.

    Returns their number and their bytes of text.
    """
    low, high = (bound << 64 for bound in (partition, partition + 1))
    first, last = (-(-bound // partitions) for bound in (low, high))
    slices, owners = [np.empty(0, KEY)], [np.empty(0, np.uint32)]
    for unit in units:
        keys = np.load(unit.path(".keys.npy"), mmap_mode="r")
        begin = np.searchsorted(keys["high"], np.uint64(first)) if partition else 0
        end = np.searchsorted(keys["high"], np.uint64(last)) if last < 1 << 64 else len(keys)
        slices.append(np.asarray(keys[begin:end]))
        owners.append(np.full(end - begin, unit.index, np.uint32))
    keys, owner = np.concatenate(slices), np.concatenate(owners)
    # Slices come in input order and the sort is stable, so the first of equals came first.
    order = np.lexsort((keys["low"], keys["high"]))
    keys, owner = keys[order], owner[order]
    repeats = np.zeros(len(keys), bool)
    repeats[1:] = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    found = np.empty(int(repeats.sum()), DUPLICATE)
    found["unit"], found["document"] = owner[repeats], keys["document"][repeats]
    found.sort(order=["unit", "document"])
    with AtomicFile(path) as file:
        np.lib.format.write_array(file, found)
    return len(found), int(keys["bytes"][repeats].sum(dtype=np.int64))


def kept(unit: Unit, documents: int, duplicate_files: list[pathlib.Path]) -> np.ndarray:
    """bool[documents]: which documents of a unit are no duplicates of earlier ones."""
    keep = np.ones(documents, bool)
    for path in duplicate_files:
        found = np.load(path, mmap_mode="r")
        begin, end = np.searchsorted(found["unit"], [unit.index, unit.index + 1])
        keep[found["document"][begin:end]] = False
    return keep
