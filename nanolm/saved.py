"""Opening what a run has saved: config, tokenizer and weights, ready for use.

A checkpoint carries all three, so every command that uses a model needs nothing but its folder.
Plug-ins that the saved config names are imported only when the user names them too: opening a
stranger's checkpoint runs no code of the stranger's choice.
"""

from __future__ import annotations

import dataclasses
import pathlib

import torch

from nanolm import build
from nanolm.checkpoint.checkpoints import load_weights, locate
from nanolm.config import strict_yaml
from nanolm.config.load import import_plugins, load_config
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.errors import UserError, require
from nanolm.learner import Learner
from nanolm.ops.contract import Phase
from nanolm.peft.files import open_adapter
from nanolm.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model as it was saved."""

    folder: pathlib.Path
    config: Config
    tokenizer: Tokenizer
    learner: Learner
    part: str | None = None  # the task, where it was taken out of a run of several
    whole: Config | None = None  # and that run's config


def read_config(folder: pathlib.Path, plugins: list[str] | None = None) -> Config:
    """The resolved config of a checkpoint; raises UserError for plug-ins the user did not name."""
    mapping = strict_yaml.read_mapping(folder / "config.yaml")
    named = mapping.pop("plugins", None) or []
    unnamed = [name for name in named if name not in (plugins or [])]
    if unnamed:
        raise UserError(
            f"checkpoint {folder} was trained with the plug-ins {', '.join(unnamed)}; if you trust "
            f"them, name them: --plugins '[{','.join(unnamed)}]'"
        )
    import_plugins(plugins or [])
    return load_config([], schema=schema_of(mapping), base=mapping)


def schema_of(mapping: dict) -> type[Config]:
    """The schema of a saved config: tasks were fine-tuned, everything else pretrained."""
    name = (mapping.get("objective") or {}).get("name", "clm")
    return getattr(OBJECTIVES.get(name).build, "schema", Config)


def check_device(name: str) -> None:
    """Raises UserError for a device that torch does not know or does not find here."""
    known = name == "cpu" or name.partition(":")[0] == "cuda"
    require(known, f"device={name} is no device; choose cpu or cuda")
    try:
        index = torch.device(name).index or 0
    except RuntimeError:
        index = -1
    require(
        name == "cpu" or 0 <= index < torch.cuda.device_count(),
        f"device={name} is not here: torch sees {torch.cuda.device_count()} CUDA devices; choose "
        f"cpu" + (", or cuda" if torch.cuda.is_available() else ""),
    )


def open_saved(
    path: str | pathlib.Path,
    *,
    phase: Phase = "prefill",
    device: str = "cpu",
    plugins: list[str] | None = None,
    ema: bool = True,
) -> Saved:
    """The model in a run's folder (its newest good checkpoint; of a fine-tuning run the one that
    did best on val) or in a checkpoint's folder.

    In eval mode, on the device, in float32. Raises UserError when there is none or it is damaged.
    """
    check_device(device)
    folder = locate(path)
    config = read_config(folder, plugins)
    if config.opens_best:
        folder = locate(path, best=True)
    tokenizer = Tokenizer.load(folder)
    objective = build.build_objective(config, tokenizer)
    learner = build.build_learner(config, objective, torch.device(device), phase)
    if config.peft.name == "none":
        load_weights(folder, learner, ema=ema)
    else:
        open_adapter(folder, learner, ema=ema)
    return Saved(folder, config, tokenizer, learner.eval())
