"""XLNet (Yang et al. 2019): two streams, distances and segments that each layer weighs for itself.

Its projections are [D, H, K] where ours are the rows of linear layers, queries, keys and values in
one weight; u, w and v, the biases of a query, lie in one tensor here. Every number is kept.

Shapes: D model width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.configs import ACTIVATIONS, Published
from nanolm.hub.families.base import BLOCK, EVERYWHERE, PLAIN, Classes, Family, shared_width
from nanolm.hub.keys import Rule, Table, pair, same

LAYER = "transformer.layer.{}"
FEED_FORWARDS = {**ACTIVATIONS, "relu": "relu"}
SEGMENTS = 3
"""Two texts and <cls>; `transformers` knows no number of them, since only equality counts."""
BASE = 10000.0
"""Ratio between the longest and the shortest wavelength of its sinusoids."""
LENGTH = 512
"""Tokens of a row in pretraining; `transformers` sets no limit either."""


@dataclasses.dataclass(frozen=True)
class Projections(Rule):
    """Published projections [D, H, K], one or several, as the rows [H K, D] of one of ours."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of the published ones."""
        return torch.cat([part.flatten(1).T for part in parts])

    def divide(self, whole: Tensor, model: ModelConfig) -> list[Tensor]:
        """The published tensors of ours."""
        parts = whole.chunk(len(self.theirs))
        return [part.T.unflatten(1, (model.n_heads, model.head_width)) for part in parts]


@dataclasses.dataclass(frozen=True)
class Output(Rule):
    """The published projection back, [D, H, K], as our [D, H K]."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of the published one."""
        return parts[0].flatten(1)

    def divide(self, whole: Tensor, model: ModelConfig) -> list[Tensor]:
        """The published tensor of ours."""
        return [whole.unflatten(1, (model.n_heads, model.head_width))]


@dataclasses.dataclass(frozen=True)
class Vectors(Rule):
    """Several published vectors of every head as one tensor."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of the published ones."""
        return torch.stack(parts)

    def divide(self, whole: Tensor, model: ModelConfig) -> list[Tensor]:
        """The published tensors of ours."""
        return list(whole.unbind())


@dataclasses.dataclass(frozen=True)
class OneVector(Rule):
    """The published [1, 1, D] that predicted places begin with, as our [1, D]."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of the published one."""
        return parts[0].flatten(1)

    def divide(self, whole: Tensor, model: ModelConfig) -> list[Tensor]:
        """The published tensor of ours."""
        return [whole[None]]


def of_attention(names: str) -> tuple[str, ...]:
    """Published names of a layer's attention."""
    return tuple(f"{LAYER}.rel_attn.{name}" for name in names.split())


TABLE = Table(
    whole=(
        *same("transformer.word_embedding", "trunk.embedding"),
        OneVector(("transformer.mask_emb",), "trunk.query.weight"),
        *pair("lm_loss", "heads.lm"),
    ),
    layers=(
        Projections(of_attention("q k v"), f"{BLOCK}.attention.qkv.weight"),
        Projections(of_attention("r"), f"{BLOCK}.attention.distance.weight"),
        Output(of_attention("o"), f"{BLOCK}.attention.out.weight"),
        Vectors(of_attention("r_w_bias r_r_bias r_s_bias"), f"{BLOCK}.attention.vectors"),
        Rule(of_attention("seg_embed"), f"{BLOCK}.attention.segments"),
        *pair(f"{LAYER}.rel_attn.layer_norm", f"{BLOCK}.attention_norm"),
        *pair(f"{LAYER}.ff.layer_1", f"{BLOCK}.feed_forward.up"),
        *pair(f"{LAYER}.ff.layer_2", f"{BLOCK}.feed_forward.down"),
        *pair(f"{LAYER}.ff.layer_norm", f"{BLOCK}.feed_forward_norm"),
    ),
)


def to_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """XLNetLMHeadModel."""
    return {
        "architectures": ["XLNetLMHeadModel"],
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "d_model": model.d_model,
        "d_inner": model.ff_width,
        "ff_activation": FEED_FORWARDS[model.feed_forward],
        "layer_norm_eps": model.norm_eps,
        "dropout": model.dropout,
        "attn_type": "bi",
        "untie_r": True,
        "bi_data": False,
        "clamp_len": -1,
        "same_length": False,
        "mem_len": None,
        "reuse_len": None,
    }


def to_model(config: Published) -> dict[str, Any]:
    """XLNet's trunk; one that reads in one direction only (`uni`, Transformer-XL), clamps distances
    or shares a layer's biases is refused."""
    config.only(attn_type="bi", untie_r=True, bi_data=False, clamp_len=-1, same_length=False)
    width, heads = config.size("d_model"), config.size("n_head")
    config.only(d_head=width // heads)
    activation = config.get("ff_activation", "gelu")
    places = ("dropout", "attention_dropout", "feed_forward_dropout", "final_dropout")
    return {
        "trunk": "two_stream",
        "n_layers": config.size("n_layer"),
        "n_heads": heads,
        "d_model": width,
        "d_ff": config.size("d_inner"),
        "feed_forward": "relu"
        if activation == "relu"
        else config.activation("ff_activation", "gelu"),
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "positions": {"name": "relative"},
        "n_segments": SEGMENTS,
        "max_length": LENGTH,
        **dict.fromkeys(places, config.number("dropout", 0.1)),
    }


def misfits(model: ModelConfig) -> list[str]:
    """What keeps XLNet out beside the keys that it fixes: it always tells segments, and its
    sinusoids have one base."""
    found, base = shared_width(model), getattr(model.positions, "base", BASE)
    if model.n_segments == 0:
        found.append("model.n_segments is 0")
    if model.positions.name == "relative" and base != BASE:
        found.append(f"model.positions.base is {base}")
    return found


XLNET = Family(
    name="xlnet",
    table=TABLE,
    classes=Classes("XLNetConfig", "XLNetLMHeadModel"),
    fits={
        "trunk": "two_stream",
        "norm": "layernorm",
        "norm_position": "post",
        "embedding_norm": False,
        "positions.name": "relative",
        "bias": True,
        "feed_forward": (*PLAIN, "relu"),
        "window": EVERYWHERE["window"],
    },
    misfits=misfits,
    to_config=to_config,
    to_model=to_model,
    tied=True,
    embedding="transformer.word_embedding.weight",
    projection="lm_loss.weight",
    prefix="transformer.",
    heads={"lm": ("lm_loss.",)},
    has_head="heads.lm.bias",
    objective=lambda names: {"name": "permutation"},
)
