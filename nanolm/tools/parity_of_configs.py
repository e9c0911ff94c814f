"""A run's model in its full size beside that of transformers: as many parameters, the same numbers.

The weights are those that a run begins with: larger ones, as small models are compared with, would
at these widths only show how rounding grows. The tokenizer stands in for one of the size that the
config says; nothing is downloaded and nothing is written.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from nanolm import build
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.load import load_config
from nanolm.errors import require
from nanolm.hub.proof import prove, their_model
from nanolm.inference.export_transformers import as_published, transformers_folder
from nanolm.tools.stand_in import stand_in_tokenizer


@dataclasses.dataclass(frozen=True)
class Compared:
    """What was found of one config."""

    family: str
    parameters: int
    theirs: int
    """Parameters that transformers counts."""
    largest: float
    """The largest difference of hidden states and logits."""


def compared(path: str) -> Compared:
    """The model of a run's YAML file beside that of its family.

    Raises UserError for a config without model.vocab_size, and when no family computes the model.
    """
    config = load_config([f"--config={path}"])
    size = config.model.vocab_size
    require(size is not None, f"{path} leaves model.vocab_size to its data; set it there")
    tokenizer = stand_in_tokenizer(int(size or 0))
    config = build.resolve(config, tokenizer)
    learner = build.build_learner(config, build.build_objective(config, tokenizer), phase="prefill")
    tensors, files = transformers_folder(config, tokenizer, learner_tensors(learner))
    published = as_published(config, tokenizer, learner.eval(), tensors, files)
    theirs = count(their_model(published))
    return Compared(published.family.name, count(learner), theirs, prove(published).largest)


def count(module: nn.Module) -> int:
    """Parameters, a shared one once."""
    return sum(parameter.numel() for parameter in module.parameters())
