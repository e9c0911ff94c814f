"""Engine: the learner as a step calls it, on its device, in its precision, joined to other ranks.

    batch of tensors -> device -> autocast -> (DDP) -> Learner.forward -> terms

The learner itself is never replaced: it is wrapped from outside and compiled in place, so names in
checkpoints carry no `module.` or `_orig_mod.`. Gradient rules and evaluation both call an Engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanolm.config.schema import Config
from nanolm.distributed.sharding import shard, sharded_modules
from nanolm.distributed.world import World, synchronised, wrap
from nanolm.learner import Learner
from nanolm.objectives.base import ForwardObjective
from nanolm.training.batch import MicroBatch
from nanolm.training.phases import Progress

Initialise = Callable[[str, Tensor], None]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS = 64
"""Graphs that torch may compile of one piece of code before it gives up and runs it as it is."""


class RuleEngine(Protocol):
    """An engine as a gradient rule sees it: `Engine`, or one in which an outer rule has changed
    something (`Wrapped` in rules/base.py)."""

    @property
    def learner(self) -> Learner:
        """What is trained."""

    @property
    def world(self) -> World:
        """The ranks that train it."""

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the weights."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of autocast products, None in fp32."""

    @property
    def progress(self) -> Progress:
        """What the rank is doing, for the log and the watchdog."""

    def __call__(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """See `Engine`."""

    def local(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """See `Engine`."""

    def move(self, batch: MicroBatch) -> dict[str, Tensor]:
        """See `Engine`."""

    def synchronised(self, when: bool) -> contextlib.AbstractContextManager[None]:
        """See `Engine`."""

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """See `Engine`."""


class Engine:
    """Calls the learner on one rank's batches; `engine(batch)` returns its terms.

    With trains=False the learner is not joined to other ranks: only `local` is meant to be used.
    `initialise(name, parameter)` draws weights that are on the meta device, where a learner is
    sharded that no rank could hold whole.
    """

    def __init__(
        self,
        learner: Learner,
        world: World,
        config: Config,
        *,
        trains: bool = True,
        initialise: Initialise | None = None,
    ) -> None:
        self.sharded = trains and world.joined and config.distributed.strategy != "ddp"
        self.learner = learner if self.sharded else learner.to(world.device)
        self.world = world
        self.passes: int | None = None
        self.progress = Progress(world.device)
        self.dtype = AUTOCAST.get(config.train.precision)
        if config.train.compile:
            compile_blocks(learner.trunk.blocks)
        self.module: nn.Module = self.learner
        if self.sharded:
            self.module = shard(self.learner, world, config, initialise)
        elif trains:
            self.module = wrap(self.learner, world, config.distributed, self._last_bucket)

    def __call__(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch, through the distributed wrapper.

        With an objective, what its `loss` returns instead of the terms of the learner's own.
        """
        other = () if objective is None else (objective,)
        self.progress.enter("forward")
        with self.precision():
            return self.module(self.move(batch), *other)

    def _last_bucket(self) -> None:
        self.progress.enter("communication")

    def local(self, batch: MicroBatch, objective: ForwardObjective | None = None) -> Any:
        """Terms of one micro-batch on this rank alone, for evaluation: no collective, unless the
        weights are sharded. With an objective, what its `loss` returns instead."""
        other = () if objective is None else (objective,)
        self.progress.enter("evaluation")
        with self.precision():
            terms = self.learner(self.move(batch), *other)
        if self.sharded:  # no backward pass follows that would drop the gathered weights
            for module in sharded_modules(self.learner):
                module.reshard()
        return terms

    def move(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The batch's tensors on the device; the copy overlaps when the loader pinned them."""
        device = self.world.device
        return {k: v.to(device, non_blocking=True) for k, v in batch.tensors.items()}

    def pad_passes(self, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """As many micro-batches as the rank with the most has: sharded weights are gathered in
        every pass by all. What is added stands in and counts for nothing. Collective, once."""
        if not self.sharded:
            return micro_batches
        if self.passes is None:
            self.passes = max(self.world.gather(len(micro_batches)))
        missing = self.passes - len(micro_batches)
        return [*micro_batches, *[micro_batches[0].blank()] * missing]

    def synchronised(self, when: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients cross ranks only in passes inside with `when` true: the step's last."""
        return synchronised(self.module, when)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Inside, products are computed in the run's precision."""
        if self.dtype is None:
            yield
        else:
            with torch.autocast(self.world.device.type, dtype=self.dtype):
                yield

    def warm_up_ddp(self, batch: MicroBatch, weights: Mapping[str, float]) -> None:
        """One discarded forward and backward of a zero loss, before the first step of a start.

        DDP orders its gradient buckets anew after its first backward, and with three ranks or more
        gloo's sums depend on that order; so the first step after a restart would differ from the
        same step of an undisturbed run. After this pass every step sees the final order.
        """
        if not self.world.joined:
            return
        terms = self(batch)
        (sum(terms[name].sum for name in weights if name in terms) * 0.0).backward()
        self.learner.zero_grad(set_to_none=True)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block in place, when it is first called.

    All blocks are one piece of code to torch, so blocks that compute the same share a graph. A kind
    of block (ModernBERT has three) has a graph for training and one for evaluation, each again for
    another number of rows, another length and padded rows: more than the eight that torch allows.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile()
