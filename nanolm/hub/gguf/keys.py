"""What GGUF calls the values and tensors of a Llama-like model, in both directions.

Tensors are mapped to the family's published names, which its table knows (`../families/`). In files
of the architecture llama the rows of queries and keys stand in another order: rotary positions turn
neighbours there, (0, 1), (2, 3), …, and halves in the published form, (0, w/2), (1, w/2 + 1), …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require
from nanolm.hub.configs import Published
from nanolm.hub.gguf.reading import GgufFile

WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF, which is one of our families."""

    name: str
    layer: Mapping[str, str]
    """A layer's tensors: GGUF's names, and the published ones."""
    neighbours: bool
    """Whether queries and keys have neighbours turned."""


ARCHITECTURES = {
    "llama": Architecture("llama", LAYER, neighbours=True),
    "qwen3": Architecture("qwen3", LAYER | NORMED, neighbours=False),
}
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
EPSILON, BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
FIXED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that change what is computed, with the values that we compute."""


def architecture_of(file: GgufFile, family: str | None) -> Architecture:
    """Raises UserError for an architecture that is not known, or not the one that is named."""
    name = file.values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} is of the architecture {name!r}; nanolm imports "
            f"{', '.join(ARCHITECTURES)} from GGUF"
        )
    require(
        family in (None, name),
        f"{file.path} says that it is a {name} and --family says {family!r}; leave --family out",
    )
    return ARCHITECTURES[name]


def published_config(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """The config.json that a file's values make.

    Raises UserError for one that is missing, unknown, or of what we compute differently.
    """
    arch = architecture.name
    given = Published(file.path, file.values, arch)
    found = {theirs: given.size(f"{arch}.{ours}") for ours, theirs in SIZES.items()}
    heads = found["num_attention_heads"]
    own_width = f"{arch}.attention.key_length"
    width = given.size(own_width) if own_width in file.values else found["hidden_size"] // heads
    same_width = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    fixed = FIXED | dict.fromkeys(same_width, (width,))
    known = {*SIZES, *fixed, EPSILON, BASE, "vocab_size", "attention.head_count_kv"}
    for key, value in file.values.items():
        short = key.removeprefix(f"{arch}.")
        if short == key:
            continue
        require(
            short in known,
            f"{file.path} sets {key} to {value!r}, which nanolm does not know of a {arch}; choose "
            f"another model",
        )
        require(
            short not in fixed or value in fixed[short],
            f"{file.path} sets {key} to {value!r}, and nanolm computes a {arch} only with "
            f"{' or '.join(map(repr, fixed.get(short, ())))}; choose another model",
        )
    require(  # before anything is made for each of them
        found["num_hidden_layers"] <= len(file.tensors),
        f"{file.path} sets {arch}.block_count to {found['num_hidden_layers']} and holds only "
        f"{len(file.tensors)} tensors; fetch it again",
    )
    require(
        f"{arch}.{EPSILON}" in file.values,
        f"{file.path} lacks {arch}.{EPSILON}; fetch the whole file",
    )
    kv_heads = f"{arch}.attention.head_count_kv"
    return found | {
        "model_type": arch,
        "num_key_value_heads": given.size(kv_heads) if kv_heads in file.values else heads,
        "head_dim": width,
        "rms_norm_eps": shortest(given.number(f"{arch}.{EPSILON}", 0.0)),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shortest(given.number(f"{arch}.{BASE}", 10000.0)),
        },
        "vocab_size": len(file.tensors["token_embd.weight"])
        if "token_embd.weight" in file.tensors
        else given.size(f"{arch}.vocab_size"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def shortest(value: float) -> float:
    """The number of fewest digits that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def names(architecture: Architecture, layers: int, *, tied: bool) -> dict[str, str]:
    """GGUF's name of each tensor, and the published one."""
    found = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in WHOLE.items()}
    if tied:
        del found["output.weight"]
    for layer in range(layers):
        for ours, theirs in architecture.layer.items():
            found[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return found


def shapes(architecture: Architecture, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, rows first, by GGUF's names."""
    wide, inner = model.d_model, model.ff_width
    queries, keys = (heads * model.head_width for heads in (model.n_heads, model.kv_heads))
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (wide,),
        "attn_q": (queries, wide),
        "attn_k": (keys, wide),
        "attn_v": (keys, wide),
        "attn_output": (wide, queries),
        "attn_q_norm": (model.head_width,),
        "attn_k_norm": (model.head_width,),
        "ffn_norm": (wide,),
        "ffn_gate": (inner, wide),
        "ffn_up": (inner, wide),
        "ffn_down": (wide, inner),
    }
    rows = (model.n_tokens, wide)
    found: dict[str, tuple[int, ...]] = {"output_norm.weight": (wide,)}
    found |= {"token_embd.weight": rows, "output.weight": rows}
    for name in names(architecture, model.n_layers, tied=model.tied):
        if name.startswith("blk."):
            found[name] = layer[name.split(".")[2]]
    return found


def require_whole(file: GgufFile, architecture: Architecture, model: ModelConfig) -> None:
    """Raises UserError for a tensor that is missing, extra or of another shape."""
    wanted = names(architecture, model.n_layers, tied=model.tied)
    expected = shapes(architecture, model)
    require(
        "rope_freqs.weight" not in file.tensors,
        f"{file.path} holds rope_freqs.weight, so its rotary positions are scaled, and nanolm "
        f"computes a {architecture.name} only without; choose another model",
    )
    for name, tensor in file.tensors.items():
        require(
            name in wanted,
            f"{file.path} holds {name} ({by(tensor.shape)}), which a {architecture.name} of these "
            f"values does not have; choose another model",
        )
        require(
            tuple(tensor.shape) == expected[name],
            f"{file.path} holds {name} as {by(tensor.shape)}, and by its values it is "
            f"{by(expected[name])}; fetch it again",
        )
    missing = [name for name in wanted if name not in file.tensors]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    require(
        not missing,
        f"{file.path} lacks {missing[0] if missing else ''}{more}, which a {architecture.name} "
        f"of these values has; fetch the whole file",
    )


def by(shape: Any) -> str:
    """A shape in words."""
    return " x ".join(str(size) for size in shape)


def to_published(
    architecture: Architecture, tensors: Mapping[str, Tensor], model: ModelConfig
) -> dict[str, Tensor]:
    """A file's tensors under the published names, queries and keys with halves turned."""
    return {
        theirs: halves(tensors[ours], heads_of(ours, model))
        if architecture.neighbours
        else tensors[ours]
        for ours, theirs in names(architecture, model.n_layers, tied=model.tied).items()
    }


def to_gguf(
    architecture: Architecture, published: Mapping[str, Tensor], model: ModelConfig
) -> dict[str, Tensor]:
    """Published tensors under GGUF's names, in the order that its files have."""
    return {
        ours: neighbours(published[theirs], heads_of(ours, model))
        if architecture.neighbours
        else published[theirs]
        for ours, theirs in names(architecture, model.n_layers, tied=model.tied).items()
    }


def heads_of(name: str, model: ModelConfig) -> int | None:
    """How many heads' rows a tensor has that rotary positions turn; None of any other."""
    kind = name.split(".")[-2]
    return {"attn_q": model.n_heads, "attn_k": model.kv_heads}.get(kind)


def halves(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of queries or keys [heads * w, D] with halves turned, of such with neighbours turned."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def neighbours(rows: Tensor, heads: int | None) -> Tensor:
    """The inverse of `halves`."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
