"""Why a model says what it says: token attributions and attention maps of one text.

With x the token embeddings, b a baseline that says nothing, and F the number that is explained:

    gradient x input        a_t = x_t . dF(x)/dx_t                           (Shrikumar et al. 2016)
    integrated gradients    a_t = (x_t - b_t) . mean over u in (0, 1) of dF/dx_t at b + u (x - b)

The second is complete (Sundararajan et al. 2017, proposition 1): sum_t a_t = F(x) - F(b). The mean
is taken at the midpoints of n equal steps, and n is doubled until that holds to a tolerance; the
gap that is left is part of the answer. Tokens that frame a text (<cls>, <sep>, …) stand in x and in
b, so they get nothing.

Attention maps are the reference op's weights, seen by an observer around every block's attention;
the model computes what it always computes. They show where a head looks, which is not why the model
decides (Jain & Wallace 2019).

Shapes: K points on the way, T tokens, D model width, H heads, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanolm.finetune.explain.questions import Question, question_of
from nanolm.finetune.tasks.base import task_in
from nanolm.finetune.tasks.items import Item
from nanolm.learner import Learner
from nanolm.ops.reference import ReferenceAttention

Baseline = Literal["auto", "mask", "mean", "zero"]
CHUNK = 16
"""Points of the way in one forward pass."""


@dataclasses.dataclass(frozen=True)
class Integrated:
    """Attributions [T] (float64), F at both ends, and how well they add up."""

    values_T: Tensor
    at_text: float
    at_baseline: float
    steps: int

    @property
    def gap(self) -> float:
        """What is missing of completeness: sum of attributions - (F(x) - F(b))."""
        return float(self.values_T.sum()) - (self.at_text - self.at_baseline)


class Explainer:
    """One item (a single sequence) under a learner in evaluation mode, on the learner's device.

    Raises UserError for a task that has no number to explain.
    """

    def __init__(self, learner: Learner, item: Item, target: str | None = None) -> None:
        self.learner, self.item = learner, item
        self.task = task_in(learner)
        self.task.in_line = False  # a rectangle, in which each point has a row of its own
        trunk, tokens = learner.trunk, item.sequences[0].tokens
        self.device = trunk.embedding.weight.device
        self.tokens_T = torch.from_numpy(tokens).to(self.device)
        with torch.no_grad():
            self.x_TD = trunk.embedding(self.tokens_T) * trunk.scale
            self.maps_LHTT, hidden_BTD, batch = self._look()
            self.question: Question = question_of(
                self.task, hidden_BTD, learner.heads, batch, target
            )
            self.value = float(self.question.score(hidden_BTD, learner.heads, batch)[0])

    def _look(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        batch = self.batch(1)
        with observed_attention(self.learner) as maps:
            hidden_BTD = self.learner.trunk(self.task.inputs(batch))
        return torch.stack([weights[0] for weights in maps]), hidden_BTD, batch

    def batch(self, n: int) -> dict[str, Tensor]:
        """The item n times: rows of equal length, in order, packed or not."""
        arrays = self.task.collate([self.item] * n)
        return {k: torch.from_numpy(np.asarray(v)).to(self.device) for k, v in arrays.items()}

    def scores(self, points_KTD: Tensor) -> Tensor:
        """F at each of the points, [K]."""
        batch = self.batch(len(points_KTD))
        inputs = self.task.inputs(batch)
        inputs = dataclasses.replace(inputs, tokens_BT=None, embeddings_BTD=points_KTD)
        return self.question.score(self.learner.trunk(inputs), self.learner.heads, batch)

    def gradients(self, points_KTD: Tensor) -> Tensor:
        """dF/dx at each of the points, [K, T, D]."""
        points_KTD = points_KTD.detach().requires_grad_()
        (found,) = torch.autograd.grad(self.scores(points_KTD).sum(), points_KTD)
        return found

    def gradient_times_input(self) -> Tensor:
        """[T], float64."""
        return (self.x_TD * self.gradients(self.x_TD[None])[0]).double().sum(dim=-1)

    def baseline(self, kind: Baseline = "auto") -> Tensor:
        """The text that says nothing, [T, D]: <mask> (auto, encoder), the mean of all embeddings
        (auto, decoder) or zeros wherever a token does not belong to the frame."""
        trunk, tokenizer = self.learner.trunk, self.task.tokenizer
        if kind == "auto":
            kind = "mask" if self.task.trunk == "encoder" else "mean"
        weight_VD = trunk.embedding.weight.detach() * trunk.scale
        if kind == "mask":
            nothing_D = weight_VD[tokenizer.mask]
        else:
            nothing_D = weight_VD.mean(dim=0) * (kind == "mean")
        frame = torch.tensor(list(tokenizer.roles().values()), device=self.device)
        framing_T1 = torch.isin(self.tokens_T, frame)[:, None]
        return torch.where(framing_T1, self.x_TD, nothing_D)

    def integrated_gradients(
        self,
        kind: Baseline = "auto",
        *,
        steps: int = 32,
        most_steps: int = 1024,
        tolerance: float = 0.01,
    ) -> Integrated:
        """Integrated gradients from the baseline; the number of steps is doubled until the gap is
        at most `tolerance` of |F(x) - F(b)|, or `most_steps` are reached."""
        baseline_TD = self.baseline(kind)
        with torch.no_grad():
            at_text, at_baseline = self.scores(torch.stack([self.x_TD, baseline_TD])).tolist()
        while True:
            values_T = self._integral(baseline_TD, steps)
            found = Integrated(values_T, at_text, at_baseline, steps)
            if abs(found.gap) <= tolerance * abs(at_text - at_baseline) or 2 * steps > most_steps:
                return found
            steps *= 2

    def _integral(self, baseline_TD: Tensor, steps: int) -> Tensor:
        way_TD = self.x_TD - baseline_TD
        total_TD = torch.zeros_like(way_TD, dtype=torch.float64)
        for part in torch.arange(steps, device=self.device).split(CHUNK):
            share_K11 = ((part + 0.5) / steps).to(way_TD.dtype)[:, None, None]
            total_TD += self.gradients(baseline_TD + share_K11 * way_TD).double().sum(dim=0)
        return (way_TD * total_TD / steps).sum(dim=-1)


@contextlib.contextmanager
def observed_attention(learner: Learner) -> Iterator[list[Tensor]]:
    """Inside, every block's self-attention also gives its weights [B, H, T, S], block by block.

    Of prefix-tuning, the weights are those among the text's own tokens.
    """
    maps: list[Tensor] = []
    attentions: list[Any] = [block.attention for block in learner.trunk.blocks]
    names = ("attend", "attend_to_cache")  # the second one serves rows of one token
    kept = [(at, name, getattr(at, name)) for at in attentions for name in names]

    def watch(attend: Any) -> Any:
        constants = {name: attend.keywords[name] for name in ("scale", "softcap")}

        def observed(q: Tensor, k: Tensor, v: Tensor, mask: Any, *, bias: Any, **rest: Any) -> Any:
            maps.append(ReferenceAttention().weights(q, k, mask, bias=bias, **constants)[0])
            return attend(q, k, v, mask, bias=bias, **rest)

        return observed

    try:
        for attention, name, attend in kept:
            setattr(attention, name, watch(attend))
        yield maps
    finally:
        for attention, name, attend in kept:
            setattr(attention, name, attend)


def best_window(learner: Learner, items: list[Item], target: str | None) -> Explainer:
    """The explainer of the item whose number is highest: of a long context, the best span's."""
    return max((Explainer(learner, item, target) for item in items), key=lambda e: e.value)
