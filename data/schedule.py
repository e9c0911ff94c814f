"""Who reads which rows: pure arithmetic between a step number and the rows of one rank.

Step s trains on the global batch of rows [s G, (s+1) G), whatever the number of ranks. Rank r of w
takes the contiguous share

    [s G + floor(r G / w),  s G + floor((r+1) G / w))

(uneven when w does not divide G, empty when w > G) and cuts it in micro-batches. Nothing here
remembers anything: seeking to a step *is* computing these two numbers. It stands before the stream
in a batch's journey (schedule -> mixture -> permutation -> stream -> loader).
"""

from __future__ import annotations


def share_of(first: int, last: int, rank: int, world: int) -> range:
    """The contiguous part of rows [first, last) that falls to `rank` of `world` ranks.

    Raises ValueError for a rank outside range(world).
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in range({world})")
    size = last - first
    return range(first + rank * size // world, first + (rank + 1) * size // world)


def cut(rows: range, longest: int) -> list[range]:
    """Cut a range into consecutive pieces of at most `longest` rows; an empty range has none."""
    if longest < 1:
        raise ValueError(f"a micro-batch must hold at least one row, not {longest}")
    return [rows[i : i + longest] for i in range(0, len(rows), longest)]


def shard_rows(
    step: int, global_batch: int, rank: int, world: int, micro_batch: int
) -> list[range]:
    """Global row numbers of one rank's micro-batches in optimizer step `step` (from 0)."""
    first = step * global_batch
    return cut(share_of(first, first + global_batch, rank, world), micro_batch)
