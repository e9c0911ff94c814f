"""One table between our names and those of XLNet in `transformers`, read in both directions.

XLNet keeps projections as [D, heads, K], so that a head's output is transposed too; ours are the
rows of linear layers, queries, keys and values in one weight. Its three vectors of a head lie in
one tensor here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig

Tensors = dict[str, Tensor]


class Row(NamedTuple):
    """(our name, their names, how ours is made of theirs, and theirs of ours)."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    part: Callable[[Tensor], list[Tensor]]


def same(ours: str, theirs: str) -> Row:
    """One tensor that is the same in both."""
    return Row(ours, (theirs,), lambda tensors: tensors[0], lambda tensor: [tensor])


def xlnet_table(model: ModelConfig) -> list[Row]:
    """Every parameter of an XLNet of this shape, its vocabulary head's bias included."""
    rows = [
        same("trunk.embedding.weight", "transformer.word_embedding.weight"),
        Row(
            "trunk.query.weight",
            ("transformer.mask_emb",),
            lambda tensors: tensors[0].reshape(1, -1),
            lambda tensor: [tensor.reshape(1, 1, -1)],
        ),
        same("heads.lm.bias", "lm_loss.bias"),
    ]
    for layer in range(model.n_layers):
        rows += _block(model, f"trunk.stack.blocks.{layer}", f"transformer.layer.{layer}")
    return rows


def _block(model: ModelConfig, ours: str, theirs: str) -> list[Row]:
    width, heads, K = model.d_model, model.n_heads, model.head_width

    def rows_of(their: Tensor) -> Tensor:
        return their.reshape(width, heads * K).T

    def their_of(rows: Tensor) -> Tensor:
        return rows.T.reshape(width, heads, K)

    attention = f"{theirs}.rel_attn"
    rows = [
        Row(
            f"{ours}.attention.qkv.weight",
            tuple(f"{attention}.{letter}" for letter in "qkv"),
            lambda tensors: torch.cat([rows_of(tensor) for tensor in tensors]),
            lambda tensor: [their_of(part) for part in tensor.chunk(3)],
        ),
        Row(
            f"{ours}.attention.out.weight",
            (f"{attention}.o",),
            lambda tensors: tensors[0].reshape(width, heads * K),
            lambda tensor: [tensor.reshape(width, heads, K)],
        ),
        Row(
            f"{ours}.attention.distance.weight",
            (f"{attention}.r",),
            lambda tensors: rows_of(tensors[0]),
            lambda tensor: [their_of(tensor)],
        ),
        Row(
            f"{ours}.attention.vectors",
            tuple(f"{attention}.r_{letter}_bias" for letter in "wrs"),
            torch.stack,
            lambda tensor: list(tensor.unbind()),
        ),
        same(f"{ours}.attention.segments", f"{attention}.seg_embed"),
    ]
    names = {
        "attention_norm": "rel_attn.layer_norm",
        "feed_forward_norm": "ff.layer_norm",
        "feed_forward.up": "ff.layer_1",
        "feed_forward.down": "ff.layer_2",
    }
    for mine, other in names.items():
        for kind in ("weight", "bias"):
            rows.append(same(f"{ours}.{mine}.{kind}", f"{theirs}.{other}.{kind}"))
    return rows


def to_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """A Learner's tensors under the names of XLNetLMHeadModel."""
    named: Tensors = {}
    for row in xlnet_table(model):
        parts = row.part(tensors[row.ours])
        named |= {name: part.contiguous() for name, part in zip(row.theirs, parts, strict=True)}
    return named


def from_transformers(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of XLNetLMHeadModel under a Learner's names."""
    named = {
        row.ours: row.join([tensors[name] for name in row.theirs]).contiguous()
        for row in xlnet_table(model)
    }
    return {"heads.lm.weight": named["trunk.embedding.weight"], **named}
