"""An XLNet's tensors under our names and under those of `transformers`, by the table of its family
(hub/families/xlnet.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.families.xlnet import XLNET
from nanolm.hub.keys import Tensors


def to_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """A Learner's tensors under the names of XLNetLMHeadModel."""
    named = XLNET.table.to_theirs(tensors, model)
    if model.tied:
        named.pop(XLNET.projection, None)
    return named


def from_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of XLNetLMHeadModel under a Learner's names."""
    named = XLNET.table.to_ours(tensors, model)
    return {"heads.lm.weight": named["trunk.embedding.weight"], **named}
