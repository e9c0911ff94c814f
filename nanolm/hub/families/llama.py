"""Llama: RMSNorm, SwiGLU, rotary positions, grouped queries, no biases; and Qwen3, which also norms
queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import require
from nanolm.hub.configs import Published
from nanolm.hub.families.base import (
    BLOCK,
    EVERYWHERE,
    Classes,
    Family,
    attention_rows,
    gate_rows,
    one_rotation,
)
from nanolm.hub.keys import Table, same, stacked

TABLE = Table(
    whole=(
        *same("model.embed_tokens", "trunk.embedding"),
        *same("model.norm", "trunk.stack.final_norm"),
        *same("lm_head", "heads.lm"),
    ),
    layers=(
        *same("model.layers.{}.input_layernorm", f"{BLOCK}.attention_norm"),
        *same("model.layers.{}.post_attention_layernorm", f"{BLOCK}.feed_forward_norm"),
        stacked(
            "model.layers.{}.self_attn",
            ("q_proj", "k_proj", "v_proj"),
            f"{BLOCK}.attention.qkv",
            "weight",
            attention_rows,
        ),
        *same("model.layers.{}.self_attn.o_proj", f"{BLOCK}.attention.out"),
        stacked(
            "model.layers.{}.mlp",
            ("gate_proj", "up_proj"),
            f"{BLOCK}.feed_forward.gate_up",
            "weight",
            gate_rows,
        ),
        *same("model.layers.{}.mlp.down_proj", f"{BLOCK}.feed_forward.down"),
    ),
)
QWEN3_TABLE = dataclasses.replace(
    TABLE,
    layers=(
        *TABLE.layers,
        *same("model.layers.{}.self_attn.q_norm", f"{BLOCK}.attention.q_norm"),
        *same("model.layers.{}.self_attn.k_norm", f"{BLOCK}.attention.k_norm"),
    ),
)

LLAMA3 = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
}
SCALED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": LLAMA3,
}
"""rope_type -> what it needs, by our options of rotary positions."""


def to_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """LlamaForCausalLM."""
    positions: Any = model.positions
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": model.attention_dropout,
        "rope_parameters": {"rope_theta": positions.base[0], **scaling_keys(positions)},
    }


def scaling_keys(positions: Any) -> dict[str, Any]:
    """How the published config says that rotary positions are scaled."""
    kind = positions.scaling
    if kind == "none":
        return {"rope_type": "default"}
    return {"rope_type": kind} | {
        theirs: getattr(positions, ours) for theirs, ours in SCALED[kind].items()
    }


def to_model(config: Published) -> dict[str, Any]:
    """Llama (Touvron et al. 2023), grouped queries and scaled rotary positions included."""
    config.only(attention_bias=False, mlp_bias=False, hidden_act="silu")
    heads = config.size("num_attention_heads")
    given = config.values.get("head_dim")
    return {
        "n_layers": config.size("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": heads
        if config.values.get("num_key_value_heads") is None
        else config.size("num_key_value_heads"),
        "head_dim": None if given is None else config.size("head_dim"),
        "d_model": config.size("hidden_size"),
        "d_ff": config.size("intermediate_size"),
        "max_length": config.size("max_position_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "feed_forward": "swiglu",
        "bias": False,
        "attention_dropout": config.number("attention_dropout", 0.0),
        "positions": {"name": "rotary", **rotary_options(config)},
    }


def rotary_options(config: Published) -> dict[str, Any]:
    """Base and scaling of rotary positions, under their new names or their old ones."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key, {})
        require(
            isinstance(part, dict), f"{config.path} gives {key} as {part!r}; it must be an object"
        )
        rope |= part
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    require(
        isinstance(kind, str) and kind in SCALED and partial == 1.0,
        f"{config.path} has rotary positions of type {kind!r} (partial_rotary_factor {partial}), "
        f"and nanolm computes {config.family} only with {', '.join(SCALED)} and 1.0; choose "
        f"another checkpoint",
    )
    inside = dataclasses.replace(config, values=rope)
    given = config.number("rope_theta", 10000.0)
    base = {"base": [inside.number("rope_theta", given)]}
    return base if kind == "default" else base | scaling_options(inside, kind)


def scaling_options(rope: Published, kind: str) -> dict[str, Any]:
    """Our options of scaled rotary positions; raises UserError for a key that is missing, or out of
    the range in which such positions are computed."""
    found = {}
    for theirs, ours in SCALED[kind].items():
        require(
            rope.get(theirs, None) is not None,
            f"{rope.path} has rotary positions of type {kind!r} without {theirs}; fetch the "
            f"config.json of these weights",
        )
        found[ours] = rope.number(theirs, 0.0)
    require(
        found["factor"] >= 1.0,
        f"{rope.path} gives factor as {found['factor']}; rotary positions are scaled by 1 or more",
    )
    if kind == "llama3":
        found["original_length"] = rope.size("original_max_position_embeddings")
        low, high = found["low_frequency"], found["high_frequency"]
        require(
            0 < low < high,
            f"{rope.path} gives low_freq_factor as {low} and high_freq_factor as {high}; the first "
            f"must be more than 0 and less than the second",
        )
    return {"scaling": kind, **found}


def qwen3_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Qwen3ForCausalLM."""
    return to_config(model, named) | {"architectures": ["Qwen3ForCausalLM"]}


def qwen3_model(config: Published) -> dict[str, Any]:
    """Qwen3 (Yang et al. 2025), without the sliding windows that its published models do not use
    either."""
    config.only(use_sliding_window=False)
    kinds = config.get("layer_types", [])
    require(
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds),
        f"{config.path} sets layer_types to {kinds!r}, and nanolm computes {config.family} only "
        f"with 'full_attention'; choose another checkpoint",
    )
    width = config.size("head_dim") if "head_dim" in config.values else 128
    return to_model(config) | {"head_dim": width, "qk_norm": True}


LLAMA = Family(
    name="llama",
    table=TABLE,
    classes=Classes("LlamaConfig", "LlamaForCausalLM"),
    fits={
        "trunk": "decoder",
        "norm": "rmsnorm",
        "norm_position": "pre",
        "embedding_norm": False,
        "positions.name": "rotary",
        "bias": False,
        "feed_forward": ("swiglu",),
        **EVERYWHERE,
    },
    misfits=one_rotation,
    to_config=to_config,
    to_model=to_model,
    tied=False,
    embedding="model.embed_tokens.weight",
    projection="lm_head.weight",
    prefix="model.",
    buffers=r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
)
QWEN3 = dataclasses.replace(
    LLAMA,
    name="qwen3",
    table=QWEN3_TABLE,
    classes=Classes("Qwen3Config", "Qwen3ForCausalLM"),
    fits={**LLAMA.fits, "qk_norm": True},
    to_config=qwen3_config,
    to_model=qwen3_model,
)
