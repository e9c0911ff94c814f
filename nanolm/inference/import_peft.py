"""An adapter of `peft` as a checkpoint of a LoRA or DoRA run on a base that was imported.

nanolm import BASE base
nanolm import ADAPTER run --base base
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch

from nanolm.checkpoint.container import write_folder
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.load import dump
from nanolm.errors import UserError, require
from nanolm.hub.adapter_files import CONFIG, dropout_of, read_adapter
from nanolm.hub.adapters import Ours, require_shapes, to_ours
from nanolm.hub.importing import Note, proved
from nanolm.hub.proof import their_model
from nanolm.inference.export_peft import base_tensors, can_prove_adapter, opened_by_peft
from nanolm.inference.export_transformers import as_published, family_of, transformers_folder
from nanolm.peft.base import attach
from nanolm.peft.files import DESCRIPTION, adapter_files
from nanolm.registry import PEFT, Options
from nanolm.saved import Saved, open_saved


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter of peft, and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def import_adapter(
    folder: pathlib.Path, out: pathlib.Path, base: str | None, note: Note
) -> dict[str, Any]:
    """Writes the adapter in `folder` as the checkpoint folder `out`; returns the figures.

    Raises UserError, with nothing written, for a fault in the folder, a base that it does not fit,
    or when peft computes something else.
    """
    if base is None:
        raise UserError(
            f"{folder} holds an adapter ({CONFIG}); import its base first, and name that: "
            f"--base OUT"
        )
    saved = open_saved(base)
    require(
        saved.learner.adapter is None,
        f"--base {base} holds an adapter itself; name the base that it belongs to",
    )
    model = saved.config.model
    family = family_of(model, learner_tensors(saved.learner), saved.tokenizer.roles())
    changes, facts = read_adapter(folder)
    frozen = base_tensors(saved.learner)
    ours = to_ours(family, model, changes, frozen, str(folder))
    options = options_of(ours, dropout_of(folder / CONFIG, facts))
    adapter = attach(saved.learner, options, base=str(saved.folder))
    live = adapter.tensors(saved.learner)
    require_shapes(live, ours.tensors, str(folder))
    with torch.no_grad():
        for name, tensor in ours.tensors.items():
            live[name].copy_(tensor)
    difference = proved_by_peft(saved, frozen, folder, note)
    config = dataclasses.replace(saved.config, peft=options, init_from=str(saved.folder))
    files = {
        "config.yaml": dump(config).encode(),
        saved.tokenizer.file_name: saved.tokenizer.model_bytes,
    }
    write_folder(out, {"model": live}, files | adapter_files(saved.learner))
    numbers = sum(tensor.numel() for tensor in live.values())
    note(
        f"{folder}: {options.name} of rank {ours.rank} on {', '.join(ours.targets)}, {numbers:,} "
        f"numbers, written to {out} ({DESCRIPTION} names the base {saved.folder})"
    )
    return {
        "family": family.name,
        "method": options.name,
        "tensors": len(live),
        "numbers": numbers,
        "largest_difference": difference,
    }


def options_of(ours: Ours, dropout: float) -> Options:
    """The options of our method."""
    name = "dora" if ours.dora else "lora"
    options: Any = PEFT.get(name).options
    return options(
        rank=ours.rank,
        alpha=ours.scale * ours.rank,
        dropout=dropout,
        targets=list(ours.targets),
    )


def proved_by_peft(
    saved: Saved, frozen: dict[str, torch.Tensor], folder: pathlib.Path, note: Note
) -> float | None:
    """The largest difference from peft's model of the same base, told; None without peft."""
    if not can_prove_adapter(note):
        return None
    named, published = transformers_folder(saved.config, saved.tokenizer, frozen)
    imported = as_published(saved.config, saved.tokenizer, saved.learner, named, published)
    theirs = opened_by_peft(their_model(imported), folder)
    proof = proved(imported, str(folder), note, theirs)
    return None if proof is None else proof.largest
