"""`nanolm data verify DIR`: every checksum, token id and count of a prepared folder, re-checked."""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.data.shards.directory import verify
from nanolm.terminal import say

POSITIONAL = ("directory",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Re-check a prepared folder."""

    directory: str
    """Folder that `nanolm prepare` wrote."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Verify; what is damaged raises UserError."""
    manifest = verify(arguments.directory)
    shards = sum(map(len, manifest.splits.values()))
    tokens = sum(total["tokens"] for total in manifest.totals.values())
    say(f"{arguments.directory}: {shards} shards, {tokens:,} tokens, all as recorded")
    write_json(
        arguments.json, {"shards": shards, "tokens": tokens, "data_hash": manifest.data_hash}
    )
