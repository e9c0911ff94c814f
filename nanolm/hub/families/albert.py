"""ALBERT (Lan et al. 2020): BERT with one block that runs often, and embeddings narrower than it.

Its published files have groups of blocks (`num_hidden_groups`, `inner_group_num`); all that were
ever published have one group of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.configs import Published
from nanolm.hub.families.base import Classes, Family, attention_rows
from nanolm.hub.families.bert import ENCODER, TRANSFORM, embeddings, sizes, to_model
from nanolm.hub.keys import Rule, Table, pair, same, stacked

LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
OURS = "trunk.stack.blocks.0"
POOLER = "albert.pooler.weight"

TABLE = Table(
    whole=(
        *embeddings("albert.embeddings"),
        *pair("albert.encoder.embedding_hidden_mapping_in", "trunk.projection"),
        *(
            stacked(
                f"{LAYER}.attention",
                ("query", "key", "value"),
                f"{OURS}.attention.qkv",
                kind,
                attention_rows,
            )
            for kind in ("weight", "bias")
        ),
        *pair(f"{LAYER}.attention.dense", f"{OURS}.attention.out"),
        *pair(f"{LAYER}.attention.LayerNorm", f"{OURS}.attention_norm"),
        *pair(f"{LAYER}.ffn", f"{OURS}.feed_forward.up"),
        *pair(f"{LAYER}.ffn_output", f"{OURS}.feed_forward.down"),
        *pair(f"{LAYER}.full_layer_layer_norm", f"{OURS}.feed_forward_norm"),
        Rule(("predictions.bias",), "heads.lm.bias"),
        *same("predictions.decoder", "heads.lm"),
        *pair("predictions.dense", "heads.lm.transform.dense"),
        *pair("predictions.LayerNorm", "heads.lm.transform.norm"),
        *pair("albert.pooler", "heads.pair.dense"),
        *pair("sop_classifier.classifier", "heads.pair.out"),
    ),
    layers=(),
)


def albert_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """AlbertForPreTraining (or AlbertForMaskedLM, without a sentence-order head)."""
    segments = len(named["albert.embeddings.token_type_embeddings.weight"])
    architecture = "AlbertForPreTraining" if POOLER in named else "AlbertForMaskedLM"
    return sizes(model, segments) | {
        "architectures": [architecture],
        "embedding_size": model.embedded_width,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    }


def albert_model(config: Published) -> dict[str, Any]:
    """BERT's keys, other defaults, and what is shared."""
    config.only(num_hidden_groups=1, inner_group_num=1)
    return to_model(config) | {
        "embedding_width": config.size("embedding_size"),
        "share_layers": True,
        "feed_forward": config.activation("hidden_act", "gelu_new"),
        "dropout": config.number("hidden_dropout_prob", 0.0),
        "attention_dropout": config.number("attention_probs_dropout_prob", 0.0),
    }


def albert_objective(names: frozenset[str]) -> dict[str, Any]:
    """Masked language modelling, with the order of sentences where there is a pooler."""
    if POOLER not in names:
        return {"name": "mlm"}
    return {"name": "mlm_pair", "pair": "sop"}


ALBERT = Family(
    name="albert",
    table=TABLE,
    classes=Classes("AlbertConfig", "AlbertForMaskedLM", "AlbertForPreTraining"),
    fits=ENCODER | {"share_layers": True},
    narrow=True,
    acts_alike=True,
    to_config=albert_config,
    to_model=albert_model,
    tied=True,
    embedding="albert.embeddings.word_embeddings.weight",
    projection="predictions.decoder.weight",
    duplicates={"predictions.decoder.bias": "predictions.bias"},
    prefix="albert.",
    buffers=r"(albert\.)?embeddings\.(position_ids|token_type_ids)",
    heads={"lm": ("predictions.",), "pair": ("sop_classifier.",)},
    has_head=TRANSFORM,
    objective=albert_objective,
)
