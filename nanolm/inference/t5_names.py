"""One table between our names and those of T5 in `transformers`, read in both directions.

Each of our tensors is the rows of one or more of theirs, in order: ours keeps queries, keys and
values in one weight, and a gate above what it gates. T5 has no biases and does not divide scores by
sqrt(K); `model.attention_scale: 1` says so here, and no weight is changed on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig

Tensors = dict[str, Tensor]
Row = tuple[str, tuple[str, ...], tuple[int, ...]]
"""(our name, their names, rows of each of theirs)."""


def t5_table(model: ModelConfig) -> Iterator[Row]:
    """Every parameter of a T5 of this shape."""
    n_buckets: int = cast(Any, model.positions).n_buckets  # T5BiasOptions
    yield "trunk.embedding.weight", ("shared.weight",), (model.n_tokens,)
    for ours, theirs in (("encoder_", "encoder"), ("", "decoder")):
        stack = f"trunk.{ours}stack"
        table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield (f"trunk.{ours}positions.table.weight", (table,), (n_buckets,))
        yield f"{stack}.final_norm.weight", (f"{theirs}.final_layer_norm.weight",), (model.d_model,)
        for layer in range(model.n_layers):
            yield from _block(model, f"{stack}.blocks.{layer}", f"{theirs}.block.{layer}", theirs)
    if not model.tied:
        yield "heads.lm.weight", ("lm_head.weight",), (model.n_tokens,)


def _block(model: ModelConfig, ours: str, theirs: str, side: str) -> Iterator[Row]:
    """The sublayers of one block, numbered by `transformers`."""
    queries, keys = model.n_heads * model.head_width, model.kv_heads * model.head_width
    attentions = {"attention": "SelfAttention"}
    if side == "decoder":
        attentions["cross_attention"] = "EncDecAttention"
    for number, (name, other) in enumerate(attentions.items()):
        their = f"{theirs}.layer.{number}"
        projections = tuple(f"{their}.{other}.{letter}.weight" for letter in "qkv")
        yield f"{ours}.{name}.qkv.weight", projections, (queries, keys, keys)
        yield f"{ours}.{name}.out.weight", (f"{their}.{other}.o.weight",), (model.d_model,)
        yield f"{ours}.{name}_norm.weight", (f"{their}.layer_norm.weight",), (model.d_model,)
    their = f"{theirs}.layer.{len(attentions)}"
    dense = f"{their}.DenseReluDense"
    if model.gated:
        both = (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight")
        yield f"{ours}.feed_forward.gate_up.weight", both, (model.ff_width, model.ff_width)
    else:
        yield f"{ours}.feed_forward.up.weight", (f"{dense}.wi.weight",), (model.ff_width,)
    yield f"{ours}.feed_forward.down.weight", (f"{dense}.wo.weight",), (model.d_model,)
    yield f"{ours}.feed_forward_norm.weight", (f"{their}.layer_norm.weight",), (model.d_model,)


def to_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """A Learner's tensors under the names of T5ForConditionalGeneration."""
    named: Tensors = {}
    for ours, theirs, rows in t5_table(model):
        named |= dict(zip(theirs, tensors[ours].split(list(rows)), strict=True))
    return named


def from_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of T5ForConditionalGeneration under a Learner's names."""
    named = {
        ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs, _ in t5_table(model)
    }
    return {"heads.lm.weight": named["trunk.embedding.weight"], **named}
