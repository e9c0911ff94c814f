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
        "rope_parameters": {"rope_type": "default", "rope_theta": positions.base[0]},
    }


def to_model(config: Published) -> dict[str, Any]:
    """Llama (Touvron et al. 2023), grouped queries included; scaled rotary positions refused."""
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
        "positions": {"name": "rotary", "base": [rotary_base(config)]},
    }


def rotary_base(config: Published) -> float:
    """The base of unscaled rotary positions, under its new name or its old one."""
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
        kind == "default" and partial == 1.0,
        f"{config.path} has rotary positions of type {kind!r} (partial_rotary_factor {partial}), "
        f"and nanolm computes {config.family} only with 'default' and 1.0; choose another "
        f"checkpoint",
    )
    given = rope.get("rope_theta")
    if given is None:
        return config.number("rope_theta", 10000.0)
    return dataclasses.replace(config, values=rope).number("rope_theta", given)


def qwen3_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Qwen3ForCausalLM."""
    return to_config(model, named) | {"architectures": ["Qwen3ForCausalLM"]}


def qwen3_model(config: Published) -> dict[str, Any]:
    """Qwen3 (Yang et al. 2025), without the sliding windows that its published models do not use
    either."""
    config.only(use_sliding_window=False)
    kinds = config.get("layer_types", [])
    require(
        set(kinds) <= {"full_attention"},
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
