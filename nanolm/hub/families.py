"""The families of published models that compute exactly what some of ours compute.

    gpt2         pre-norm decoder, learned positions; its Conv1D weights are transposed
    llama        RMSNorm, SwiGLU, rotary positions, grouped queries, no biases
    bert         post-norm encoder, learned positions, segments; masked-LM and next-sentence heads

Each is one table of keys (`keys.py`) with its config.json in both directions (`configs.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub import configs
from nanolm.hub.keys import Rule, Table, pair, same, stacked

BLOCK = "trunk.stack.blocks.{}"


def attention_rows(model: ModelConfig) -> list[int]:
    """Rows of queries, keys and values."""
    queries, keys = (heads * model.head_width for heads in (model.n_heads, model.kv_heads))
    return [queries, keys, keys]


def gate_rows(model: ModelConfig) -> list[int]:
    """Rows of the gate and of what it gates."""
    return [model.ff_width, model.ff_width]


GPT2 = Table(
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

LLAMA = Table(
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

BERT = Table(
    whole=(
        *same("bert.embeddings.word_embeddings", "trunk.embedding"),
        *same("bert.embeddings.position_embeddings", "trunk.positions.table"),
        *same("bert.embeddings.token_type_embeddings", "trunk.segments"),
        *pair("bert.embeddings.LayerNorm", "trunk.embedding_norm"),
        Rule(("cls.predictions.bias",), "heads.lm.bias"),
        *same("cls.predictions.decoder", "heads.lm"),
        *pair("cls.predictions.transform.dense", "heads.lm.transform.dense"),
        *pair("cls.predictions.transform.LayerNorm", "heads.lm.transform.norm"),
        *pair("bert.pooler.dense", "heads.pair.dense"),
        *pair("cls.seq_relationship", "heads.pair.out"),
    ),
    layers=(
        *(
            stacked(
                "bert.encoder.layer.{}.attention.self",
                ("query", "key", "value"),
                f"{BLOCK}.attention.qkv",
                kind,
                attention_rows,
            )
            for kind in ("weight", "bias")
        ),
        *pair("bert.encoder.layer.{}.attention.output.dense", f"{BLOCK}.attention.out"),
        *pair("bert.encoder.layer.{}.attention.output.LayerNorm", f"{BLOCK}.attention_norm"),
        *pair("bert.encoder.layer.{}.intermediate.dense", f"{BLOCK}.feed_forward.up"),
        *pair("bert.encoder.layer.{}.output.dense", f"{BLOCK}.feed_forward.down"),
        *pair("bert.encoder.layer.{}.output.LayerNorm", f"{BLOCK}.feed_forward_norm"),
    ),
)


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
    own_width: bool = False
    """Whether heads may be narrower than their share of the width, and keys fewer than queries."""
    to_config: Callable[[ModelConfig, Mapping[str, Tensor]], dict[str, Any]]
    """config.json of our model with these published tensors, without what all families have."""
    to_model: Callable[[configs.Published], dict[str, Any]]
    """Keys of our model of a config.json."""
    tied: bool
    """Whether the vocabulary head shares the embedding where config.json says nothing."""
    embedding: str
    """The published key of the token embedding."""
    projection: str
    """The published key of the vocabulary head's weight, a duplicate of it where they are tied."""
    duplicates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Published keys that some files hold too, and whose they are."""
    prefix: str = ""
    """What the trunk's keys begin with; some files leave it out, or have it twice."""
    buffers: str = r"(?!)"
    """Pattern of keys that are no weights."""
    heads: tuple[str, ...] = ()
    """Prefixes of published keys that a file may lack as a whole: a fresh head."""
    has_head: str | None = None
    """One of our tensors without which the family is not computed, and what that would be."""
    objective: Callable[[frozenset[str]], dict[str, Any]] = lambda names: {"name": "clm"}
    """The objective that the published keys make: it decides which heads there are."""


COMMON = {
    "qk_norm": False,
    "embedding_scale": False,
    "attention_softcap": None,
    "attention_scale": None,
    "logit_scale": False,
    "logit_softcap": None,
}
"""Keys of the model that all families fix."""
GLOBAL = {"window": [None]}
PLAIN = ("gelu", "gelu_tanh", "relu2")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        name="gpt2",
        table=GPT2,
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
            "n_segments": 0,
            **GLOBAL,
        },
        to_config=configs.gpt2_config,
        to_model=configs.gpt2_model,
        tied=True,
        embedding="transformer.wte.weight",
        projection="lm_head.weight",
        prefix="transformer.",
        buffers=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "llama": Family(
        name="llama",
        table=LLAMA,
        classes=Classes("LlamaConfig", "LlamaForCausalLM"),
        fits={
            "trunk": "decoder",
            "norm": "rmsnorm",
            "norm_position": "pre",
            "embedding_norm": False,
            "positions.name": "rotary",
            "bias": False,
            "feed_forward": ("swiglu",),
            "n_segments": 0,
            **GLOBAL,
        },
        own_width=True,
        to_config=configs.llama_config,
        to_model=configs.llama_model,
        tied=False,
        embedding="model.embed_tokens.weight",
        projection="lm_head.weight",
        prefix="model.",
        buffers=r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    ),
    "bert": Family(
        name="bert",
        table=BERT,
        classes=Classes("BertConfig", "BertForMaskedLM", "BertForPreTraining"),
        fits={
            "trunk": "encoder",
            "norm": "layernorm",
            "norm_bias": True,
            "norm_position": "post",
            "embedding_norm": True,
            "positions.name": "learned",
            "bias": True,
            "feed_forward": PLAIN,
            **GLOBAL,
        },
        to_config=configs.bert_config,
        to_model=configs.bert_model,
        tied=True,
        embedding="bert.embeddings.word_embeddings.weight",
        projection="cls.predictions.decoder.weight",
        duplicates={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        prefix="bert.",
        buffers=r"(bert\.)?embeddings\.(position_ids|token_type_ids)",
        heads=("cls.predictions.", "cls.seq_relationship."),
        has_head="heads.lm.transform.dense.weight",
        objective=configs.bert_objective,
    ),
}
