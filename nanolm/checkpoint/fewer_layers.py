"""A smaller model that starts from some of another one's layers, as DistilBERT did from BERT's
(Sanh et al. 2019, section 3)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from nanolm.checkpoint.checkpoints import fill_learner, trained_tensors
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.errors import require

BLOCKS = "trunk.stack.blocks."
SEGMENTS = "trunk.segments.weight"


def load_layers(
    path: str | pathlib.Path, learner: nn.Module, layers: Sequence[int]
) -> tuple[list[str], list[str]]:
    """Fills the trunk from a checkpoint, its block i from the checkpoint's block `layers[i]`, and
    each head that matches; returns (heads that start fresh, weights that were left out).

    Left out are the vectors of segments, where the learner has none. Raises UserError for a layer
    that the checkpoint lacks, and when the trunk is of another shape otherwise.
    """
    folder, saved = trained_tensors(path)
    live = learner_tensors(learner)
    blocks = cast(nn.ModuleList, cast(nn.Module, learner.trunk).blocks)
    require(
        not any(name.startswith("trunk.encoder_stack.") for name in live),
        "init_layers chooses among the layers of one stack, and model.trunk=encoder_decoder has "
        "two; leave init_layers out",
    )
    require(
        len(layers) == len(blocks),
        f"init_layers names {len(layers)} layers and the model has {len(blocks)} "
        f"(model.n_layers); name one for each",
    )
    found = 1 + max((number_of(name) for name in saved), default=-1)
    missing = [layer for layer in layers if not 0 <= layer < found]
    require(
        not missing,
        f"init_layers names layer {missing[0] if missing else ''}, and {folder} has those from 0 "
        f"to {found - 1}",
    )
    left_out = [SEGMENTS] if SEGMENTS in saved and SEGMENTS not in live else []
    chosen = chosen_layers(saved, layers)
    kept = {name: tensor for name, tensor in chosen.items() if name not in left_out}
    return fill_learner(learner, kept, f"checkpoint {folder}"), left_out


def number_of(name: str) -> int:
    """The number of the block that a tensor belongs to; -1 for one of no block."""
    return int(name.removeprefix(BLOCKS).split(".")[0]) if name.startswith(BLOCKS) else -1


def chosen_layers(saved: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a model that has only these blocks, in this order."""
    found = {name: tensor for name, tensor in saved.items() if number_of(name) < 0}
    for place, layer in enumerate(layers):
        theirs, ours = f"{BLOCKS}{layer}.", f"{BLOCKS}{place}."
        found |= {
            ours + name.removeprefix(theirs): tensor
            for name, tensor in saved.items()
            if name.startswith(theirs)
        }
    return found
