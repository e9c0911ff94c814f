"""GPT-2: a pre-norm decoder with learned positions; its Conv1D weights are transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.configs import ACTIVATIONS, Published
from nanolm.hub.families.base import BLOCK, EVERYWHERE, PLAIN, Classes, Family
from nanolm.hub.keys import Table, pair, same

TABLE = Table(
    whole=(
        *same("transformer.wte", "trunk.embedding"),
        *same("transformer.wpe", "trunk.positions.table"),
        *pair("transformer.ln_f", "trunk.stack.final_norm"),
        *same("lm_head", "heads.lm"),
    ),
    layers=(
        *pair("transformer.h.{}.ln_1", f"{BLOCK}.attention_norm"),
        *pair("transformer.h.{}.ln_2", f"{BLOCK}.feed_forward_norm"),
        *pair("transformer.h.{}.attn.c_attn", f"{BLOCK}.attention.qkv", transposed=True),
        *pair("transformer.h.{}.attn.c_proj", f"{BLOCK}.attention.out", transposed=True),
        *pair("transformer.h.{}.mlp.c_fc", f"{BLOCK}.feed_forward.up", transposed=True),
        *pair("transformer.h.{}.mlp.c_proj", f"{BLOCK}.feed_forward.down", transposed=True),
    ),
)


def to_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """GPT2LMHeadModel."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_embd": model.d_model,
        "n_inner": model.ff_width,
        "n_positions": model.max_length,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": ACTIVATIONS[model.feed_forward],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), model.dropout),
        "attn_pdrop": model.attention_dropout,
    }


def to_model(config: Published) -> dict[str, Any]:
    """GPT-2 (Radford et al. 2019)."""
    config.only(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    inner = config.values.get("n_inner")
    return {
        "n_layers": config.size("n_layer"),
        "n_heads": config.size("n_head"),
        "d_model": config.size("n_embd"),
        "d_ff": None if inner is None else config.size("n_inner"),
        "max_length": config.size("n_positions" if "n_positions" in config.values else "n_ctx"),
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "feed_forward": config.activation("activation_function", "gelu_new"),
        "dropout": config.number("resid_pdrop", 0.1),
        "attention_dropout": config.number("attn_pdrop", 0.1),
    }


GPT2 = Family(
    name="gpt2",
    table=TABLE,
    classes=Classes("GPT2Config", "GPT2LMHeadModel"),
    fits={
        "trunk": "decoder",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "pre",
        "embedding_norm": False,
        "positions.name": "learned",
        "bias": True,
        "feed_forward": PLAIN,
        **EVERYWHERE,
    },
    to_config=to_config,
    to_model=to_model,
    tied=True,
    embedding="transformer.wte.weight",
    projection="lm_head.weight",
    prefix="transformer.",
    buffers=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)
