"""Facts of a checkpoint: hashes of the tokenizer and the data that it was trained with.

Wherever data or weights meet a checkpoint they are compared here: another tokenizer gives other
tokens the same numbers, which no shape betrays, and a folder may have been prepared anew in place.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from nanolm.checkpoint.checkpoints import read_trainer
from nanolm.data.stream import RowStream
from nanolm.errors import UserError


def facts_of(stream: RowStream) -> dict[str, str]:
    """The hashes that a checkpoint keeps of what it is trained with."""
    hashes = {"tokenizer_hash": stream.manifests[0].tokenizer_hash}
    return {"data_hash": data_hash(stream), **hashes}


def data_hash(stream: RowStream) -> str:
    """One hash of all corpora with their weights."""
    parts = [
        f"{manifest.data_hash} {weight!r}"
        for manifest, (_, weight) in zip(stream.manifests, stream.corpora, strict=True)
    ]
    if len(parts) == 1:
        return stream.manifests[0].data_hash
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def require_same_facts(
    checkpoint: pathlib.Path,
    facts: Mapping[str, Any],
    remedy: str,
    saved: Mapping[str, Any] | None = None,
) -> None:
    """Raises UserError, with the remedy, unless the checkpoint was trained with these facts.

    `saved` are the facts in its trainer.json, when that was read already. A fact that was not
    written down, as in a folder without trainer.json, is not compared.
    """
    if saved is None:
        held = (checkpoint / "trainer.json").is_file()
        saved = read_trainer(checkpoint)["facts"] if held else {}
    for key, value in facts.items():
        if saved.get(key, value) != value:
            raise UserError(
                f"checkpoint {checkpoint} was trained with another {key} ({saved[key]}) than what "
                f"is here ({value}); {remedy}"
            )
