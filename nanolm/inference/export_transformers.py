"""A trained model under the names and in the shapes that Hugging Face `transformers` reads.

The families and their keys stand in `hub/families.py`: GPT-2 (pre-norm decoder, learned positions),
Llama (RMSNorm, SwiGLU, rotary positions, no biases) and BERT (post-norm encoder, learned positions,
segments). A model that differs in anything is refused with the key that differs: nothing is written
that `transformers` would compute differently. The vocabulary is the padded one; the tokenizer goes
along as it is (of a SentencePiece model only `nanolm` knows the spaces and escapes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.families import COMMON, FAMILIES, Family
from nanolm.hub.keys import Tensors

VOCABULARY = "heads.lm."
"""What the names of a vocabulary head's tensors begin with."""


def transformers_folder(
    config: Config, tokenizer: Tokenizer, tensors: Mapping[str, Tensor]
) -> tuple[Tensors, dict[str, bytes]]:
    """Tensors and config.json of the family that this model is; tensors are named as a Learner's.

    Raises UserError when it is none of them.
    """
    model = config.model
    family = family_of(model)
    named = published_tensors(family, model, tensors)
    facts = family.to_config(model, named)
    roles = {role: tokenizer.roles().get(role) for role in ("pad", "bos", "eos")}
    facts |= {f"{role}_token_id": number for role, number in roles.items()}
    facts |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tied}
    facts |= {"model_type": family.name, "dtype": "float32"}
    named = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    return named, {"config.json": json.dumps(facts, indent=2).encode() + b"\n"}


def published_tensors(family: Family, model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """A Learner's tensors under the family's names; raises UserError where it has none for one."""
    if family.has_head is not None and not any(name.startswith(VOCABULARY) for name in tensors):
        own = ", ".join(sorted({".".join(n.split(".")[:2]) for n in tensors if "heads." in n}))
        raise UserError(
            f"{family.name} of transformers is written with its vocabulary head, and this model "
            f"has {own or 'no head'} in its place; export it with --format nanolm"
        )
    if family.has_head is not None and family.has_head not in tensors:
        raise UserError(
            f"no model of transformers computes this one exactly: {family.name} is nearest, but "
            f"its vocabulary head has no transform; export it with --format nanolm"
        )
    if family.name == "bert" and "trunk.segments.weight" not in tensors:
        # BERT always adds the first of its segments: nothing.
        tensors = {**tensors, "trunk.segments.weight": torch.zeros(1, model.d_model)}
    extra = tensors.keys() - {rule.ours for rule in family.table.rules(model)}
    if extra:
        raise UserError(
            f"no model of transformers computes this one exactly: {family.name} is nearest, but "
            f"has no {min(extra)}; export it with --format nanolm"
        )
    named = family.table.to_theirs(tensors, model)
    if not model.tied:
        named |= {other: named[own] for other, own in family.duplicates.items()}
    return named


def family_of(model: ModelConfig) -> Family:
    """Its family; raises UserError naming what keeps the nearest from fitting."""
    misfits = {name: _misfits(model, family) for name, family in FAMILIES.items()}
    name = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[name]:
        raise UserError(
            f"no model of transformers computes this one exactly: {name} is nearest, but "
            f"{'; '.join(misfits[name])}; export it with --format nanolm"
        )
    return FAMILIES[name]


def _misfits(model: ModelConfig, family: Family) -> list[str]:
    found = []
    for key, wanted in (family.fits | COMMON).items():
        value: Any = model
        for part in key.split("."):
            value = getattr(value, part)
        if not (value in wanted if isinstance(wanted, tuple) else value == wanted):
            found.append(f"model.{key} is {value}")
    if family.own_width:
        return found + _rotary_misfits(model)
    if model.kv_heads != model.n_heads:
        found.append(f"model.n_kv_heads is {model.n_kv_heads}")
    if model.head_width * model.n_heads != model.d_model:
        found.append(f"model.head_dim is {model.head_dim}")
    return found


def _rotary_misfits(model: ModelConfig) -> list[str]:
    positions, found = model.positions, []
    if len(set(getattr(positions, "base", [0]))) > 1:
        found.append(f"model.positions.base is {positions.base}")
    if getattr(positions, "fraction", 1.0) != 1.0:
        found.append(f"model.positions.fraction is {positions.fraction}")
    return found
