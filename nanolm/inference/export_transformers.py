"""A trained model under the names and in the shapes that Hugging Face `transformers` reads.

The families and their keys stand in `hub/families/`. A model that differs in anything is refused
with the key that differs: nothing is written that `transformers` would compute differently. The
vocabulary is the padded one; the tokenizer's files are written by `hub/tokenizer_files.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.families import FAMILIES, Family
from nanolm.hub.keys import Tensors

SEGMENTS = "trunk.segments.weight"


def transformers_folder(
    config: Config, tokenizer: Tokenizer, tensors: Mapping[str, Tensor]
) -> tuple[Tensors, dict[str, bytes]]:
    """Tensors and config.json of the family that this model is; tensors are named as a Learner's.

    Raises UserError when it is none of them.
    """
    model = config.model
    family = family_of(model, tensors, tokenizer.roles())
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
    if family.has_head is not None and family.has_head not in tensors:
        raise UserError(
            f"no model of transformers computes this one exactly: {family.name} is nearest, but "
            f"its vocabulary head has no transform; export it with --format nanolm"
        )
    known = {rule.ours for rule in family.table.rules(model)}
    if SEGMENTS in known and SEGMENTS not in tensors:
        # BERT always adds the first of its segments: nothing.
        tensors = {**tensors, SEGMENTS: torch.zeros(1, model.d_model)}
    extra = tensors.keys() - known
    if extra:
        raise UserError(
            f"no model of transformers computes this one exactly: {family.name} is nearest, but "
            f"has no {min(extra)}; export it with --format nanolm"
        )
    named = family.table.to_theirs(tensors, model)
    if family.repeats and not model.tied:  # copies: a file of safetensors shares no memory
        named |= {other: named[own].clone() for other, own in family.duplicates.items()}
    return named


def family_of(
    model: ModelConfig, tensors: Mapping[str, Tensor] = {}, roles: Mapping[str, int] = {}
) -> Family:
    """The family of a model with these tensors and roles of its tokenizer; raises UserError naming
    what keeps the nearest from fitting."""
    misfits = {
        name: family.why_not(model) + heads_and_padding(family, tensors, roles)
        for name, family in FAMILIES.items()
    }
    name = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[name]:
        raise UserError(
            f"no model of transformers computes this one exactly: {name} is nearest, but "
            f"{'; '.join(misfits[name])}; export it with --format nanolm"
        )
    return FAMILIES[name]


def heads_and_padding(
    family: Family, tensors: Mapping[str, Tensor], roles: Mapping[str, int]
) -> list[str]:
    """What keeps a family from having these heads and this id of padding, in words."""
    known = {rule.ours.split(".")[1] for rule in family.table.whole if rule.ours[:6] == "heads."}
    heads = sorted({name.split(".")[1] for name in tensors if name.startswith("heads.")} - known)
    found = [f"it has no head {name}" for name in heads]
    pad = roles.get("pad")
    if family.pad is not None and pad != family.pad:
        found.append(f"the tokenizer's id of padding is {pad}")
    return found
