"""From a published folder to a checkpoint folder: read, prove, write; and `init_from: hf:PATH`."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable
from typing import Any

from nanolm.checkpoint.container import write_folder
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.load import dump
from nanolm.data.json_pieces import JSON_FILE
from nanolm.errors import UserError, require
from nanolm.hub.folder import NeedsFlagError
from nanolm.hub.gguf.importing import read_gguf
from nanolm.hub.gguf.proof import told_vocabulary
from nanolm.hub.proof import LIMIT, Proof, can_prove, prove
from nanolm.hub.published import Imported, read_published
from nanolm.hub.tokenizer_files import opened, require_same_frame, told

PREFIX = "hf:"
CACHE = "~/.cache/nanolm/imported"
Note = Callable[[str], None]


def import_folder(
    folder: pathlib.Path,
    out: pathlib.Path,
    *,
    family: str | None = None,
    pickled: bool = False,
    note: Note,
) -> dict[str, Any]:
    """Writes the published model in `folder`, or in the GGUF file of that name, as the checkpoint
    folder `out`; returns the figures.

    Raises UserError, with nothing written, for a fault in the folder or when transformers computes
    something else.
    """
    if folder.is_file():
        imported = read_gguf(folder, family=family)
    else:
        imported = read_published(folder, family=family, pickled=pickled)
    for key in imported.fresh:
        note(f"fresh: {folder} has no {key}, which starts from random weights")
    for key in imported.left_out:
        note(f"left out: {key} of {folder}, which no head of nanolm reads")
    for role, piece in imported.tokenizer.missing.items():
        note(f"no {role} piece: {folder} names {piece}, which its vocabulary lacks")
    proof = proved(imported, str(folder), note)
    if folder.is_file():
        differing = told_vocabulary(imported.tokenizer, folder, note)
    else:
        differing = told_ids(imported, folder, note) if proof else None
    tensors = learner_tensors(imported.learner)
    files = {
        "config.yaml": dump(imported.config).encode(),
        imported.tokenizer.file_name: imported.tokenizer.model_bytes,
    }
    write_folder(out, {"model": tensors}, files)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    note(
        f"{folder}: {imported.family.name}, {len(tensors)} tensors, {numbers:,} numbers, "
        f"written to {out}"
    )
    return {
        "family": imported.family.name,
        "tensors": len(tensors),
        "numbers": numbers,
        "fresh": list(imported.fresh),
        "left_out": list(imported.left_out),
        "largest_difference": None if proof is None else proof.largest,
        "greedy_tokens": None if proof is None else proof.greedy,
        "texts_with_other_ids": differing,
    }


def proved(imported: Imported, what: str, note: Note, theirs: Any = None) -> Proof | None:
    """The proof, told; None where transformers is not installed. See `prove` for `theirs`.

    Raises UserError above LIMIT.
    """
    if not can_prove():
        note("the proof was left out: transformers is not installed")
        return None
    proof = prove(imported, theirs)
    require(
        not math.isnan(proof.largest),
        f"{what} computes numbers that are NaN or infinite, of which nothing can be proved; choose "
        f"a checkpoint from before they appeared; nothing is written",
    )
    require(
        proof.largest <= LIMIT,
        f"transformers computes something else of {what}: the largest difference is "
        f"{proof.largest:.1e}, above {LIMIT:.0e}; nothing is written",
    )
    wrote = "" if proof.greedy is None else f"; {proof.greedy} greedy tokens alike"
    note(f"proof: largest difference from transformers {proof.largest:.1e} (float32){wrote}")
    return proof


def told_ids(imported: Imported, folder: pathlib.Path, note: Note) -> int | None:
    """Sample texts that get other ids by transformers' tokenizer of the folder, told; None where it
    opens none."""
    if not (folder / JSON_FILE).is_file():
        note(
            f"the proof of the tokenizer was left out: {folder} holds no {JSON_FILE}, and its ids "
            f"are those of SentencePiece, which reads {imported.tokenizer.path} itself"
        )
        return None
    if getattr(imported.config.objective, "frame", "trunk") == "tokenizer":
        require_same_frame(imported.tokenizer, folder)
    try:
        encode = opened(folder)
    except Exception as error:  # noqa: BLE001  (any, of code that is not ours; it is told)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        note(f"the proof of the tokenizer was left out: transformers does not open it ({said})")
        return None
    return told(imported.tokenizer, encode, note)


def base_of(init_from: str | None, note: Note = print) -> str | None:
    """The checkpoint that init_from means: of hf:PATH the folder in the cache that PATH was, or is
    now, imported to; anything else is returned as it is.

    Raises UserError for a fault in PATH, as `nanolm import` does.
    """
    if init_from is None or not init_from.startswith(PREFIX):
        return init_from
    source = pathlib.Path(init_from.removeprefix(PREFIX)).expanduser()
    require(source.exists(), f"init_from={init_from}: there is no folder or GGUF file {source}")
    out = pathlib.Path(CACHE).expanduser() / fingerprint(source)
    if not out.is_dir():
        own = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            import_folder(source, own, note=note)
        except NeedsFlagError as error:
            raise UserError(
                f"{error}: run `nanolm import {shlex.quote(str(source))} OUT {error.flag}`, and "
                f"init_from takes OUT"
            ) from error
        try:
            own.rename(out)
        except OSError as error:
            shutil.rmtree(own)
            if not out.is_dir():  # or another rank was faster
                raise UserError(f"{out} not written: {error.strerror}") from error
    return str(out)


def fingerprint(source: pathlib.Path) -> str:
    """A name for what a folder, or a file, holds now: its files with their sizes and times."""
    whole = source.resolve()
    inside = whole.iterdir() if whole.is_dir() else [whole]
    files = sorted(path for path in inside if path.is_file())
    told = [f"{path} {(stat := path.stat()).st_size} {stat.st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]
