"""A published model as one of ours: config, tokenizer and tensors under our names.

Strict: a key that is unknown, missing, extra or of another shape is refused by name, and a head
that the file lacks is announced. What old files do is understood (`known_keys`): norms called gamma
and beta, a prefix that is left out or doubled, buffers stored beside weights, a tied weight twice.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanolm import build
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.load import load_config
from nanolm.config.schema import Config
from nanolm.data.json_pieces import JSON_FILE
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES, Family
from nanolm.hub.folder import NeedsFlagError, read_object, read_tokenizer, read_weights
from nanolm.hub.heads import with_task
from nanolm.hub.keys import Tensors
from nanolm.learner import Learner
from nanolm.registry import OBJECTIVES

OLD_NAMES = (("gamma", "weight"), ("beta", "bias"))
WRAPPERS = ("module.", *dict.fromkeys(f.prefix for f in FAMILIES.values() if f.prefix))
ROW_LENGTH = 512
"""Tokens per row that evaluation uses unless told otherwise; shorter where the model is."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """A published model under our names."""

    family: Family
    config: Config
    tokenizer: Tokenizer
    learner: Learner
    theirs: Tensors
    """The file's own tensors, in float32, under the family's keys, each once."""
    published: Published
    fresh: tuple[str, ...]
    """Heads' weights that the file lacks, which hold initial values."""
    left_out: tuple[str, ...] = ()
    """The file's weights that no head of ours reads."""


def read_published(
    folder: pathlib.Path, *, family: str | None = None, pickled: bool = False
) -> Imported:
    """Reads and checks a published folder; raises UserError in one sentence that names the fault.

    `family` is for a config.json without model_type.
    """
    path = folder / "config.json"
    values = read_object(path)
    chosen = family_of(path, values.get("model_type"), family)
    published = Published(str(path), values, chosen.name)
    keys = model_keys(chosen, published)
    tokenizer = read_tokenizer(folder)
    require(
        tokenizer.vocab_size <= keys["vocab_size"],
        f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces and {path} gives "
        f"vocab_size {keys['vocab_size']}; fetch the tokenizer of this model",
    )
    stored = read_weights(folder, pickled=pickled)
    chosen = with_task(chosen, published, stored, row_length(keys))
    require(
        tokenizer.file_name == JSON_FILE or not framed_by_file(chosen.objective(frozenset())),
        f"{folder} holds no {JSON_FILE}, which says what its head reads around a text; let "
        f"transformers write it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )
    imported = assembled(chosen, published, keys, stored, tokenizer, str(folder))
    require_last_token(imported)
    return imported


def framed_by_file(objective: Mapping[str, Any]) -> bool:
    """Whether a task reads its texts in the frame of the tokenizer's own file."""
    return objective.get("frame") == "tokenizer"


def require_last_token(imported: Imported) -> None:
    """Raises UserError where transformers does not decide by the last token of a text: it leaves
    out what has the id of padding, be it the end of every text."""
    if getattr(imported.config.objective, "frame", "trunk") != "tokenizer":
        return
    ends, pad = imported.tokenizer.around(1)[-1], imported.published.get("pad_token_id", None)
    require(
        not hasattr(imported.config.objective, "pooling") or pad is None or ends[-1:] != [pad],
        f"{imported.published.path} gives pad_token_id as {pad}, which {imported.tokenizer.path} "
        f"also puts behind every text, so transformers decides by the token before it and nanolm "
        f"cannot; choose a checkpoint that has a padding of its own",
    )


def assembled(
    chosen: Family,
    published: Published,
    keys: dict[str, Any],
    stored: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    what: str,
) -> Imported:
    """A model with `keys` of our config, filled from the stored tensors; `what` names them.

    Raises UserError for keys and shapes that do not fit.
    """
    names = frozenset(short for key in stored for short in spellings(key, chosen.prefix))
    try:
        config = as_config(chosen, keys, names, tokenizer)
        objective = build.build_objective(config, tokenizer)
        learner = build.build_learner(config, objective, phase="prefill")
    except UserError as error:  # names our own keys, which stand in no file of the user's
        raise UserError(
            f"the values of {published.path} make no model: {error}; fetch the file of these "
            f"weights"
        ) from error
    require(
        config.objective.name != "mlm_pair" or config.model.n_segments > 1,
        f"{what} has a pooler and type_vocab_size {config.model.n_segments}; nanolm "
        f"reads pairs only with 2 or more",
    )
    live = learner_tensors(learner)
    wanted = chosen.table.to_theirs(live, config.model)
    left_out = tuple(key for key in stored if matches(key, chosen.unread, chosen.prefix))
    read = {key: tensor for key, tensor in stored.items() if key not in left_out}
    theirs = known_keys(chosen, read, wanted, what, tied=config.model.tied)
    fresh = fresh_heads(chosen, wanted, theirs, what)
    ours = chosen.table.to_ours(theirs, config.model)
    with torch.no_grad():
        for name, tensor in ours.items():
            live[name].copy_(tensor)
    return Imported(chosen, config, tokenizer, learner.eval(), theirs, published, fresh, left_out)


def model_keys(family: Family, published: Published) -> dict[str, Any]:
    """The keys of our model that a config.json describes."""
    keys = family.to_model(published) | {
        "vocab_size": published.size("vocab_size"),
        "tied": bool(published.get("tie_word_embeddings", family.tied)),
    }
    if family.acts_alike:
        keys["head_activation"] = keys["feed_forward"]
    return keys


def row_length(keys: Mapping[str, Any]) -> int:
    """Tokens per row of a model with these keys."""
    return min(ROW_LENGTH, keys["max_length"])


def family_of(path: pathlib.Path, found: object, named: str | None) -> Family:
    """The family that config.json or the user names; raises UserError for another one."""
    known = ", ".join(FAMILIES)
    if found is None and named is None:
        raise NeedsFlagError(
            f"{path} has no model_type; say what it is with --family ({known})", "--family NAME"
        )
    require(
        found is None or named is None or found == named,
        f"{path} says model_type {found!r} and --family says {named!r}; leave --family out",
    )
    name = named if found is None else found
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{path} is of the family {name!r}; nanolm imports {known}")
    return FAMILIES[name]


def as_config(family: Family, keys: dict, names: frozenset[str], tokenizer: Tokenizer) -> Config:
    """The run's config that a checkpoint of this model has."""
    objective = family.objective(names)
    schema = getattr(OBJECTIVES.get(objective["name"]).build, "schema", Config)
    base = {
        "model": keys,
        "objective": objective,
        "data": {"row_length": row_length(keys)},
    }
    return build.resolve(load_config([], schema=schema, base=base), tokenizer)


def spellings(key: str, prefix: str) -> list[str]:
    """The keys that a stored key may stand for, the likeliest first."""
    for old, new in OLD_NAMES:
        if key.endswith(f".{old}"):
            key = key.removesuffix(old) + new
    found = [key, prefix + key]
    while wrapper := next((w for w in WRAPPERS if key.startswith(w)), None):
        key = key.removeprefix(wrapper)
        found += [key, prefix + key]
    return found


def matches(key: str, pattern: str, prefix: str) -> bool:
    """Whether a stored key may stand for one of a pattern's."""
    return any(re.fullmatch(pattern, name) for name in spellings(key, prefix))


def known_keys(
    family: Family, stored: Mapping[str, Tensor], wanted: Tensors, what: str, *, tied: bool
) -> Tensors:
    """The stored tensors under the family's keys, each once, in float32.

    Raises UserError for an unknown key, a tensor of another shape, and two that should be one.
    """
    twins = dict(family.duplicates)
    if tied:
        twins[family.projection] = family.embedding
    found: Tensors = {}
    origin: dict[str, str] = {}
    for key, tensor in stored.items():
        names = spellings(key, family.prefix)
        name = next((name for name in names if name in wanted or name in twins), None)
        if name is None:
            if matches(key, family.buffers, family.prefix):
                continue
            raise UserError(
                f"{what} holds {key} ({shape(tensor)}), which a {family.name} of its config.json "
                f"does not have; choose a checkpoint without it"
            )
        name = twins.get(name, name)
        if name not in wanted:  # the twin of a head's weight that this model does without
            continue
        require(
            tensor.shape == wanted[name].shape,
            f"{what} holds {key} as {shape(tensor)}, and by its config.json it is "
            f"{shape(wanted[name])}; fetch the config.json of these weights",
        )
        require(
            tensor.is_floating_point(),
            f"{what} holds {key} as {tensor.dtype}; nanolm reads weights that are not quantised",
        )
        tensor = tensor.float()
        require(
            bool(tensor.isfinite().all()),
            f"{what} holds {key} with numbers that are NaN or infinite; fetch the whole checkpoint",
        )
        if name in found:
            remedy = "set tie_word_embeddings to false there if both count"
            remedy = remedy if name == family.embedding else "leave one of them out of the file"
            require(
                torch.equal(found[name], tensor),
                f"{what} holds {origin[name]} and {key}, which are one weight by its config.json, "
                f"with different values; {remedy}",
            )
            continue
        found[name], origin[name] = tensor, key
    return found


def fresh_heads(family: Family, wanted: Tensors, found: Tensors, what: str) -> tuple[str, ...]:
    """Keys of heads that the file lacks as a whole; raises UserError for any other missing key."""
    missing = [key for key in wanted if key not in found]
    fresh = []
    for key in missing:
        head = next((head for head in family.heads.values() if key.startswith(head)), None)
        if head is None or any(other.startswith(head) for other in found):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{what} lacks {key} ({shape(wanted[key])}){more}, which a {family.name} of its "
                f"config.json has; fetch the whole checkpoint"
            )
        fresh.append(key)
    return tuple(fresh)


def shape(tensor: Tensor) -> str:
    """A shape in words."""
    return " x ".join(str(size) for size in tensor.shape) or "a scalar"
