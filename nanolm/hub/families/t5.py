"""T5 (Raffel et al. 2020), v1.0 and v1.1: an encoder and a decoder, RMSNorm, buckets of distances.

v1.0 has ReLU and one table for source, targets and head, before which hidden states are scaled;
v1.1 gates with tanh-GELU and has a head of its own, without the scale. Scores are not divided by
sqrt(K) in either, and no weight is changed on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import require
from nanolm.hub.configs import Published
from nanolm.hub.families.base import (
    EVERYWHERE,
    Classes,
    Family,
    attention_rows,
    gate_rows,
)
from nanolm.hub.keys import Rule, Table, same, stacked

START = 0
"""The token that a decoder begins with: padding."""
FEED_FORWARDS = {"relu": "relu", "gated-gelu": "geglu_tanh"}
THEIRS = {ours: theirs for theirs, ours in FEED_FORWARDS.items()}
STACKS = {"encoder": "encoder_", "decoder": ""}


def attention(theirs: str, ours: str, number: int, name: str, kind: str) -> tuple[Rule, ...]:
    """The sublayer `number` of a block, which attends; with its norm."""
    their = f"{theirs}.layer.{number}"
    return (
        stacked(f"{their}.{kind}", ("q", "k", "v"), f"{ours}.{name}.qkv", "weight", attention_rows),
        *same(f"{their}.{kind}.o", f"{ours}.{name}.out"),
        *same(f"{their}.layer_norm", f"{ours}.{name}_norm"),
    )


def feed_forward(theirs: str, ours: str, number: int) -> tuple[Rule, ...]:
    """The last sublayer of a block, gated or not; with its norm."""
    their = f"{theirs}.layer.{number}"
    dense = f"{their}.DenseReluDense"
    return (
        *same(f"{dense}.wi", f"{ours}.feed_forward.up"),
        stacked(dense, ("wi_0", "wi_1"), f"{ours}.feed_forward.gate_up", "weight", gate_rows),
        *same(f"{dense}.wo", f"{ours}.feed_forward.down"),
        *same(f"{their}.layer_norm", f"{ours}.feed_forward_norm"),
    )


def stack(side: str) -> tuple[Rule, ...]:
    """What a stack has once: the table of its positions and its final norm."""
    ours, buckets = f"trunk.{STACKS[side]}", "layer.0.SelfAttention.relative_attention_bias"
    return (
        *same(f"{side}.block.0.{buckets}", f"{ours}positions.table"),
        *same(f"{side}.final_layer_norm", f"{ours}stack.final_norm"),
    )


def block(side: str) -> tuple[Rule, ...]:
    """The rules of one block of a stack."""
    theirs, ours = f"{side}.block.{{}}", f"trunk.{STACKS[side]}stack.blocks.{{}}"
    reads = {"attention": "SelfAttention"}
    if side == "decoder":
        reads["cross_attention"] = "EncDecAttention"
    rules: list[Rule] = []
    for number, (name, kind) in enumerate(reads.items()):
        rules += attention(theirs, ours, number, name, kind)
    return (*rules, *feed_forward(theirs, ours, len(reads)))


TABLE = Table(
    whole=(
        *same("shared", "trunk.embedding"),
        *stack("encoder"),
        *stack("decoder"),
        *same("lm_head", "heads.lm"),
    ),
    layers=(*block("encoder"), *block("decoder")),
)


def to_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """T5ForConditionalGeneration."""
    positions: Any = model.positions
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "decoder_start_token_id": START,
        **dict.fromkeys(("num_layers", "num_decoder_layers"), model.n_layers),
        "num_heads": model.n_heads,
        "d_model": model.d_model,
        "d_kv": model.head_width,
        "d_ff": model.ff_width,
        "feed_forward_proj": THEIRS[model.feed_forward],
        "relative_attention_num_buckets": positions.n_buckets,
        "relative_attention_max_distance": positions.max_distance,
        "n_positions": model.max_length,
        "layer_norm_epsilon": model.norm_eps,
        "dropout_rate": model.dropout,
    }


def to_model(config: Published) -> dict[str, Any]:
    """T5's blocks, in two stacks of one depth."""
    layers, proj = config.size("num_layers"), config.get("feed_forward_proj", "relu")
    tied = bool(config.get("tie_word_embeddings", True))
    config.only(num_decoder_layers=layers, decoder_start_token_id=START, scale_decoder_outputs=tied)
    require(
        isinstance(proj, str) and proj in FEED_FORWARDS,
        f"{config.path} sets feed_forward_proj to {proj!r}, and nanolm computes t5 only with "
        f"{', '.join(FEED_FORWARDS)}; choose another checkpoint",
    )
    places = ("dropout", "attention_dropout", "feed_forward_dropout", "final_dropout")
    return {
        "trunk": "encoder_decoder",
        "n_layers": layers,
        "n_heads": config.size("num_heads"),
        "head_dim": config.size("d_kv"),
        "d_model": config.size("d_model"),
        "d_ff": config.size("d_ff"),
        "feed_forward": FEED_FORWARDS[proj],
        "norm": "rmsnorm",
        "norm_eps": config.number("layer_norm_epsilon", 1e-6),
        "bias": False,
        "attention_scale": 1.0,
        "logit_scale": tied,
        "weight_init": "t5",
        "max_length": config.amount("n_positions", 512),
        "positions": {
            "name": "t5",
            "n_buckets": config.amount("relative_attention_num_buckets", 32),
            "max_distance": config.amount("relative_attention_max_distance", 128),
        },
        **dict.fromkeys(places, config.number("dropout_rate", 0.1)),
    }


def misfits(model: ModelConfig) -> list[str]:
    """What keeps T5 out beside the keys that it fixes: hidden states are scaled exactly where the
    head is tied, and every query has a key of its own."""
    found = []
    if model.logit_scale != model.tied:
        found.append(f"model.logit_scale is {model.logit_scale} and model.tied is {model.tied}")
    if model.kv_heads != model.n_heads:
        found.append(f"model.n_kv_heads is {model.n_kv_heads}")
    return found


T5 = Family(
    name="t5",
    table=TABLE,
    classes=Classes("T5Config", "T5ForConditionalGeneration"),
    fits={
        "trunk": "encoder_decoder",
        "norm": "rmsnorm",
        "norm_position": "pre",
        "embedding_norm": False,
        "positions.name": "t5",
        "bias": False,
        "attention_scale": 1.0,
        "logit_scale": (True, False),
        "feed_forward": tuple(THEIRS),
        **EVERYWHERE,
    },
    misfits=misfits,
    pad=START,
    to_config=to_config,
    to_model=to_model,
    tied=True,
    embedding="shared.weight",
    projection="lm_head.weight",
    duplicates={f"{side}.embed_tokens.weight": "shared.weight" for side in STACKS},
    repeats=False,  # both stacks embed with one table, also where the head has its own
    unread=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    objective=lambda names: {"name": "span"},
)
