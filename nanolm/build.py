"""From a config's names to objects: the one place where registries are asked.

`train.py`, `finetune` and the commands that use a model all come through here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.data.stream import RowStream
from nanolm.data.tokenizer import Tokenizer
from nanolm.data.tokenizer_warning import load_with_warning
from nanolm.errors import require
from nanolm.learner import Learner
from nanolm.model.initial_weights import init_parameter, init_weights
from nanolm.model.trunk import Trunk
from nanolm.objectives.base import Objective
from nanolm.ops.chooser import Chooser
from nanolm.ops.contract import Kernels, Phase
from nanolm.ops.kept import Record
from nanolm.ops.timings import read_timings
from nanolm.registry import HEADS, OBJECTIVES, POSITIONS, TRUNKS

C = TypeVar("C", bound=Config)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the first corpus (the stream checks that all corpora share it)."""
    return load_with_warning(config.data.mixture[0][0])


def resolve(config: C, tokenizer: Tokenizer) -> C:
    """The config with everything that depends on the data filled in, ready to be saved.

    Raises UserError when the vocabulary, the row length or the trunk cannot serve.
    """
    model = config.model
    known = tokenizer.vocab_size
    size = -(-known // 64) * 64 if model.vocab_size is None else model.vocab_size
    require(
        size >= known,
        f"model.vocab_size={size} is smaller than the tokenizer's {known}; set it to null",
    )
    require(
        config.data.row_length <= model.max_length,
        f"data.row_length={config.data.row_length} exceeds model.max_length={model.max_length}",
    )
    TRUNKS.get(model.trunk)
    trunks = OBJECTIVES.get(config.objective.name).build.trunks
    require(
        model.trunk in trunks,
        f"objective={config.objective.name} trains {' or '.join(trunks)} trunks, but "
        f"model.trunk={model.trunk}",
    )
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=size))


def build_objective(config: Config, tokenizer: Tokenizer) -> Objective:
    """The objective that the config names."""
    build = OBJECTIVES.get(config.objective.name).builder(config.model.trunk)
    return build(config.objective, config, tokenizer)


def build_stream(config: Config, objective: Objective, split: str) -> RowStream:
    """The rows of a split ("train", "val", "test") as this objective cuts them."""
    return RowStream(
        config.data.mixture,
        split,
        stride=objective.stride,
        span=objective.span,
        seed=config.run.seed,
        partial=split != "train",
        cache=config.data.cache,
        cut=config.data.rows,
    )


def build_chooser(config: Config, kept: Sequence[Record] = (), phase: Phase = "train") -> Chooser:
    """What chooses this run's kernels; `kept` are those of the checkpoint that it goes on from.

    Raises UserError when kernels.timings names no file of timings.
    """
    source = config.kernels.timings if phase == "train" else None
    return Chooser(kept, read_timings(source) if source else (), source)


def build_kernels(
    config: Config,
    device: torch.device | str,
    phase: Phase = "train",
    chooser: Chooser | None = None,
) -> Kernels:
    """The kernels of a model with this run's precision and device, to be chosen while it is
    built."""
    requested = dataclasses.asdict(config.kernels)
    del requested["timings"]
    chooser = chooser or build_chooser(config, phase=phase)
    return Kernels(
        requested,
        decide=chooser.choose,
        dtype=DTYPES[config.train.precision],
        device=torch.device(device).type,
        phase=phase,
    )


def build_trunk(model: ModelConfig, kernels: Kernels, masks: frozenset[str]) -> Trunk:
    """The trunk that the config names, with uninitialised weights."""
    return TRUNKS.get(model.trunk).build(model, kernels, masks)


def initialiser(config: Config) -> Callable[[str, Tensor], None]:
    """What draws one weight of the config's model, by name: for weights on the meta device."""
    return functools.partial(init_parameter, model=config.model)


def build_learner(
    config: Config,
    objective: Objective,
    device: torch.device | str = "cpu",
    phase: Phase = "train",
    *,
    meta: bool = False,
    chooser: Chooser | None = None,
) -> Learner:
    """Trunk, heads and objective with initial weights from run.seed, on the device.

    `config` must be resolved (see `resolve`). The weights are drawn on the CPU, so they are the
    same on every device. `chooser` chooses the kernels (see `build_chooser`). With `meta` the
    parameters have shapes only; `sharding.shard` draws them.
    """
    kernels = build_kernels(config, device, phase, chooser)
    where = torch.device("meta") if meta else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), where:
        trunk = build_trunk(config.model, kernels, objective.masks)
        heads = nn.ModuleDict(
            {
                name: HEADS.get(request.kind).build(config.model, kernels, trunk, **request.options)
                for name, request in objective.heads.items()
            }
        )
        if hasattr(objective, "arrange_for"):
            objective.arrange_for(kernels)
        learner = Learner(trunk, heads, objective)
        torch.manual_seed(config.run.seed)
        init_weights(learner, config.model)
    for stack in trunk.stacks:
        stack.recompute = config.train.activation_checkpointing
    if meta:  # buffers follow from the config and are small: positions again, for real
        entry = POSITIONS.get(config.model.positions.name)
        real = entry.build(config.model.positions, config.model, kernels)
        for name, buffer in real.named_buffers():
            for positions in trunk.position_encodings:
                positions.register_buffer(name, buffer, persistent=False)
        return learner
    return learner.to(device)
