"""ModernBERT: a pre-norm encoder with rotary positions, GeGLU, and layers that see a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require
from nanolm.hub.configs import Published
from nanolm.hub.families.base import (
    BLOCK,
    Classes,
    Family,
    rotary_bases,
    shared_width,
    unscaled_rotation,
    whole_rotation,
)
from nanolm.hub.families.bert import TRANSFORM, masked_words
from nanolm.hub.keys import Rule, Table, pair, same

GLOBAL, LOCAL = "full_attention", "sliding_attention"
BASES = {GLOBAL: ("global_rope_theta", 160000.0), LOCAL: ("local_rope_theta", 10000.0)}

TABLE = Table(
    whole=(
        *same("model.embeddings.tok_embeddings", "trunk.embedding"),
        *pair("model.embeddings.norm", "trunk.embedding_norm"),
        *pair("model.final_norm", "trunk.stack.final_norm"),
        *pair("head.dense", "heads.lm.transform.dense"),
        *pair("head.norm", "heads.lm.transform.norm"),
        *same("decoder", "heads.lm"),
        Rule(("decoder.bias",), "heads.lm.bias"),
    ),
    layers=(
        *pair("model.layers.{}.attn_norm", f"{BLOCK}.attention_norm"),
        *pair("model.layers.{}.attn.Wqkv", f"{BLOCK}.attention.qkv"),
        *pair("model.layers.{}.attn.Wo", f"{BLOCK}.attention.out"),
        *pair("model.layers.{}.mlp_norm", f"{BLOCK}.feed_forward_norm"),
        *pair("model.layers.{}.mlp.Wi", f"{BLOCK}.feed_forward.gate_up"),
        *pair("model.layers.{}.mlp.Wo", f"{BLOCK}.feed_forward.down"),
    ),
)


def by_layer(model: ModelConfig) -> list[tuple[int | None, float]]:
    """Window and rotary base of every layer."""
    windows, bases = model.window, rotary_bases(model)
    return [
        (windows[layer % len(windows)], bases[layer % len(bases)])
        for layer in range(model.n_layers)
    ]


def misfits(model: ModelConfig) -> list[str]:
    """Layers are global or of one window, and each kind has one base."""
    found = set(by_layer(model))
    widths = {width for width, _ in found if width is not None}
    several = [f"model.window is {model.window}"] if len(widths) > 1 else []
    if len(found) > len({width for width, _ in found}):
        several.append(f"model.positions.base is {rotary_bases(model)}")
    rotation = whole_rotation(model) + unscaled_rotation(model)
    return several + shared_width(model) + rotation


def to_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """ModernBertForMaskedLM."""
    layers = by_layer(model)
    kinds = [GLOBAL if width is None else LOCAL for width, _ in layers]
    bases = {kind: base for kind, (_, base) in zip(kinds, layers, strict=True)}
    width = next((width for width, _ in layers if width is not None), 1)
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width,
        "max_position_embeddings": model.max_length,
        "norm_eps": model.norm_eps,
        "norm_bias": model.norm_bias,
        **dict.fromkeys(("attention_bias", "mlp_bias", "classifier_bias"), model.bias),
        "hidden_activation": "gelu",
        "local_attention": 2 * (width - 1),
        "layer_types": kinds,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": bases.get(kind, default)}
            for kind, (_, default) in BASES.items()
        },
        "embedding_dropout": model.dropout,
        "mlp_dropout": model.feed_forward_dropout,
        "attention_dropout": model.attention_dropout,
    }


def to_model(config: Published) -> dict[str, Any]:
    """ModernBERT (Warner et al. 2024)."""
    bias = bool(config.get("attention_bias", False))
    config.only(
        mlp_bias=bias,
        classifier_bias=bias,
        hidden_activation="gelu",
        classifier_activation="gelu",
        decoder_bias=True,
    )
    n_layers = config.size("num_hidden_layers")
    kinds = layer_kinds(config, n_layers)
    width = config.amount("local_attention", 128) // 2 + 1
    base = {kind: rotary_base(config, kind) for kind in BASES}
    return {
        "trunk": "encoder",
        "n_layers": n_layers,
        "n_heads": config.size("num_attention_heads"),
        "d_model": config.size("hidden_size"),
        "d_ff": config.size("intermediate_size"),
        "max_length": config.size("max_position_embeddings"),
        "norm_bias": bool(config.get("norm_bias", False)),
        "norm_eps": config.number("norm_eps", 1e-5),
        "embedding_norm": True,
        "feed_forward": "geglu",
        "bias": bias,
        "window": [None if kind == GLOBAL else width for kind in kinds],
        "positions": {"name": "rotary", "base": [base[kind] for kind in kinds]},
        "dropout": config.number("embedding_dropout", 0.0),
        "feed_forward_dropout": config.number("mlp_dropout", 0.0),
        "attention_dropout": config.number("attention_dropout", 0.0),
    }


def layer_kinds(config: Published, n_layers: int) -> list[str]:
    """Which layers are global, as the shortest pattern that repeats."""
    every = config.amount("global_attn_every_n_layers", 3) or 1
    regular = [LOCAL if layer % every else GLOBAL for layer in range(n_layers)]
    kinds = config.get("layer_types", regular)
    good = isinstance(kinds, list) and len(kinds) == n_layers
    good = good and all(kind in (GLOBAL, LOCAL) for kind in kinds)
    require(
        good,
        f"{config.path} gives layer_types as {kinds!r}; it must name {GLOBAL} or {LOCAL} for each "
        f"of {n_layers} layers",
    )
    lengths = range(1, n_layers + 1)
    return next(kinds[:n] for n in lengths if (kinds[:n] * n_layers)[:n_layers] == kinds)


def rotary_base(config: Published, kind: str) -> float:
    """The base of one kind of layers, under its new name or its old one."""
    old, default = BASES[kind]
    rope = config.get("rope_parameters", {})
    part = rope.get(kind) or {} if isinstance(rope, dict) else None
    if not isinstance(part, dict) or part.get("rope_type", "default") != "default":
        raise UserError(
            f"{config.path} gives rope_parameters as {rope!r}, and nanolm computes modernbert only "
            f"with an object whose rope_type is 'default' for each kind of layers"
        )
    given = part.get("rope_theta")
    if given is None:
        return config.number(old, default)
    return dataclasses.replace(config, values=part).number("rope_theta", default)


MODERNBERT = Family(
    name="modernbert",
    table=TABLE,
    classes=Classes("ModernBertConfig", "ModernBertForMaskedLM"),
    fits={
        "trunk": "encoder",
        "norm": "layernorm",
        "norm_bias": (True, False),
        "norm_position": "pre",
        "embedding_norm": True,
        "positions.name": "rotary",
        "bias": (True, False),
        "feed_forward": ("geglu",),
        "n_segments": 0,
    },
    misfits=misfits,
    to_config=to_config,
    to_model=to_model,
    tied=True,
    embedding="model.embeddings.tok_embeddings.weight",
    projection="decoder.weight",
    prefix="model.",
    buffers=r"(.*\.)?rotary_emb\.[a-z_]*inv_freq",
    heads={"lm": ("head.", "decoder.")},
    has_head=TRANSFORM,
    objective=masked_words,
)
