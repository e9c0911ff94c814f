"""`nanolm merge`: fold an adapter (LoRA, DoRA, …) into its base's weights.

What is written is a checkpoint like any other, with no adapter, that needs no base.
"""

from __future__ import annotations

import dataclasses
import pathlib

import torch

from nanolm.checkpoint.container import INDEX, write_folder
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.commands.json_file import write_json
from nanolm.config.load import dump
from nanolm.errors import UserError, require
from nanolm.model.trunk import Inputs
from nanolm.peft.base import NoPeftOptions, merge
from nanolm.peft.files import DESCRIPTION
from nanolm.saved import Saved, open_saved
from nanolm.terminal import say

POSITIONAL = ("run",)
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fold an adapter into its base's weights."""

    run: str
    """Folder of a run with an adapter, or of one of its checkpoints."""
    out: str
    """Folder to write the merged checkpoint to."""
    base: str | None = None
    """Folder of the adapter's base, where it no longer lies where the run found it."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write the figures to this file."""


@torch.no_grad()
def hidden_states(saved: Saved) -> torch.Tensor:
    """Hidden states of some random tokens, by which two states of a model are compared."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, saved.config.model.max_length)
    tokens_BT = torch.randint(0, saved.tokenizer.vocab_size, (4, length), generator=generator)
    return saved.learner.trunk(Inputs(tokens_BT=tokens_BT))


def merged_files(saved: Saved) -> dict[str, bytes]:
    """The checkpoint's files besides its tensors, with a config that has no adapter."""
    config = dataclasses.replace(saved.config, peft=NoPeftOptions(), init_from=None)
    kept = {
        path.name: path.read_bytes()
        for path in saved.folder.iterdir()
        if path.suffix != ".safetensors" and path.name not in (INDEX, DESCRIPTION)
    }
    return kept | {"config.yaml": dump(config).encode()}


def run(arguments: Arguments) -> None:
    """Merge, compare, write."""
    out = pathlib.Path(arguments.out)
    require(not out.exists(), f"--out {out} exists already; name a folder that does not")
    saved = open_saved(arguments.run, plugins=arguments.plugins, base=arguments.base)
    adapter = saved.learner.adapter
    if adapter is None:
        raise UserError(f"{saved.folder} has no adapter (peft is none): nothing to merge")
    before = hidden_states(saved)
    small = sum(tensor.numel() for tensor in adapter.tensors(saved.learner).values())
    merge(saved.learner)
    difference = float((hidden_states(saved) - before).abs().max())
    require(
        difference <= TOLERANCE * max(1.0, float(before.abs().max())),
        f"merging changed the hidden states by {difference:.3g}; nothing was written",
    )
    write_folder(out, {"model": learner_tensors(saved.learner)}, merged_files(saved))
    say(
        f"{adapter.options.name}: {small:,} numbers folded into {out}; largest change of a hidden "
        f"state {difference:.2g}"
    )
    write_json(
        arguments.json,
        {
            "out": str(out),
            "method": adapter.options.name,
            "adapter_numbers": small,
            "largest_difference": difference,
        },
    )
