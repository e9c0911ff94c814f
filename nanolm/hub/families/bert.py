"""BERT and what came of it: post-norm encoders with learned positions.

bert         segments; heads for masked words and next sentences
roberta      one segment, positions that begin behind the id of padding, no second head
distilbert   neither segments nor a second head; layers under other names
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.hub.configs import ACTIVATIONS, Published
from nanolm.hub.families.base import BLOCK, PLAIN, Classes, Family, attention_rows
from nanolm.hub.keys import Rule, Table, pair, same, stacked

ENCODER = {
    "trunk": "encoder",
    "norm": "layernorm",
    "norm_bias": True,
    "norm_position": "post",
    "embedding_norm": True,
    "positions.name": "learned",
    "bias": True,
    "feed_forward": PLAIN,
    "window": [None],
}
TRANSFORM = "heads.lm.transform.dense.weight"
UNUSED = 2
"""Rows of RoBERTa's position table that no token reads: those up to the id of padding, 1."""


def attention(prefix: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """Weight and bias of queries, keys and values."""
    return tuple(
        stacked(prefix, names, f"{BLOCK}.attention.qkv", kind, attention_rows)
        for kind in ("weight", "bias")
    )


def embeddings(prefix: str, *, unused: int = 0) -> tuple[Rule, ...]:
    """Words, positions, segments and their norm."""
    return (
        *same(f"{prefix}.word_embeddings", "trunk.embedding"),
        *same(f"{prefix}.position_embeddings", "trunk.positions.table", unused=unused),
        *same(f"{prefix}.token_type_embeddings", "trunk.segments"),
        *pair(f"{prefix}.LayerNorm", "trunk.embedding_norm"),
    )


def layers(prefix: str) -> tuple[Rule, ...]:
    """A layer of BERT or RoBERTa."""
    return (
        *attention(f"{prefix}.attention.self", ("query", "key", "value")),
        *pair(f"{prefix}.attention.output.dense", f"{BLOCK}.attention.out"),
        *pair(f"{prefix}.attention.output.LayerNorm", f"{BLOCK}.attention_norm"),
        *pair(f"{prefix}.intermediate.dense", f"{BLOCK}.feed_forward.up"),
        *pair(f"{prefix}.output.dense", f"{BLOCK}.feed_forward.down"),
        *pair(f"{prefix}.output.LayerNorm", f"{BLOCK}.feed_forward_norm"),
    )


BERT_TABLE = Table(
    whole=(
        *embeddings("bert.embeddings"),
        Rule(("cls.predictions.bias",), "heads.lm.bias"),
        *same("cls.predictions.decoder", "heads.lm"),
        *pair("cls.predictions.transform.dense", "heads.lm.transform.dense"),
        *pair("cls.predictions.transform.LayerNorm", "heads.lm.transform.norm"),
        *pair("bert.pooler.dense", "heads.pair.dense"),
        *pair("cls.seq_relationship", "heads.pair.out"),
    ),
    layers=layers("bert.encoder.layer.{}"),
)
ROBERTA_TABLE = Table(
    whole=(
        *embeddings("roberta.embeddings", unused=UNUSED),
        Rule(("lm_head.bias",), "heads.lm.bias"),
        *same("lm_head.decoder", "heads.lm"),
        *pair("lm_head.dense", "heads.lm.transform.dense"),
        *pair("lm_head.layer_norm", "heads.lm.transform.norm"),
    ),
    layers=layers("roberta.encoder.layer.{}"),
)
DISTILBERT_TABLE = Table(
    whole=(
        *same("distilbert.embeddings.word_embeddings", "trunk.embedding"),
        *same("distilbert.embeddings.position_embeddings", "trunk.positions.table"),
        *pair("distilbert.embeddings.LayerNorm", "trunk.embedding_norm"),
        Rule(("vocab_projector.bias",), "heads.lm.bias"),
        *same("vocab_projector", "heads.lm"),
        *pair("vocab_transform", "heads.lm.transform.dense"),
        *pair("vocab_layer_norm", "heads.lm.transform.norm"),
    ),
    layers=(
        *attention("distilbert.transformer.layer.{}.attention", ("q_lin", "k_lin", "v_lin")),
        *pair("distilbert.transformer.layer.{}.attention.out_lin", f"{BLOCK}.attention.out"),
        *pair("distilbert.transformer.layer.{}.sa_layer_norm", f"{BLOCK}.attention_norm"),
        *pair("distilbert.transformer.layer.{}.ffn.lin1", f"{BLOCK}.feed_forward.up"),
        *pair("distilbert.transformer.layer.{}.ffn.lin2", f"{BLOCK}.feed_forward.down"),
        *pair("distilbert.transformer.layer.{}.output_layer_norm", f"{BLOCK}.feed_forward_norm"),
    ),
)


def sizes(model: ModelConfig, segments: int) -> dict[str, Any]:
    """What config.json says of BERT and RoBERTa alike."""
    return {
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": segments,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": ACTIVATIONS[model.feed_forward],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
    }


def post_norm() -> dict[str, Any]:
    """Keys of our model that they all have."""
    return {"trunk": "encoder", "norm_position": "post", "embedding_norm": True}


def to_model(config: Published) -> dict[str, Any]:
    """BERT (Devlin et al. 2019)."""
    config.only(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return post_norm() | {
        "n_layers": config.size("num_hidden_layers"),
        "n_heads": config.size("num_attention_heads"),
        "d_model": config.size("hidden_size"),
        "d_ff": config.size("intermediate_size"),
        "max_length": config.size("max_position_embeddings"),
        "n_segments": config.amount("type_vocab_size", 2),
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "feed_forward": config.activation("hidden_act", "gelu"),
        "dropout": config.number("hidden_dropout_prob", 0.1),
        "attention_dropout": config.number("attention_probs_dropout_prob", 0.1),
    }


def bert_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """BertForPreTraining (or BertForMaskedLM, without a next-sentence head)."""
    pooled = "bert.pooler.dense.weight" in named
    segments = len(named["bert.embeddings.token_type_embeddings.weight"])
    architecture = "BertForPreTraining" if pooled else "BertForMaskedLM"
    return sizes(model, segments) | {"architectures": [architecture]}


def bert_objective(names: frozenset[str]) -> dict[str, Any]:
    """Masked language modelling, with next sentences where there is a pooler."""
    return {"name": "mlm_pair" if "bert.pooler.dense.weight" in names else "mlm"}


def masked_words(names: frozenset[str]) -> dict[str, Any]:
    """Masked language modelling."""
    return {"name": "mlm"}


def roberta_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """RobertaForMaskedLM."""
    facts = sizes(model, 1) | {"max_position_embeddings": model.max_length + UNUSED}
    return facts | {"architectures": ["RobertaForMaskedLM"]}


def roberta_model(config: Published) -> dict[str, Any]:
    """RoBERTa (Liu et al. 2019b): its positions are counted from behind the id of padding."""
    config.only(pad_token_id=UNUSED - 1)
    model = to_model(config)
    return model | {
        "max_length": model["max_length"] - UNUSED,
        "norm_eps": config.number("layer_norm_eps", 1e-5),
        "n_segments": config.amount("type_vocab_size", 1),
    }


def distilbert_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """DistilBertForMaskedLM."""
    return {
        "architectures": ["DistilBertForMaskedLM"],
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "dim": model.d_model,
        "hidden_dim": model.ff_width,
        "max_position_embeddings": model.max_length,
        "activation": ACTIVATIONS[model.feed_forward],
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
    }


def distilbert_model(config: Published) -> dict[str, Any]:
    """DistilBERT (Sanh et al. 2019)."""
    config.only(sinusoidal_pos_embds=False)
    return post_norm() | {
        "n_layers": config.size("n_layers"),
        "n_heads": config.size("n_heads"),
        "d_model": config.size("dim"),
        "d_ff": config.size("hidden_dim"),
        "max_length": config.size("max_position_embeddings"),
        "norm_eps": 1e-12,
        "feed_forward": config.activation("activation", "gelu"),
        "dropout": config.number("dropout", 0.1),
        "attention_dropout": config.number("attention_dropout", 0.1),
    }


BERT = Family(
    name="bert",
    acts_alike=True,
    table=BERT_TABLE,
    classes=Classes("BertConfig", "BertForMaskedLM", "BertForPreTraining"),
    fits=ENCODER,
    to_config=bert_config,
    to_model=to_model,
    tied=True,
    embedding="bert.embeddings.word_embeddings.weight",
    projection="cls.predictions.decoder.weight",
    duplicates={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    prefix="bert.",
    buffers=r"(bert\.)?embeddings\.(position_ids|token_type_ids)",
    heads={"lm": ("cls.predictions.",), "pair": ("cls.seq_relationship.",)},
    has_head=TRANSFORM,
    objective=bert_objective,
)
ROBERTA = Family(
    name="roberta",
    acts_alike=True,
    table=ROBERTA_TABLE,
    classes=Classes("RobertaConfig", "RobertaForMaskedLM"),
    fits=ENCODER | {"n_segments": 1},
    pad=UNUSED - 1,
    to_config=roberta_config,
    to_model=roberta_model,
    tied=True,
    embedding="roberta.embeddings.word_embeddings.weight",
    projection="lm_head.decoder.weight",
    duplicates={"lm_head.decoder.bias": "lm_head.bias"},
    prefix="roberta.",
    buffers=r"(roberta\.)?embeddings\.(position_ids|token_type_ids)",
    unread=r"roberta\.pooler\.dense\.(weight|bias)",
    heads={"lm": ("lm_head.",)},
    has_head=TRANSFORM,
    objective=masked_words,
)
DISTILBERT = Family(
    name="distilbert",
    acts_alike=True,
    table=DISTILBERT_TABLE,
    classes=Classes("DistilBertConfig", "DistilBertForMaskedLM"),
    fits=ENCODER | {"n_segments": 0, "norm_eps": 1e-12},
    to_config=distilbert_config,
    to_model=distilbert_model,
    tied=True,
    embedding="distilbert.embeddings.word_embeddings.weight",
    projection="vocab_projector.weight",
    prefix="distilbert.",
    buffers=r"(distilbert\.)?embeddings\.position_ids",
    heads={"lm": ("vocab_",)},
    has_head=TRANSFORM,
    objective=masked_words,
)
