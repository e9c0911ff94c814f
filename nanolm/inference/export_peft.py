"""A LoRA or DoRA run as an adapter that `peft` opens on the base that was exported.

nanolm export BASE --out base --format transformers
nanolm export RUN --out adapter --format peft
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
"""

from __future__ import annotations

import importlib.util
import pathlib
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from nanolm.checkpoint.container import write_folder
from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require
from nanolm.hub.adapter_files import CONFIG, WEIGHTS, config_bytes, written
from nanolm.hub.adapters import to_theirs
from nanolm.hub.families import Family
from nanolm.hub.importing import proved
from nanolm.hub.keys import Tensors
from nanolm.hub.proof import can_prove, their_model
from nanolm.inference.export_transformers import as_published, family_of, transformers_folder
from nanolm.learner import Learner
from nanolm.saved import Saved

Note = Callable[[str], None]
PART = WEIGHTS.removesuffix(".safetensors")
METHODS = ("lora", "dora")
TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}


def adapter_folder(
    saved: Saved, note: Note = print
) -> tuple[Tensors, dict[str, bytes], dict[str, Any]]:
    """(tensors, files, figures of the proof) of a pretraining run's adapter.

    Raises UserError when it has none that peft has, or peft computes something else.
    """
    adapter = require_low_rank(saved)
    require(
        not adapter.heads,
        f"{saved.folder} trained its head {', '.join(adapter.heads)} whole, and --format peft "
        f"writes low-rank changes of the base; make one model of both: `nanolm merge "
        f"{shlex.quote(str(saved.folder))} --out FOLDER`",
    )
    base = base_tensors(saved.learner)
    model = saved.config.model
    family = family_of(model, base, saved.tokenizer.roles())
    tensors, facts = in_theirs(saved, family, base, {}, TASK_TYPES.get(model.trunk))
    files = {CONFIG: config_bytes(facts)}
    figures: dict[str, Any] = {"largest_difference": None, "greedy_tokens": None}
    if can_prove_adapter(note):
        named, published = transformers_folder(saved.config, saved.tokenizer, base)
        imported = as_published(saved.config, saved.tokenizer, saved.learner, named, published)
        theirs = with_adapter(their_model(imported), tensors, files)
        proof = proved(imported, f"the adapter of {saved.folder}", note, theirs)
        if proof is not None:
            figures = {"largest_difference": proof.largest, "greedy_tokens": proof.greedy}
    return tensors, files, figures


def require_low_rank(saved: Saved) -> Any:
    """The run's adapter; raises UserError when it is none of peft's LoRA."""
    adapter, name = saved.learner.adapter, saved.config.peft.name
    require(
        adapter is not None,
        f"{saved.folder} has no adapter (peft is none); export the model with --format "
        f"transformers",
    )
    require(
        name in METHODS,
        f"{saved.folder} has an adapter of the method {name}, and --format peft writes "
        f"{' and '.join(METHODS)}; where its method can, make one model of it and its base: "
        f"`nanolm merge {shlex.quote(str(saved.folder))} --out FOLDER`",
    )
    return adapter


def base_tensors(learner: Learner) -> Tensors:
    """The frozen weights of a learner with an adapter, by name."""
    own = set() if learner.adapter is None else set(learner.adapter.names)
    return {name: tensor.detach() for name, tensor in learner.named_parameters() if name not in own}


def in_theirs(
    saved: Saved, family: Family, base: Tensors, heads: Tensors, task_type: str | None
) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, adapter_config.json) of a run's adapter; `heads` are published weights of heads."""
    options: Any = saved.config.peft
    own = {name: t for name, t in named_tensors(saved.learner).items() if name not in base}
    scale = options.alpha / options.rank
    changes = to_theirs(family, saved.config.model, own, scale, base)
    return written(
        changes,
        heads,
        modules_of(family, saved.config.model),
        dropout=options.dropout,
        task_type=task_type,
        transposed=any(rule.transposed for rule in family.table.layers),
    )


def named_tensors(learner: Learner) -> Mapping[str, Tensor]:
    """The adapter's tensors by name."""
    if learner.adapter is None:
        raise UserError("there is no adapter to export")
    return learner.adapter.tensors(learner)


def modules_of(family: Family, model: ModelConfig) -> Iterable[str]:
    """Every module of a family's model that has a weight."""
    for rule in family.table.rules(model):
        yield from (name.rpartition(".")[0] for name in rule.theirs)


def can_prove_adapter(note: Note) -> bool:
    """Whether transformers and peft are there; told where one is missing."""
    if can_prove() and importlib.util.find_spec("peft") is not None:
        return True
    note("the proof was left out: transformers or peft is not installed")
    return False


def with_adapter(theirs: Any, tensors: Tensors, files: Mapping[str, bytes]) -> Any:
    """transformers' model with the adapter on it, opened by peft from a folder as it is written."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "adapter"
        write_folder(folder, {PART: tensors}, files)
        return opened_by_peft(theirs, folder)


def opened_by_peft(theirs: Any, folder: pathlib.Path) -> Any:
    """transformers' model with a folder's adapter on it; raises UserError where peft refuses."""
    from peft import PeftModel  # noqa: PLC0415  (slow to import, and not always installed)

    try:
        PeftModel.from_pretrained(theirs, folder)  # it changes the model in place
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"peft refuses the adapter {folder} ({said}); nothing is written") from (
            error
        )
    return theirs.eval()
