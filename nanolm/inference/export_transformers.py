"""A trained model under the names and in the shapes that Hugging Face `transformers` reads.

The families and their keys stand in `hub/families/`. A model that differs in anything is refused
with the key that differs: nothing is written that `transformers` would compute differently. The
vocabulary is the padded one; the tokenizer's files are written by `hub/tokenizer_files.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES, Family
from nanolm.hub.importing import proved
from nanolm.hub.keys import Tensors
from nanolm.hub.published import Imported
from nanolm.hub.tokenizer_files import compared, tokenizer_files
from nanolm.learner import Learner

Note = Callable[[str], None]
SEGMENTS = "trunk.segments.weight"


def published_folder(
    config: Config, tokenizer: Tokenizer, learner: Learner, note: Note = print
) -> tuple[Tensors, dict[str, bytes], dict[str, Any]]:
    """(tensors, files, figures of the proof) of a model in evaluation mode.

    Raises UserError when no family computes it, or transformers computes something else.
    """
    tensors, files = transformers_folder(config, tokenizer, learner_tensors(learner))
    proof = proved(as_published(config, tokenizer, learner, tensors, files), "this model", note)
    files |= tokenizer_files(tokenizer, config.model)
    figures = {
        "largest_difference": None if proof is None else proof.largest,
        "greedy_tokens": None if proof is None else proof.greedy,
        "texts_with_other_ids": compared(tokenizer, files, note),
    }
    return tensors, files, figures


def as_published(
    config: Config,
    tokenizer: Tokenizer,
    learner: Learner,
    tensors: Tensors,
    files: Mapping[str, bytes],
) -> Imported:
    """Our model beside its published tensors and config.json, for the proof."""
    values = json.loads(files["config.json"])
    family = FAMILIES[values["model_type"]]
    published = Published("config.json", values, family.name)
    return Imported(family, config, tokenizer, learner, tensors, published, ())


TRANSFORMED = ".transform.dense.weight"
"""What the names of tensors of a transform before a head's last layer end with."""
VOCABULARY = "heads.lm."
"""What the names of a vocabulary head's tensors begin with."""


def transformers_folder(
    config: Config,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Tensor],
    families: Mapping[str, Family] = FAMILIES,
) -> tuple[Tensors, dict[str, bytes]]:
    """Tensors and config.json of the family that this model is; tensors are named as a Learner's.

    Raises UserError when it is none of them.
    """
    model = config.model
    family = family_of(model, tensors, tokenizer.roles(), families)
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
    activation = family.head_activation(model)
    transformed = any(name.endswith(TRANSFORMED) for name in tensors)
    if transformed and model.head_activation != activation:
        raise UserError(
            f"no model of transformers computes this one exactly: {family.name} is nearest, but "
            f"its head has {activation} there and model.head_activation is "
            f"{model.head_activation}; export it with --format nanolm"
        )
    known = {rule.ours for rule in family.table.rules(model)}
    if SEGMENTS in known and SEGMENTS not in tensors:
        # BERT always adds the first of its segments: nothing.
        tensors = {**tensors, SEGMENTS: torch.zeros(1, model.embedded_width)}
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
    model: ModelConfig,
    tensors: Mapping[str, Tensor] = {},
    roles: Mapping[str, int] = {},
    families: Mapping[str, Family] = FAMILIES,
) -> Family:
    """The family of a model with these tensors and roles of its tokenizer; raises UserError naming
    what keeps the nearest from fitting."""
    misfits = {
        name: family.why_not(model) + heads_and_padding(family, tensors, roles)
        for name, family in families.items()
    }
    return families[nearest(misfits)[0]]


def families_that_fit(
    model: ModelConfig, roles: Mapping[str, int], families: Mapping[str, Family]
) -> list[str]:
    """The families that compute a model's trunk, whatever its heads; raises UserError naming what
    keeps the nearest from fitting."""
    return nearest(
        {
            name: family.why_not(model) + heads_and_padding(family, {}, roles)
            for name, family in families.items()
        }
    )


def nearest(misfits: Mapping[str, list[str]]) -> list[str]:
    """The families without misfits; raises UserError with those of the nearest where all have."""
    fewest = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[fewest]:
        raise UserError(
            f"no model of transformers computes this one exactly: {fewest} is nearest, but "
            f"{'; '.join(misfits[fewest])}; export it with --format nanolm"
        )
    return [name for name, found in misfits.items() if not found]


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
