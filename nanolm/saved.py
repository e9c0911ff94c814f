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
from nanolm.checkpoint.places import with_places
from nanolm.config import strict_yaml
from nanolm.config.load import import_plugins, load_config
from nanolm.config.schema import Config
from nanolm.data.tokenizer import Tokenizer
from nanolm.data.tokenizer_warning import load_with_warning
from nanolm.distributed.devices import device_type
from nanolm.errors import UserError
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
    members: int = 1  # of an ensemble
    ema: bool = True  # whether the moving average of the weights was taken where there is one


def read_config(folder: pathlib.Path, plugins: list[str] | None = None) -> Config:
    """The resolved config of a checkpoint, its relative paths as they are seen from here; raises
    UserError for plug-ins the user did not name."""
    mapping = with_places(strict_yaml.read_mapping(folder / "config.yaml"), folder)
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


def open_saved(
    path: str | pathlib.Path,
    *,
    phase: Phase = "prefill",
    device: str = "cpu",
    plugins: list[str] | None = None,
    ema: bool = True,
    base: str | None = None,
) -> Saved:
    """The model in a run's folder (its newest good checkpoint; of a fine-tuning run the one that
    did best on val) or in a checkpoint's folder.

    In eval mode, on the device (auto, cpu or cuda), in float32. Raises UserError when there is no
    model, it is damaged, or there is no such device. `base` stands for the place of an adapter's
    base that adapter.json names.
    """
    kind = device_type(device)
    folder = locate(path)
    config = read_config(folder, plugins)
    if config.opens_best:
        folder = locate(path, best=True)
    tokenizer = load_with_warning(folder)
    objective = build.build_objective(config, tokenizer)
    learner = build.build_learner(config, objective, torch.device(kind), phase)
    if config.peft.name == "none":
        load_weights(folder, learner, ema=ema)
    else:
        open_adapter(folder, learner, ema=ema, base=base)
    return Saved(folder, config, tokenizer, learner.eval(), ema=ema)
