"""What a family of published models is, and what its members share.

A family is one table of keys (`../keys.py`), its config.json in both directions, and what its old
files call their tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.configs import Published
from nanolm.hub.keys import Table

BLOCK = "trunk.stack.blocks.{}"
PLAIN = ("gelu", "gelu_tanh", "relu2")

COMMON = {
    "share_layers": False,
    "qk_norm": False,
    "embedding_scale": False,
    "attention_softcap": None,
    "attention_scale": None,
    "logit_scale": False,
    "logit_softcap": None,
}
"""Keys of the model that families fix unless they say otherwise."""
EVERYWHERE = {"window": [None], "n_segments": 0}
"""Keys that most of them fix too: every layer sees all, and there are no segments."""


def attention_rows(model: ModelConfig) -> list[int]:
    """Rows of queries, keys and values."""
    queries, keys = (heads * model.head_width for heads in (model.n_heads, model.kv_heads))
    return [queries, keys, keys]


def gate_rows(model: ModelConfig) -> list[int]:
    """Rows of the gate and of what it gates."""
    return [model.ff_width, model.ff_width]


def shared_width(model: ModelConfig) -> list[str]:
    """What keeps a family out whose heads share the width evenly, one key for each query."""
    found = []
    if model.kv_heads != model.n_heads:
        found.append(f"model.n_kv_heads is {model.n_kv_heads}")
    if model.head_width * model.n_heads != model.d_model:
        found.append(f"model.head_dim is {model.head_dim}")
    return found


def whole_rotation(model: ModelConfig) -> list[str]:
    """What keeps a family out that rotates all features of a head."""
    fraction = getattr(model.positions, "fraction", 1.0)
    return [] if fraction == 1.0 else [f"model.positions.fraction is {fraction}"]


def unscaled_rotation(model: ModelConfig) -> list[str]:
    """What keeps a format out that knows no scaled rotary positions."""
    scaling = getattr(model.positions, "scaling", "none")
    return [] if scaling == "none" else [f"model.positions.scaling is {scaling}"]


def rotary_bases(model: ModelConfig) -> list[float]:
    """The bases of rotary positions; [0.0] of others, whose own base may mean something else."""
    positions: Any = model.positions
    return positions.base if positions.name == "rotary" else [0.0]


def one_rotation(model: ModelConfig) -> list[str]:
    """What keeps a family out that rotates in all layers alike."""
    bases = rotary_bases(model)
    several = [f"model.positions.base is {bases}"] if len(set(bases)) > 1 else []
    return several + whole_rotation(model)


@dataclasses.dataclass(frozen=True)
class Classes:
    """What `transformers` calls the family's config and its model, without and with a pooler."""

    config: str
    plain: str
    pooled: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family: its keys, its config.json, and what its old files call them."""

    name: str
    table: Table
    classes: Classes
    fits: Mapping[str, Any]
    """Keys of our model that the family fixes: a value, or a tuple of those that it knows."""
    narrow: bool = False
    """Whether its embeddings have a width of their own."""
    acts_alike: bool = False
    """Whether the transform before the vocabulary has the activation of the blocks; that of other
    families is an exact GELU."""
    misfits: Callable[[ModelConfig], list[str]] = shared_width
    """What else of our model the family does not compute, in words."""
    pad: int | None = None
    """The id that padding has, where the family counts positions by it."""
    to_config: Callable[[ModelConfig, Mapping[str, Tensor]], dict[str, Any]]
    """config.json of our model with these published tensors, without what all families have."""
    to_model: Callable[[Published], dict[str, Any]]
    """Keys of our model of a config.json."""
    tied: bool
    """Whether the vocabulary head shares the embedding where config.json says nothing."""
    embedding: str
    """The published key of the token embedding."""
    projection: str
    """The published key of the vocabulary head's weight, a duplicate of it where they are tied."""
    duplicates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Published keys that some files hold too, and whose they are."""
    repeats: bool = True
    """Whether a model whose head is not tied is written with these duplicates."""
    prefix: str = ""
    """What the trunk's keys begin with; some files leave it out, or have it twice."""
    buffers: str = r"(?!)"
    """Pattern of keys that are no weights."""
    unread: str = r"(?!)"
    """Pattern of weights that no head of ours reads; what is left out is announced."""
    heads: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Our heads that a file may lack as a whole, with the prefixes of their published keys."""
    has_head: str | None = None
    """One of our tensors without which the family is not computed, and what that would be."""
    objective: Callable[[frozenset[str]], dict[str, Any]] = lambda names: {"name": "clm"}
    """The objective that the published keys make: it decides which heads there are."""

    def why_not(self, model: ModelConfig) -> list[str]:
        """What keeps this family from computing a model, in words; nothing if it does."""
        found = []
        for key, wanted in (COMMON | dict(self.fits)).items():
            value: Any = model
            for part in key.split("."):
                value = getattr(value, part)
            if not (value in wanted if isinstance(wanted, tuple) else value == wanted):
                found.append(f"model.{key} is {value}")
        if self.narrow != (model.embedding_width is not None):
            found.append(f"model.embedding_width is {model.embedding_width}")
        return found + self.misfits(model)

    def head_activation(self, model: ModelConfig) -> str:
        """The activation that the family's transform before the vocabulary has in such a model."""
        return model.feed_forward if self.acts_alike else "gelu"
