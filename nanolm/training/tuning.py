"""Which weights of a pretrained model are fine-tuned, when, and how fast (config group `tune`).

    freeze      all | heads | the last N blocks | weights named by patterns      before wrapping
    learning rate of a weight at depth d = peak * decay^(top - d)                layer-wise decay
    gradual     one more block from the top every so many steps                  a gradient rule

Depth counts from the embeddings (0) over the blocks (1 .. n) to final norm and heads (n + 1, the
top). Weights that are frozen for the whole run need no gradient, so DDP knows nothing of them;
those that wait for their turn in gradual unfreezing have one, which is dropped at the step's end.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from nanolm.config.schema import Config, TuneConfig
from nanolm.errors import require
from nanolm.registry import Options
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import Backward, GradientRule, build_rule
from nanolm.training.optim import build_optimizers

_BLOCK = re.compile(r"trunk\.(?:(encoder)_stack\.|stack\.)?blocks\.(\d+)\.")


def depths(names: Iterable[str]) -> dict[str, int]:
    """{parameter name: depth}; a head that is tied to the embedding has its depth, 0.

    A decoder that reads an encoder stands above it: its first block is one deeper than the
    encoder's last, whose norm has that block's depth.
    """
    names = list(names)
    matches = {name: match for name in names if (match := _BLOCK.match(name))}
    encoder = max((int(match[2]) + 1 for match in matches.values() if match[1]), default=0)
    block = {
        name: int(match[2]) + 1 + (0 if match[1] else encoder) for name, match in matches.items()
    }
    top = max(block.values(), default=0) + 1
    outside = {"heads.": top, "trunk.stack.final_norm": top, "trunk.encoder_stack.": encoder}

    def depth(name: str) -> int:
        around = (outside[begin] for begin in outside if name.startswith(begin))
        return block.get(name, next(around, 0))

    return {name: depth(name) for name in names}


def freeze(learner: nn.Module, tune: TuneConfig) -> None:
    """Takes the gradient from every parameter that `tune` does not train.

    Raises UserError when a pattern matches nothing, or nothing is left to train.
    """
    if tune.what == "all":
        return
    require(
        getattr(learner, "adapter", None) is None,
        f"tune.what={tune.what} cannot go with peft, which says itself what is trained",
    )
    named = dict(learner.named_parameters())
    depth = depths(named)
    top = max(depth.values())
    if tune.what == "named":
        chosen = matching(list(named), tune.patterns) | {n for n in named if n.startswith("heads.")}
    else:
        bottom = top - (tune.n_layers if tune.what == "last" else 0)
        chosen = {name for name in named if depth[name] >= bottom}
    if tune.what == "heads":
        chosen = {name for name in chosen if name.startswith("heads.")}
    require(
        len(chosen) > 0,
        f"tune.what={tune.what} leaves nothing to train: the heads have no weights of their own",
    )
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Names that match a shell pattern; raises UserError for a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        require(
            len(hits) > 0,
            f"tune.patterns: {pattern} matches no parameter; names look like {names[0]} and "
            f"{names[-1]}",
        )
        found.update(hits)
    return found


def tuned_optimizers(learner: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """The run's optimizers, learning rates by depth, watched by the adapter if there is one."""
    optimizers = build_optimizers(learner, config.optim)
    if config.tune.layer_decay != 1.0:
        scale_by_depth(optimizers, learner, config.tune.layer_decay)
    adapter = getattr(learner, "adapter", None)
    if adapter is not None:
        adapter.watch(optimizers, config.train.steps)
    return optimizers


def scale_by_depth(
    optimizers: Sequence[torch.optim.Optimizer], learner: nn.Module, decay: float
) -> None:
    """Splits every parameter group by depth; its peak learning rate falls by `decay` a level.

    (Clark et al. 2020, appendix B; Howard & Ruder 2018, section 3.2, divide by 2.6.) The top comes
    first, so the learning rate that the log shows is the undiminished one.
    """
    depth = depths(name for name, _ in learner.named_parameters())
    top = max(depth.values())
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:
            pairs = list(zip(group["names"], group["params"], strict=True))
            for level in sorted({depth[name] for name, _ in pairs}, reverse=True):
                part = [(name, p) for name, p in pairs if depth[name] == level]
                peak = group["peak_lr"] * decay ** (top - level)
                groups.append(
                    {
                        **group,
                        "params": [p for _, p in part],
                        "names": [name for name, _ in part],
                        "lr": peak,
                        "peak_lr": peak,
                    }
                )
        groups.sort(key=lambda group: -group["peak_lr"])
        optimizer.param_groups[:] = groups


def step_rule(learner: nn.Module, config: Config) -> GradientRule:
    """The run's gradient rule, inside gradual unfreezing when that is on.

    Raises UserError for an adversarial rule on a trunk that embeds two texts in one pass.
    """
    require_one_text(config)
    rule = build_rule(config.train.rule)
    every = config.tune.unfreeze_every
    return gradually(rule, learner, every) if every else rule


def require_one_text(config: Config) -> None:
    """A perturbation of the embeddings is that of one text."""
    options: Options | None = config.train.rule
    while options is not None:
        require(
            config.model.trunk != "encoder_decoder" or not getattr(options, "perturbs", False),
            f"train.rule={options.name} perturbs the embeddings of one text, and "
            f"model.trunk=encoder_decoder embeds two, source and target; set train.rule.name to "
            f"rdrop or plain",
        )
        options = getattr(options, "inner", None)


def gradually(inner: GradientRule, learner: nn.Module, every: int) -> GradientRule:
    """Gradual unfreezing (Howard & Ruder 2018, section 3.3): heads first, then one more block from
    the top every so many steps, the embeddings last.

    What waits loses its gradient after the step's passes, so optimizers pass it over; and DDP,
    which must know its parameters from the start, sees all of them used in every step.
    """
    depth = depths(name for name, _ in learner.named_parameters())
    top = max(depth.values())

    def rule(engine: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        inner(engine, micro_batches, backward)
        lowest = top - backward.step // every
        for name, parameter in engine.learner.named_parameters():
            if depth[name] < lowest:
                parameter.grad = None

    return rule
