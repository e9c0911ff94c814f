"""A trained model under the names and in the shapes that Hugging Face `transformers` reads.

Three families compute exactly what some of our models compute: GPT-2 (pre-norm decoder, learned
positions), Llama (RMSNorm, SwiGLU, rotary positions, no biases) and BERT (post-norm encoder,
learned positions, segments). A model that differs in anything is refused with the key that differs:
nothing is written that `transformers` would compute differently. The vocabulary is the padded one;
the tokenizer is the SentencePiece model, which `nanolm` reads (see its spaces and escapes there).

Shapes: D model width, F feed-forward width, Q = heads x head width, G = key/value rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError

Tensors = dict[str, Tensor]

COMMON = {
    "qk_norm": False,
    "window": [None],
    "embedding_scale": False,
    "attention_softcap": None,
    "attention_scale": None,
    "logit_scale": False,
    "logit_softcap": None,
}
"""Keys of the model that all three families fix."""

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "trunk": "decoder",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "pre",
        "embedding_norm": False,
        "positions.name": "learned",
        "bias": True,
        "feed_forward": ("gelu", "gelu_tanh", "relu2"),
        "n_segments": 0,
    },
    "llama": {
        "trunk": "decoder",
        "norm": "rmsnorm",
        "norm_position": "pre",
        "embedding_norm": False,
        "positions.name": "rotary",
        "bias": False,
        "feed_forward": ("swiglu",),
        "n_segments": 0,
    },
    "bert": {
        "trunk": "encoder",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "post",
        "embedding_norm": True,
        "positions.name": "learned",
        "bias": True,
        "feed_forward": ("gelu", "gelu_tanh", "relu2"),
    },
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}


def transformers_folder(
    config: Config, tokenizer: Tokenizer, tensors: Mapping[str, Tensor]
) -> tuple[Tensors, dict[str, bytes]]:
    """Tensors and config.json of the family that this model is; tensors are named as a Learner's.

    Raises UserError when it is none of them.
    """
    model = config.model
    family = family_of(model)
    build: Callable = {"gpt2": _gpt2, "llama": _llama, "bert": _bert}[family]
    named, facts = build(model, tensors)
    roles = {role: tokenizer.roles().get(role) for role in ("pad", "bos", "eos")}
    facts |= {f"{role}_token_id": number for role, number in roles.items()}
    facts |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tied}
    facts |= {"model_type": family, "dtype": "float32"}
    named = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    return named, {"config.json": json.dumps(facts, indent=2).encode() + b"\n"}


def family_of(model: ModelConfig) -> str:
    """gpt2, llama or bert; raises UserError naming what keeps the nearest from fitting."""
    misfits = {family: _misfits(model, keys | COMMON) for family, keys in FAMILIES.items()}
    family = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[family]:
        raise UserError(
            f"no model of transformers computes this one exactly: {family} is nearest, but "
            f"{'; '.join(misfits[family])}; export it with --format nanolm"
        )
    return family


def _misfits(model: ModelConfig, keys: dict[str, Any]) -> list[str]:
    found = []
    for key, wanted in keys.items():
        value: Any = model
        for part in key.split("."):
            value = getattr(value, part)
        if not (value in wanted if isinstance(wanted, tuple) else value == wanted):
            found.append(f"model.{key} is {value}")
    if keys.get("norm") == "rmsnorm":
        return found + _llama_misfits(model)
    if model.kv_heads != model.n_heads:
        found.append(f"model.n_kv_heads is {model.n_kv_heads}")
    if model.head_width * model.n_heads != model.d_model:
        found.append(f"model.head_dim is {model.head_dim}")
    return found


def _llama_misfits(model: ModelConfig) -> list[str]:
    positions, found = model.positions, []
    if len(set(getattr(positions, "base", [0]))) > 1:
        found.append(f"model.positions.base is {positions.base}")
    if getattr(positions, "fraction", 1.0) != 1.0:
        found.append(f"model.positions.fraction is {positions.fraction}")
    return found


def _gpt2(model: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, Any]]:
    """GPT2LMHeadModel; its Conv1D weights are transposed linear weights."""
    _no_head_extras(tensors, "gpt2")
    named = {
        "transformer.wte.weight": tensors["trunk.embedding.weight"],
        "transformer.wpe.weight": tensors["trunk.positions.table.weight"],
        **_pair("transformer.ln_f", tensors, "trunk.stack.final_norm"),
    }
    parts = {
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "mlp.c_fc": "feed_forward.up",
        "mlp.c_proj": "feed_forward.down",
    }
    for layer in range(model.n_layers):
        theirs, ours = f"transformer.h.{layer}", f"trunk.stack.blocks.{layer}"
        named |= _pair(f"{theirs}.ln_1", tensors, f"{ours}.attention_norm")
        named |= _pair(f"{theirs}.ln_2", tensors, f"{ours}.feed_forward_norm")
        for other, mine in parts.items():
            named[f"{theirs}.{other}.weight"] = tensors[f"{ours}.{mine}.weight"].T
            named[f"{theirs}.{other}.bias"] = tensors[f"{ours}.{mine}.bias"]
    if not model.tied:
        named["lm_head.weight"] = tensors["heads.lm.weight"]
    return named, {
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


def _llama(model: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, Any]]:
    """LlamaForCausalLM, grouped queries included."""
    _no_head_extras(tensors, "llama")
    named = {
        "model.embed_tokens.weight": tensors["trunk.embedding.weight"],
        "model.norm.weight": tensors["trunk.stack.final_norm.weight"],
    }
    queries, keys = (heads * model.head_width for heads in (model.n_heads, model.kv_heads))
    for layer in range(model.n_layers):
        theirs, ours = f"model.layers.{layer}", f"trunk.stack.blocks.{layer}"
        qkv = tensors[f"{ours}.attention.qkv.weight"].split([queries, keys, keys])
        gate_up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"{theirs}.input_layernorm.weight": tensors[f"{ours}.attention_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": tensors[
                f"{ours}.feed_forward_norm.weight"
            ],
            f"{theirs}.self_attn.o_proj.weight": tensors[f"{ours}.attention.out.weight"],
            f"{theirs}.mlp.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
        }
        for name, rows in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
            named[f"{theirs}.self_attn.{name}.weight"] = rows
        for name, rows in zip(("gate_proj", "up_proj"), gate_up, strict=True):
            named[f"{theirs}.mlp.{name}.weight"] = rows
    if not model.tied:
        named["lm_head.weight"] = tensors["heads.lm.weight"]
    return named, {
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.positions.base[0]},
    }


def _bert(model: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, Any]]:
    """BertForPreTraining (or BertForMaskedLM, without a next-sentence head)."""
    pooled = "heads.pair.dense.weight" in tensors
    if "heads.lm.transform.dense.weight" not in tensors:
        raise UserError(
            "no model of transformers computes this one exactly: bert is nearest, but its "
            "vocabulary head has no transform; export it with --format nanolm"
        )
    embeddings = "bert.embeddings"
    segments = tensors.get("trunk.segments.weight")
    if segments is None:  # BERT always adds the first of its segments: nothing
        segments = torch.zeros(1, model.d_model)
    named = {
        f"{embeddings}.word_embeddings.weight": tensors["trunk.embedding.weight"],
        f"{embeddings}.position_embeddings.weight": tensors["trunk.positions.table.weight"],
        f"{embeddings}.token_type_embeddings.weight": segments,
        **_pair(f"{embeddings}.LayerNorm", tensors, "trunk.embedding_norm"),
        "cls.predictions.bias": tensors["heads.lm.bias"],
        **_pair("cls.predictions.transform.dense", tensors, "heads.lm.transform.dense"),
        **_pair("cls.predictions.transform.LayerNorm", tensors, "heads.lm.transform.norm"),
    }
    if pooled:
        named |= _pair("bert.pooler.dense", tensors, "heads.pair.dense")
        named |= _pair("cls.seq_relationship", tensors, "heads.pair.out")
    if not model.tied:
        named["cls.predictions.decoder.weight"] = tensors["heads.lm.weight"]
        named["cls.predictions.decoder.bias"] = tensors["heads.lm.bias"]
    names = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    }
    for layer in range(model.n_layers):
        theirs, ours = f"bert.encoder.layer.{layer}", f"trunk.stack.blocks.{layer}"
        for other, mine in names.items():
            named |= _pair(f"{theirs}.{other}", tensors, f"{ours}.{mine}")
        for kind in ("weight", "bias"):
            rows = tensors[f"{ours}.attention.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), rows, strict=True):
                named[f"{theirs}.attention.self.{name}.{kind}"] = part
    return named, {
        "architectures": ["BertForPreTraining" if pooled else "BertForMaskedLM"],
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width,
        "max_position_embeddings": model.max_length,
        "type_vocab_size": len(segments),
        "layer_norm_eps": model.norm_eps,
        "hidden_act": ACTIVATIONS[model.feed_forward],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
    }


def _no_head_extras(tensors: Mapping[str, Tensor], family: str) -> None:
    extras = [name for name in tensors if name.startswith("heads.") and name != "heads.lm.weight"]
    if extras:
        raise UserError(
            f"no model of transformers computes this one exactly: {family} is nearest, but has no "
            f"{extras[0]}; export it with --format nanolm"
        )


def _pair(theirs: str, tensors: Mapping[str, Tensor], ours: str) -> Tensors:
    """Weight and bias of a linear layer or a norm."""
    return {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")}
