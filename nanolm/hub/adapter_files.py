"""`peft`'s files of a LoRA adapter, read and written.

adapter_config.json        method, rank, scale, and which modules are changed
adapter_model.safetensors  base_model.model.MODULE.lora_A.weight, .lora_B.weight,
                           .lora_magnitude_vector; weights of heads that were trained whole
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nanolm.errors import UserError, require
from nanolm.hub.adapters import Change, suffixes
from nanolm.hub.configs import LARGEST
from nanolm.hub.folder import read_object, read_safetensors
from nanolm.hub.keys import Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LETTERS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save"),
}
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type"),
    *("target_modules", "exclude_modules", "fan_in_fan_out", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "peft_version", "ensure_weight_tying"),
    "qalora_group_size",  # of use_qalora alone, which is refused
}
"""Keys that the weights' own names and shapes say again, or that change nothing of the function."""
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mora")
"""Ways to begin that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) change it."""


def written(
    changes: Mapping[str, Change],
    heads: Tensors,
    modules: Iterable[str],
    *,
    dropout: float,
    task_type: str | None,
    transposed: bool,
) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, adapter_config.json) of changes by module; `heads` are weights of whole heads, and
    `modules` all that the base has."""
    modules = list(modules)
    ranks = {module: len(change.a) for module, change in changes.items()}
    scale = next(iter(changes.values())).scale
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = sorted({other for other in ranks.values() if other != rank})
    pattern = {
        re.escape(end): other
        for other in others
        for end in suffixes([m for m in ranks if ranks[m] == other], modules)
    }
    saved = sorted({name.split(".")[0] for name in map(without_trunk, heads)})
    facts = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": plain(scale * rank),
        "lora_dropout": dropout,
        "target_modules": suffixes(changes, modules),
        "rank_pattern": pattern,
        "alpha_pattern": {end: plain(scale * other) for end, other in pattern.items()},
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": any(change.magnitude is not None for change in changes.values()),
        "use_rslora": False,
        "modules_to_save": saved or None,
    }
    tensors = {
        f"{PREFIX}{module}.{LETTERS[letter]}": tensor.detach().clone().contiguous()
        for module, change in changes.items()
        for letter, tensor in change.tensors().items()
    }
    named = {f"{PREFIX}{name}": t.detach().clone().contiguous() for name, t in heads.items()}
    return tensors | named, facts


def without_trunk(name: str) -> str:
    """A head's key without the name of the trunk that some stand below."""
    head, _, rest = name.partition(".")
    return rest if head in ("bert", "roberta", "distilbert") else name


def plain(number: float) -> float | int:
    """A whole number as one."""
    return int(number) if number == int(number) else number


def config_bytes(facts: Mapping[str, Any]) -> bytes:
    """adapter_config.json."""
    return json.dumps(facts, indent=2).encode() + b"\n"


def read_adapter(folder: pathlib.Path) -> tuple[dict[str, Change], dict[str, Any]]:
    """(changes by module, adapter_config.json) of an adapter's folder.

    Raises UserError for anything of it that nanolm would compute differently.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    facts = read_object(path)
    require_known(path, facts)
    require(
        weights.is_file(),
        f"{folder} has no {WEIGHTS}; write it anew with peft: save_pretrained(FOLDER)",
    )
    pieces: dict[str, Tensors] = {}
    for key, tensor in read_safetensors(weights).items():
        module, letter = module_of(key, weights)
        pieces.setdefault(module, {})[letter] = tensor.float()
    require(bool(pieces), f"{weights} holds no tensor; fetch it again")
    wanted = {"a", "b", "magnitude"} if facts.get("use_dora") else {"a", "b"}
    changes = {}
    for module, named in pieces.items():
        odd = sorted(wanted ^ named.keys())
        if odd:
            verb = "lacks" if odd[0] in wanted else "holds"
            raise UserError(
                f"{weights} {verb} {module}.{LETTERS[odd[0]]}, which does not go with {CONFIG} "
                f"beside it; fetch both again"
            )
        a, b = named["a"], named["b"]
        require(
            a.ndim == b.ndim == 2 and len(a) == b.shape[1],
            f"{weights} holds an A and a B of {module} of different ranks; fetch it again",
        )
        magnitude = named.get("magnitude")
        magnitude = None if magnitude is None else magnitude.flatten()
        changes[module] = Change(a, b, scale_of(path, facts, module, len(a)), magnitude)
    return changes, facts


def require_known(path: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Raises UserError for a method, or an option of it, that nanolm does not have."""
    kind = facts.get("peft_type")
    require(
        kind == "LORA",
        f"{path} gives peft_type {kind!r}, and nanolm reads 'LORA' (with use_rslora and use_dora); "
        f"merge it into its base with peft (merge_and_unload) and import that model",
    )
    odd = {key: value for key, value in facts.items() if value and key not in READ | HARMLESS}
    odd |= {key: facts[key] for key in ("bias",) if facts.get(key, "none") != "none"}
    odd |= {key: facts[key] for key in ("modules_to_save",) if facts.get(key)}
    if facts.get("init_lora_weights", True) not in STARTS:
        odd["init_lora_weights"] = facts["init_lora_weights"]
    for key, value in odd.items():
        raise UserError(
            f"{path} sets {key} to {value!r}, which nanolm's LoRA does not have; merge the adapter "
            f"into its base with peft (merge_and_unload) and import that model"
        )


def module_of(key: str, weights: pathlib.Path) -> tuple[str, str]:
    """(module, letter) of a stored key."""
    for letter, end in LETTERS.items():
        for tail in (f".{end}", f".{end}.weight"):  # a magnitude may have that too
            if key.endswith(tail):
                return key.removeprefix(PREFIX).removesuffix(tail), letter
    raise UserError(
        f"{weights} holds {key}, which is no low-rank change of a Linear; nanolm reads adapters "
        f"that hold lora_A, lora_B and lora_magnitude_vector alone"
    )


def scale_of(path: pathlib.Path, facts: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by: alpha / r, or of rank-stabilised LoRA alpha / sqrt(r)
    (Kalajdzievski 2023)."""
    told = by_pattern(path, facts, "rank_pattern", module, facts.get("r"))
    require(
        told == rank,
        f"{path} gives {module} the rank {told!r}, and its A has {rank} rows; fetch both files "
        f"again",
    )
    alpha = by_pattern(path, facts, "alpha_pattern", module, facts.get("lora_alpha", 8))
    good = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    good = good and 0 < alpha <= LARGEST
    require(good, f"{path} gives lora_alpha as {alpha!r}; it must be a number above 0")
    return float(alpha) / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def dropout_of(path: pathlib.Path, facts: Mapping[str, Any]) -> float:
    """The dropout that the adapter was trained with."""
    rate = facts.get("lora_dropout") or 0.0
    good = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate < 1
    require(good, f"{path} gives lora_dropout as {rate!r}; it must be a number from 0 to below 1")
    return float(rate)


def by_pattern(
    path: pathlib.Path, facts: Mapping[str, Any], key: str, module: str, otherwise: Any
) -> Any:
    """The value of the first pattern that is the end of the module's name, as peft reads them."""
    patterns = facts.get(key) or {}
    require(isinstance(patterns, dict), f"{path} gives {key} as {patterns!r}; it must be an object")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise UserError(f"{path} has the {key} {pattern!r}, no pattern ({error})") from error
        if found:
            return value
    return otherwise
