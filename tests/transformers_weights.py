"""Weights of `transformers` models under nanolm's names: the two then compute the same function.

Each function returns the state dict of a Learner (`trunk.…`, `heads.…`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gpt2(model: nn.Module) -> dict[str, Tensor]:
    """GPT2LMHeadModel; its Conv1D weights are transposed linear weights."""
    source = model.state_dict()
    state = {
        "trunk.embedding.weight": source["transformer.wte.weight"],
        "trunk.positions.table.weight": source["transformer.wpe.weight"],
        **norm("trunk.stack.final_norm", source, "transformer.ln_f"),
        "heads.lm.weight": source["lm_head.weight"],
    }
    for layer in range(model.config.n_layer):
        ours, theirs = f"trunk.stack.blocks.{layer}", f"transformer.h.{layer}"
        state |= norm(f"{ours}.attention_norm", source, f"{theirs}.ln_1")
        state |= norm(f"{ours}.feed_forward_norm", source, f"{theirs}.ln_2")
        for mine, other in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("feed_forward.up", "mlp.c_fc"),
            ("feed_forward.down", "mlp.c_proj"),
        ):
            state[f"{ours}.{mine}.weight"] = source[f"{theirs}.{other}.weight"].T
            state[f"{ours}.{mine}.bias"] = source[f"{theirs}.{other}.bias"]
    return state


def llama(model: nn.Module) -> dict[str, Tensor]:
    """LlamaForCausalLM, grouped queries included."""
    source = model.state_dict()
    state = {
        "trunk.embedding.weight": source["model.embed_tokens.weight"],
        "trunk.stack.final_norm.weight": source["model.norm.weight"],
        "heads.lm.weight": source["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"trunk.stack.blocks.{layer}", f"model.layers.{layer}"
        state[f"{ours}.attention_norm.weight"] = source[f"{theirs}.input_layernorm.weight"]
        state[f"{ours}.feed_forward_norm.weight"] = source[
            f"{theirs}.post_attention_layernorm.weight"
        ]
        state[f"{ours}.attention.qkv.weight"] = stacked(
            source, f"{theirs}.self_attn", ("q_proj", "k_proj", "v_proj"), "weight"
        )
        state[f"{ours}.attention.out.weight"] = source[f"{theirs}.self_attn.o_proj.weight"]
        state[f"{ours}.feed_forward.gate_up.weight"] = stacked(
            source, f"{theirs}.mlp", ("gate_proj", "up_proj"), "weight"
        )
        state[f"{ours}.feed_forward.down.weight"] = source[f"{theirs}.mlp.down_proj.weight"]
    return state


def bert(model: nn.Module) -> dict[str, Tensor]:
    """BertForPreTraining: trunk, MLM head and the next-sentence head behind the pooler."""
    source = model.state_dict()
    embeddings = "bert.embeddings"
    state = {
        "trunk.embedding.weight": source[f"{embeddings}.word_embeddings.weight"],
        "trunk.positions.table.weight": source[f"{embeddings}.position_embeddings.weight"],
        "trunk.segments.weight": source[f"{embeddings}.token_type_embeddings.weight"],
        **norm("trunk.embedding_norm", source, f"{embeddings}.LayerNorm"),
        "heads.lm.weight": source["cls.predictions.decoder.weight"],
        "heads.lm.bias": source["cls.predictions.bias"],
        **linear("heads.lm.transform.dense", source, "cls.predictions.transform.dense"),
        **norm("heads.lm.transform.norm", source, "cls.predictions.transform.LayerNorm"),
        **linear("heads.pair.dense", source, "bert.pooler.dense"),
        **linear("heads.pair.out", source, "cls.seq_relationship"),
    }
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"trunk.stack.blocks.{layer}", f"bert.encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            state[f"{ours}.attention.qkv.{kind}"] = stacked(
                source, f"{theirs}.attention.self", ("query", "key", "value"), kind
            )
        state |= linear(f"{ours}.attention.out", source, f"{theirs}.attention.output.dense")
        state |= norm(f"{ours}.attention_norm", source, f"{theirs}.attention.output.LayerNorm")
        state |= linear(f"{ours}.feed_forward.up", source, f"{theirs}.intermediate.dense")
        state |= linear(f"{ours}.feed_forward.down", source, f"{theirs}.output.dense")
        state |= norm(f"{ours}.feed_forward_norm", source, f"{theirs}.output.LayerNorm")
    return state


def modernbert(model: nn.Module) -> dict[str, Tensor]:
    """ModernBertForMaskedLM: its fused projections lie in the same order as ours."""
    source = model.state_dict()
    state = {
        "trunk.embedding.weight": source["model.embeddings.tok_embeddings.weight"],
        "trunk.embedding_norm.weight": source["model.embeddings.norm.weight"],
        "trunk.stack.final_norm.weight": source["model.final_norm.weight"],
        "heads.lm.weight": source["decoder.weight"],
        "heads.lm.bias": source["decoder.bias"],
        "heads.lm.transform.dense.weight": source["head.dense.weight"],
        "heads.lm.transform.norm.weight": source["head.norm.weight"],
    }
    names = {
        "attention_norm": "attn_norm",
        "attention.qkv": "attn.Wqkv",
        "attention.out": "attn.Wo",
        "feed_forward_norm": "mlp_norm",
        "feed_forward.gate_up": "mlp.Wi",
        "feed_forward.down": "mlp.Wo",
    }
    for layer in range(model.config.num_hidden_layers):
        for mine, other in names.items():
            key = f"model.layers.{layer}.{other}.weight"
            if key in source:  # the first layer has no attention norm
                state[f"trunk.stack.blocks.{layer}.{mine}.weight"] = source[key]
    return state


def linear(ours: str, source: dict[str, Tensor], theirs: str) -> dict[str, Tensor]:
    """Weight and bias of a linear layer, or of a norm."""
    return {f"{ours}.{kind}": source[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


norm = linear


def stacked(source: dict[str, Tensor], prefix: str, names: tuple[str, ...], kind: str) -> Tensor:
    """The rows of several linear layers in one weight or bias."""
    return torch.cat([source[f"{prefix}.{name}.{kind}"] for name in names])
