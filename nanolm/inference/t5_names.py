"""A T5's tensors under our names and under those of `transformers`, by the table of its family
(hub/families/t5.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.families.t5 import T5
from nanolm.hub.keys import Tensors


def to_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """A Learner's tensors under the names of T5ForConditionalGeneration."""
    named = T5.table.to_theirs(tensors, model)
    if model.tied:
        named.pop(T5.projection, None)
    return named


def from_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of T5ForConditionalGeneration under a Learner's names."""
    named = T5.table.to_ours(tensors, model)
    return {"heads.lm.weight": named["trunk.embedding.weight"], **named}
