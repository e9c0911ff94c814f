"""One real optimizer step with its intermediate values kept: hooks on the run's own modules.

`trainer.step` computes everything once, as in training. What training itself never holds, one
query's scores and the logits of one target, is computed once more from the very tensors that the
attention kernel and the loss were given; `Attention.again_K` and `Prediction.nll_again` are there
to be compared with what the run made of them.

Shapes: B batch, T tokens, S keys, D model width, H heads, G key/value heads, K head width,
N targets, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanolm.errors import require_range
from nanolm.ops.masks import Mask
from nanolm.ops.reference import CrossEntropyOutput, ReferenceAttention
from nanolm.tools.walk.questions import Question
from nanolm.training.batch import MicroBatch
from nanolm.training.trainer import StepResult, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """What one head's query saw in one layer, and the shapes that the kernel got."""

    shapes: dict[str, list[int]]
    scores_S: Tensor  # before the mask
    hidden_S: Tensor  # after it: -inf where the key may not be seen
    weights_S: Tensor
    out_K: Tensor  # the kernel's own answer
    again_K: Tensor  # the weighted values once more, from weights_S
    dropout: float

    @property
    def difference(self) -> float:
        """The largest difference between the kernel's answer and the one computed here."""
        return float((self.out_K.float() - self.again_K.float()).abs().max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The logits of one target, computed once more, and the loss that the step itself had."""

    logits_V: Tensor
    nll: float
    target: int

    @property
    def nll_again(self) -> float:
        """-log p(target) from the logits."""
        logits_V = self.logits_V.double()
        return float(torch.logsumexp(logits_V, dim=-1) - logits_V[self.target])


@dataclasses.dataclass
class Recording:
    """A step that was taken, and what passed by on the way of its first forward pass."""

    x_BTD: Tensor | None = None
    attention: Attention | None = None
    hidden_BTD: Tensor | None = None
    prediction: Prediction | None = None
    result: StepResult | None = None
    moved: float = 0.0
    """|change of the weights| / |weights|, over everything that is trained."""


@contextlib.contextmanager
def in_place(owner: nn.Module, name: str, other: Any) -> Iterator[None]:
    """Inside, `owner.name` is another callable."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def record(
    trainer: Trainer,
    micro_batches: Sequence[MicroBatch],
    question: Question,
    layer: int,
    head: int,
) -> Recording:
    """Takes the trainer's next step and keeps what passes by.

    Raises UserError for a layer or a head that the model does not have.
    """
    learner, found = trainer.engine.learner, Recording()
    blocks: Any = learner.trunk.blocks
    require_range("layer", layer, 0, len(blocks) - 1)
    attention = blocks[layer].attention
    require_range("head", head, 0, attention.n_heads - 1)
    trained = [p for p in learner.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with contextlib.ExitStack() as stack:
        for hook in (
            blocks[0].register_forward_pre_hook(first_input(found)),
            learner.trunk.register_forward_hook(output(found)),
        ):
            stack.callback(hook.remove)
        for name in ("attend", "attend_to_cache"):  # the second one serves rows of one token
            attend = watched_attention(found, getattr(attention, name), question.position, head)
            stack.enter_context(in_place(attention, name, attend))
        vocabulary = learner.heads["lm"]
        entropy = watched_entropy(found, vocabulary, question)
        stack.enter_context(in_place(vocabulary, "cross_entropy", entropy))
        found.result = trainer.step(micro_batches)
    change = [p.detach() - old for p, old in zip(trained, before, strict=True)]
    norm = torch.nn.utils.get_total_norm
    found.moved = float(norm(change) / norm(before))
    return found


def first_input(found: Recording) -> Callable[..., None]:
    """A hook that keeps what the first block gets."""

    def hook(module: nn.Module, inputs: tuple) -> None:
        if found.x_BTD is None:
            found.x_BTD = inputs[0].detach()

    return hook


def output(found: Recording) -> Callable[..., None]:
    """A hook that keeps what the trunk returns."""

    def hook(module: nn.Module, inputs: tuple, hidden_BTD: Tensor) -> None:
        if found.hidden_BTD is None:
            found.hidden_BTD = hidden_BTD.detach()

    return hook


def watched_attention(
    found: Recording, attend: Any, position: int, head: int
) -> Callable[..., Tensor]:
    """`attend`, which also keeps what the first row's query of this position and head saw."""
    constants = {name: attend.keywords[name] for name in ("scale", "softcap")}

    def watched(
        q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, *, bias: Any, **rest: Any
    ) -> Tensor:
        out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, mask, bias=bias, **rest)
        if found.attention is None:
            with torch.no_grad():
                reference, alone = ReferenceAttention(), of_first_row(mask)
                scores_BHTS = reference.scores(q_BTHK[:1], k_BSGK[:1], bias=bias, **constants)
                hidden_BHTS = reference.hide(scores_BHTS, alone, bias)
                weights_BHTS, _ = reference.weights(
                    q_BTHK[:1], k_BSGK[:1], alone, bias=bias, **constants
                )
                group = head * k_BSGK.shape[2] // q_BTHK.shape[2]
                weights_S = weights_BHTS[0, head, position]
                found.attention = Attention(
                    shapes={
                        "q": list(q_BTHK.shape),
                        "k": list(k_BSGK.shape),
                        "v": list(v_BSGK.shape),
                    },
                    scores_S=scores_BHTS[0, head, position],
                    hidden_S=hidden_BHTS[0, head, position],
                    weights_S=weights_S,
                    out_K=out_BTHK[0, position, head].detach(),
                    again_K=weights_S @ v_BSGK[0, :, group].to(weights_S.dtype),
                    dropout=rest["dropout"],
                )
        return out_BTHK

    return watched


def of_first_row(mask: Mask) -> Mask:
    """The mask of a batch's first row alone."""
    tensors: dict[str, Any] = {
        field.name: value[:1]
        for field in dataclasses.fields(mask)
        if isinstance(value := getattr(mask, field.name), Tensor)
    }
    return dataclasses.replace(mask, length_groups=None, **tensors)


def watched_entropy(
    found: Recording, head: Any, question: Question
) -> Callable[..., CrossEntropyOutput]:
    """The head's `cross_entropy`, which also keeps the loss of one target and its logits."""
    cross_entropy = head.cross_entropy

    def watched(hidden_ND: Tensor, targets_N: Tensor, **options: Any) -> CrossEntropyOutput:
        out = cross_entropy(hidden_ND, targets_N, **options)
        if found.prediction is None:
            with torch.no_grad():
                found.prediction = Prediction(
                    logits_V=head(hidden_ND[question.number]),
                    nll=float(out.nll[question.number]),
                    target=question.target,
                )
        return out

    return watched
