"""config.json of each family, to and from the keys of our model.

A key that is missing there has the family's published default where there is one; sizes have none.
A value that would be computed differently here is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
OURS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A config.json, asked key by key."""

    path: str
    values: Mapping[str, Any]
    family: str

    def size(self, key: str) -> int:
        """A size; raises UserError unless it is there."""
        value: Any = self.values.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        require(whole, f"{self.path} gives {key} as {value!r}; it must be a positive whole number")
        return int(value)

    def get(self, key: str, default: Any) -> Any:
        """A value, or the family's default where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A number that is not negative, or the family's default."""
        value = self.get(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        require(good, f"{self.path} gives {key} as {value!r}; it must be a number")
        return float(value)

    def only(self, **wanted: Any) -> None:
        """Raises UserError for a key that is there with another value than the one we compute."""
        for key, value in wanted.items():
            if self.get(key, value) != value:
                raise UserError(
                    f"{self.path} sets {key} to {self.values[key]!r}, and nanolm computes "
                    f"{self.family} only with {value!r}; choose another checkpoint"
                )

    def activation(self, key: str, default: str) -> str:
        """Our name of the feed-forward's activation."""
        name = self.get(key, default)
        known = ", ".join(OURS)
        require(
            isinstance(name, str) and name in OURS,
            f"{self.path} sets {key} to {name!r}, and nanolm computes {self.family} only with "
            f"{known}; choose another checkpoint",
        )
        return OURS[name]


def gpt2_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
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


def gpt2_model(config: Published) -> dict[str, Any]:
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


def llama_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
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


def llama_model(config: Published) -> dict[str, Any]:
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
        f"and nanolm computes llama only with 'default' and 1.0; choose another checkpoint",
    )
    given = rope.get("rope_theta")
    if given is None:
        return config.number("rope_theta", 10000.0)
    return dataclasses.replace(config, values=rope).number("rope_theta", given)


def bert_config(model: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """BertForPreTraining (or BertForMaskedLM, without a next-sentence head)."""
    pooled = "bert.pooler.dense.weight" in named
    return {
        "architectures": ["BertForPreTraining" if pooled else "BertForMaskedLM"],
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": len(named["bert.embeddings.token_type_embeddings.weight"]),
        "layer_norm_eps": model.norm_eps,
        "hidden_act": ACTIVATIONS[model.feed_forward],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
    }


def bert_model(config: Published) -> dict[str, Any]:
    """BERT (Devlin et al. 2019)."""
    config.only(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return {
        "trunk": "encoder",
        "n_layers": config.size("num_hidden_layers"),
        "n_heads": config.size("num_attention_heads"),
        "d_model": config.size("hidden_size"),
        "d_ff": config.size("intermediate_size"),
        "max_length": config.size("max_position_embeddings"),
        "n_segments": int(config.number("type_vocab_size", 2)),
        "norm_position": "post",
        "embedding_norm": True,
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "feed_forward": config.activation("hidden_act", "gelu"),
        "dropout": config.number("hidden_dropout_prob", 0.1),
        "attention_dropout": config.number("attention_probs_dropout_prob", 0.1),
    }


def bert_objective(names: frozenset[str]) -> dict[str, Any]:
    """Masked language modelling, with next sentences where there is a pooler."""
    return {"name": "mlm_pair" if "bert.pooler.dense.weight" in names else "mlm"}
