"""Adversarial training on embeddings: FGM, PGD and FreeLB.

A perturbation d is added to the output of the token embedding, one per example (row, or document of
a packed row), and moves against the model:

    FGM     L(0) + w L(d),  d = e g / |g|                                    (Miyato et al. 2017, 3)
    PGD     L(0) + w L(d_K), d_k = P(d_{k-1} + a g / |g|), |d| <= e        (Madry et al. 2018, 2.1)
    FreeLB  1/K sum_k L(d_k), d_0 random, d_k as in PGD                    (Zhu et al. 2020, alg. 1)

g is the gradient of the loss with respect to d and |.| the norm over an example's tokens and
features, so d depends on the example alone: not on micro-batches, ranks or the loss' scale. (Madry
et al. bound the largest entry and step along sgn g; the Euclidean norm here is that of the others.)

Shapes: B rows, T tokens, D model width.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nanolm.errors import require
from nanolm.registry import RULES
from nanolm.rules.base import Muted, WrapperOptions, one_by_one
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import RuleEngine
from nanolm.training.gradient import Backward, GradientRule, build_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class FgmOptions(WrapperOptions):
    """Fast gradient method: one adversarial pass beside the clean one."""

    perturbs: ClassVar[bool] = True
    name: str = "fgm"
    epsilon: float = 1.0
    """Length of the perturbation of an example, all its T x D embeddings together. 1 suits a large
    model; it drowns embeddings that are shorter than that (128 wide: try 0.1)."""
    weight: float = 1.0
    """Weight of the adversarial loss beside the clean one."""

    def __post_init__(self) -> None:
        require(self.epsilon > 0, f"train.rule.epsilon={self.epsilon} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PgdOptions(FgmOptions):
    """Projected gradient descent: the adversarial example is searched in several steps."""

    name: str = "pgd"
    ascents: int = 3
    """Steps K of the search."""
    step_size: float = 0.4
    """Length a of one of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ascents >= 1, f"train.rule.ascents={self.ascents} must be at least 1")
        require(self.step_size > 0, f"train.rule.step_size={self.step_size} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeLbOptions(WrapperOptions):
    """FreeLB: every step of the search also gives a share of the gradient."""

    perturbs: ClassVar[bool] = True
    name: str = "freelb"
    epsilon: float = 0.6
    """Largest length of the perturbation of an example."""
    ascents: int = 3
    """Passes K."""
    step_size: float = 0.1
    """Length of a step of the search."""
    start: float = 0.05
    """Bound of the uniform start, before the division by sqrt(T D); 0 starts at the example. A
    random start depends, as dropout does, on how rows are spread over ranks."""

    def __post_init__(self) -> None:
        require(self.epsilon > 0, f"train.rule.epsilon={self.epsilon} must be positive")
        require(self.ascents >= 1, f"train.rule.ascents={self.ascents} must be at least 1")
        require(self.step_size > 0, f"train.rule.step_size={self.step_size} must be positive")
        require(self.start >= 0, f"train.rule.start={self.start} must not be negative")


class Perturbation:
    """What is added to the embeddings of one micro-batch, d [B, T, D]."""

    def __init__(self, batch: Any, start: float = 0.0) -> None:
        self.documents = batch.tensors.get("documents")
        self.start = start
        self.delta: Tensor | None = None

    @contextlib.contextmanager
    def on(self, embedding: nn.Module) -> Iterator[Perturbation]:
        """Inside, the embedding's output is perturbed."""
        handle = embedding.register_forward_hook(lambda module, inputs, out: self.add_to(out))
        try:
            yield self
        finally:
            handle.remove()

    def add_to(self, out_BTD: Tensor) -> Tensor:
        """The perturbed embeddings; the first call finds their shape. A memory, which is read
        without a gradient, stays as it is."""
        if not torch.is_grad_enabled():
            return out_BTD
        if self.delta is None:
            delta = torch.zeros_like(out_BTD, requires_grad=False)
            if self.start > 0:
                n_examples = len(delta) if self.documents is None else self.documents.max() + 1
                delta.uniform_(-1, 1).mul_(self.start * (n_examples / delta.numel()) ** 0.5)
            self.delta = delta.requires_grad_()
        require(
            self.delta.shape == out_BTD.shape,
            "train.rule: an adversarial rule perturbs one batch at a time; put a rule that brings "
            "another one (replay) around it, not inside",
        )
        return out_BTD + self.delta

    def ascend(self, step_size: float, radius: float) -> None:
        """One step of length `step_size` along the gradient, then back into the ball."""
        assert self.delta is not None and self.delta.grad is not None  # a pass has gone before
        gradient, self.delta.grad = self.delta.grad, None
        with torch.no_grad():
            moved = self.delta + step_size * gradient / self.lengths(gradient)
            self.delta = moved * (radius / self.lengths(moved)).clamp(max=1.0)
        self.delta.requires_grad_()

    def lengths(self, x_BTD: Tensor) -> Tensor:
        """The norm of each example's part, for every token of it: [B, T or 1, 1], never 0."""
        tiny = torch.finfo(x_BTD.dtype).tiny
        if self.documents is None:
            return x_BTD.flatten(1).norm(dim=1)[:, None, None].clamp(min=tiny)
        documents_BT = self.documents.to(x_BTD.device, non_blocking=True)
        row_B1 = torch.arange(len(documents_BT), device=x_BTD.device)[:, None]
        example_BT = row_B1 * (documents_BT.max() + 2) + documents_BT + 1
        index_N = numbered(example_BT.flatten())
        squares_N = x_BTD.square().sum(dim=-1).flatten()
        sums_N = torch.zeros_like(squares_N).index_add(0, index_N, squares_N)
        return sums_N.sqrt().clamp(min=tiny)[index_N].view(*documents_BT.shape, 1)


def numbered(labels_N: Tensor) -> Tensor:
    """int64 [N]: each label's place among the different ones, in order. `torch.unique` finds the
    same, but makes the host wait to learn how many there are."""
    sorted_N, order_N = labels_N.sort()
    place_N = torch.zeros_like(labels_N)
    place_N[1:] = (sorted_N[1:] != sorted_N[:-1]).cumsum(dim=0)
    return torch.empty_like(labels_N).scatter_(0, order_N, place_N)


def ascent_of(backward: Backward, perturbation: Perturbation) -> Backward:
    """A backward that finds the perturbation's gradient and no other, and logs nothing."""
    other = copy.copy(backward)
    other.sums, other.seen = {}, {}

    def differentiate(total: Tensor) -> None:
        delta = perturbation.delta
        assert delta is not None  # the forward pass has made it
        (gradient,) = torch.autograd.grad(total, delta)
        before = delta.grad
        delta.grad = gradient if before is None else before + gradient

    other.differentiate = differentiate  # type: ignore[method-assign]  # of this copy alone
    return other


@RULES.register("fgm", options=FgmOptions)
def fgm(options: FgmOptions) -> GradientRule:
    """The clean pass gives the perturbation; a second pass gives the rest of the gradient."""
    return attack(options, ascents=1, step_size=options.epsilon)


@RULES.register("pgd", options=PgdOptions)
def pgd(options: PgdOptions) -> GradientRule:
    """The clean pass, K - 1 passes of search, and one at what they found."""
    return attack(options, ascents=options.ascents, step_size=options.step_size)


def attack(options: FgmOptions, ascents: int, step_size: float) -> GradientRule:
    """Clean and adversarial loss; the first ascent uses the clean pass' gradient."""
    inner = build_rule(options.inner)

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        embedding = learner.learner.trunk.embedding
        for engine, batch in one_by_one(learner, micro_batches):
            with Perturbation(batch).on(embedding) as perturbation:
                inner(Muted(engine), [batch], backward)
                perturbation.ascend(step_size, options.epsilon)
                for _ in range(ascents - 1):
                    inner(Muted(engine), [batch], ascent_of(backward, perturbation))
                    perturbation.ascend(step_size, options.epsilon)
                inner(engine, [batch], backward.weighed(options.weight, logged=False))

    return rule


@RULES.register("freelb", options=FreeLbOptions)
def freelb(options: FreeLbOptions) -> GradientRule:
    """K passes, each with 1/K of the loss, all with the same dropout (section 3.3)."""
    inner = build_rule(options.inner)

    def rule(learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward) -> None:
        embedding = learner.learner.trunk.embedding
        share = backward.weighed(1 / options.ascents, logged=True)
        devices = [learner.world.device] if learner.world.device.type == "cuda" else []
        for engine, batch in one_by_one(learner, micro_batches):
            with Perturbation(batch, options.start).on(embedding) as perturbation:
                for number in range(options.ascents):
                    last = number == options.ascents - 1
                    with same_random(devices, when=not last):
                        inner(engine if last else Muted(engine), [batch], share)
                    if not last:
                        perturbation.ascend(options.step_size, options.epsilon)

    return rule


@contextlib.contextmanager
def same_random(devices: list[torch.device], when: bool) -> Iterator[None]:
    """After it, `when` true, the random numbers that were drawn inside are drawn again."""
    if when:
        with torch.random.fork_rng(devices=devices):
            yield
    else:
        yield
