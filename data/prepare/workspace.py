"""The workspace: where an unfinished preparation lives, and what makes it safe to continue.

Everything but finished shards stands in `OUT/.work`, which goes when the manifest is written.
`plan.json` in it holds the configuration and what the input looked like; a continuation must agree
with both. A lock keeps a second process out, and the kernel frees it when its holder is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
from typing import Any, Self

from nanolm.data.prepare.sources import Piece
from nanolm.data.prepare.spool import Unit
from nanolm.data.readers import work_bytes
from nanolm.data.shards.directory import MANIFEST_FILE, Manifest
from nanolm.data.tokenizer import MODEL_FILE
from nanolm.errors import UserError
from nanolm.files import full_disk_is_told, remove_leftovers, write_json

WORK = ".work"
PLAN_FILE = "plan.json"
LOCK_FILE = "lock"
LATER = (
    "deduplicate",
    "val_fraction",
    "test_fraction",
    "tokenizer",
    "tokenizer_type",
    "vocab_size",
    "character_coverage",
    "sample_bytes",
    "sentences",
    "shard_tokens",
)
"""Keys that matter after the text was read and cleaned."""


class Workspace:
    """Use it as a context manager: it takes the lock, and frees it at the end.

    Raises UserError when the directory belongs to something else or is being written.
    """

    def __init__(self, out: str) -> None:
        self.out = pathlib.Path(out)
        self.work = self.out / WORK

    def __enter__(self) -> Self:
        try:
            foreign = self.out.is_dir() and any(self.out.iterdir())
            if foreign and not (self.out / MANIFEST_FILE).exists() and not self.work.is_dir():
                raise UserError(
                    f"{self.out} is not empty and was not written by `nanolm prepare`; choose "
                    f"another --out"
                )
            with full_disk_is_told(self.work):
                self.work.mkdir(parents=True, exist_ok=True)
                self._lock = open(self.work / LOCK_FILE, "w")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.out} ({error.strerror}); choose another --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(
                f"another process is preparing {self.out}; wait for it, or choose another --out"
            ) from error
        remove_leftovers(self.out)
        return self

    def __exit__(self, *_: object) -> None:
        if (self.out / MANIFEST_FILE).exists():  # the result is whole and needs no workspace
            shutil.rmtree(self.work)
        self._lock.close()

    def finished(self, config: dict[str, Any]) -> Manifest | None:
        """The manifest when this directory is whole already, of the same configuration."""
        if not (self.out / MANIFEST_FILE).exists():
            return None
        manifest = Manifest.load(self.out)
        self._refuse_other(manifest.config, config)
        return manifest

    def adopt_plan(self, config: dict[str, Any], pieces: list[Piece]) -> list[Unit]:
        """Record the plan, or check it against the recorded one; returns the units of work.

        A plan under which nothing was finished yet is simply replaced. Until a tokenizer was
        written, keys may change that the cleaned text does not depend on (`LATER`): a vocabulary
        that did not fit is mended without reading all again.
        """
        plan = {"config": config, "inputs": [piece.identity() for piece in pieces]}
        path = self.work / PLAN_FILE
        if path.exists() and any(self.work.glob("unit-*.json")):
            held = json.loads(path.read_bytes())
            free = () if (self.out / MODEL_FILE).exists() else LATER
            self._refuse_other(held["config"], config, free)
            if held["inputs"] != json.loads(json.dumps(plan["inputs"])):
                raise UserError(
                    f"the input files changed since the preparation of {self.out} was interrupted; "
                    f"delete {self.out} and start again"
                )
        write_json(path, plan)
        return self._units(pieces)

    def _units(self, pieces: list[Piece]) -> list[Unit]:
        bound = work_bytes(sum(piece.size for piece in pieces))
        units: list[Unit] = []
        held: list[Piece] = []
        for number, piece in enumerate(pieces):
            held.append(piece)
            size = sum(piece.size for piece in held)
            if size >= bound or number == len(pieces) - 1:
                stem = self.work / f"unit-{len(units):06d}"
                units.append(Unit(len(units), stem, tuple(held), size))
                held = []
        return units

    def _refuse_other(
        self, held: dict[str, Any], wanted: dict[str, Any], free: tuple[str, ...] = ()
    ) -> None:
        wanted = json.loads(json.dumps(wanted))
        for key in sorted({*held, *wanted} - {*free}):
            if held.get(key) != wanted.get(key):
                raise UserError(
                    f"{os.fspath(self.out)} was prepared with {key} {held.get(key)!r}, not "
                    f"{wanted.get(key)!r}; choose another --out, or delete it to start again"
                )
