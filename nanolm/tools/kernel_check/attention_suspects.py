"""Attention that is wrong in a known way: conditions of masks left out or combined otherwise,
scores put together otherwise, and backward passes that forget something.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolm.ops.bias import AlibiBias, DenseBias, distances
from nanolm.ops.masks import Mask
from nanolm.ops.reference import ReferenceAttention
from nanolm.tools.kernel_check.misread_masks import MASKS, Shown, given, without
from nanolm.tools.kernel_check.trial import reference


@dataclasses.dataclass(frozen=True)
class Suspect:
    """What a kernel would do wrong, in words, and a kernel that does it."""

    words: str
    run: Callable[..., Any]


def wrong_bias(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scores to which `change(bias, scale, T, S)` is added for the bias."""

    def scores(q: Tensor, k: Tensor, *, bias: Any, scale: float, softcap: float | None) -> Tensor:
        plain = reference("attention").scores(q, k, bias=None, scale=scale, softcap=softcap)
        return plain + change(bias, scale, q.shape[1], k.shape[1])

    return scores


def capped_last(q: Tensor, k: Tensor, *, bias: Any, scale: float, softcap: float | None) -> Tensor:
    """The soft-cap is on scores and bias."""
    total = reference("attention").scores(q, k, bias=bias, scale=scale, softcap=None)
    cap = given(softcap)
    return cap * torch.tanh(total / cap)


def narrower(multiple: int) -> Callable[..., Tensor]:
    """Scores of the features up to a multiple of something."""

    def scores(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        width = q.shape[-1] // multiple * multiple
        return reference("attention").scores(q[..., :width], k[..., :width], **options)

    return scores


def signed(bias: AlibiBias, _: float, n: int, m: int) -> Tensor:
    """-slope times the distance, which is below 0 for keys after the query."""
    distance_TS = distances(n, m, bias.slopes_H.device)
    return -bias.slopes_H[:, None, None] * distance_TS


def from_the_top(bias: Any, _: float, n: int, m: int) -> Tensor:
    """Distances as if queries stood at the beginning of the keys; a dense bias has none."""
    if isinstance(bias, DenseBias):
        raise TypeError("a dense bias has no distances")
    return bias.dense(max(n, m), max(n, m))[:, :n, :m]


def divided(q: Tensor, k: Tensor, *, bias: Any, **options: Any) -> Tensor:
    """The bias is scaled as the products are, by a scale of its own."""
    plain = reference("attention").scores(q, k, bias=None, **options)
    return plain + bias.dense(q.shape[1], k.shape[1]) * q.shape[-1] ** -0.5


def as_number(q: Tensor, k: Tensor, *, bias: Any, **options: Any) -> Tensor:
    """The lowest number swallows the scores that it is added to: where it is everywhere, all keys
    are alike."""
    total = reference("attention").scores(q, k, bias=bias, **options)
    given(getattr(bias, "values", None))
    return total.masked_fill(total.isneginf().all(dim=-1, keepdim=True), 0.0)


SCORES: dict[str, Callable[..., Tensor]] = {
    "it multiplies the bias by `scale`": wrong_bias(
        lambda bias, scale, n, m: bias.dense(n, m) * scale
    ),
    "it takes the soft-cap of scores and bias together: the bias is added after it": capped_last,
    "it takes keys after a query for nearer than those before: ALiBi's distance is absolute": (
        wrong_bias(signed)
    ),
    "it counts the bias's distances from the beginning of the keys; queries stand at the end "
    "(T != S)": wrong_bias(from_the_top),
    "it takes the first row's bias for all rows": wrong_bias(lambda bias, *_: bias.dense(0, 0)[:1]),
    "it takes the first head's bias for all heads": wrong_bias(
        lambda bias, _, n, m: bias.dense(n, m)[..., :1, :, :]
    ),
    "it adds a bias that hides as a number: a query that is left with no key gives 0": as_number,
    "it multiplies the bias by 1 / sqrt(K)": divided,
    **{
        f"its scores leave out the features behind the last {n}": narrower(n)
        for n in (8, 16, 32, 64)
    },
}
"""What scores that are put together otherwise are told."""


def other_scores(scores: Callable[..., Tensor]) -> ReferenceAttention:
    """The definition with other scores."""
    wrong = ReferenceAttention()
    vars(wrong)["scores"] = scores
    return wrong


def attention_suspects() -> Iterator[Suspect]:
    """Conditions and options that are ignored or taken otherwise."""
    right = reference("attention").run

    def masked(change: Callable[[Mask, int, int], Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options: Any) -> Any:
            return right(q, k, v, change(mask, q.shape[1], k.shape[1]), **options)

        return run

    def optioned(**changed: Any) -> Callable[..., Any]:
        return lambda *given, **options: right(*given, **(options | changed))

    def usual_scale(q: Tensor, *given: Any, **options: Any) -> Any:
        return right(q, *given, **(options | {"scale": q.shape[-1] ** -0.5}))

    def other_heads(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options: Any) -> Any:
        repeats = q.shape[2] // k.shape[2]
        return right(q, k.repeat(1, 1, repeats, 1), v.repeat(1, 1, repeats, 1), mask, **options)

    def top_left(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options: Any) -> Any:
        n, m = q.shape[1], k.shape[1]
        if m > n:  # queries at the end of the first n keys
            return right(q, k[:, :n], v[:, :n], mask, **options)
        padded = (F.pad(x, (0, 0, 0, 0, 0, n - m)) for x in (k, v))
        lengths = torch.full((len(q),), m, device=q.device)
        return right(q, *padded, dataclasses.replace(mask, key_lengths=lengths), **options)

    def wider(by: int) -> Callable[[Mask, int, int], Mask]:
        return lambda mask, *_: dataclasses.replace(mask, window=mask.window + by)

    ignores = "it ignores {}: its output is that of attention without"
    for words, change in (
        ("key lengths (padding)", lambda m, *_: without(m, "key_lengths")),
        ("documents", lambda m, *_: without(m, "documents", "key_documents")),
        ("the prefix", lambda m, *_: without(m, "prefix_lengths")),
        ("the order", lambda m, *_: without(m, "order", "key_order")),
        ("causality", lambda m, *_: without(m, causal=False)),
        ("the window", lambda m, *_: without(m, "window")),
        ("the whole mask", lambda *_: Mask()),
    ):
        yield Suspect(ignores.format(words), masked(change))
    yield Suspect(
        "it takes a strict order for a loose one: a query sees its own place",
        masked(lambda m, *_: dataclasses.replace(m, strict=False)),
    )
    yield Suspect("its window is one too wide", masked(wider(1)))
    yield Suspect("its window is one too narrow", masked(wider(-1)))
    yield Suspect(
        "it puts queries at the beginning of the keys; they stand at the end (T != S)", top_left
    )
    for words, shown in MASKS.items():
        yield Suspect(words, masked(functools.partial(Shown.by, shown)))
    yield Suspect(ignores.format("the soft-cap"), optioned(softcap=None))
    yield Suspect(ignores.format("the bias"), optioned(bias=None))
    yield Suspect("it ignores `scale`: it takes 1 / sqrt(K)", usual_scale)
    yield Suspect("it ignores `scale`: its products are not scaled", optioned(scale=1.0))
    yield Suspect(
        "a query head reads the wrong key head: query head h belongs to key head h // (H / G)",
        other_heads,
    )
    for words, scores in SCORES.items():
        yield Suspect(words, other_scores(scores).run)


def backward_suspects() -> Iterator[Suspect]:
    """Backward passes that forget a factor or a sum, behind a forward pass that is right."""
    definition = reference("attention")

    def straight(q: Tensor, k: Tensor, *, bias: Any, scale: float, softcap: Any) -> Tensor:
        options = {"bias": bias, "scale": scale}
        plain = definition.scores(q, k, softcap=None, **options)
        return plain + (definition.scores(q, k, softcap=softcap, **options) - plain).detach()

    def times(factor: Callable[..., float], names: str) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
            by = factor(q, k, options["scale"])
            q, k, v = (
                x * by + (x - x * by).detach() if name in names else x
                for name, x in zip("qkv", (q, k, v))
            )
            return definition.run(q, k, v, *rest, **options)

        return run

    yield Suspect(
        "its output is right and its backward pass is not: it forgets the soft-cap's derivative",
        other_scores(straight).run,
    )
    for names in ("q", "k", "qk"):
        yield Suspect(
            f"its output is right and its backward pass is not: the gradient of "
            f"{', '.join(names)} lacks `scale`",
            times(lambda q, k, scale: 1 / scale, names),
        )
    for names in ("k", "v", "kv"):
        yield Suspect(
            f"its output is right and its backward pass is not: the gradient of "
            f"{', '.join(names)} is the mean over a group's query heads; their sum is due",
            times(lambda q, k, scale: k.shape[2] / q.shape[2], names),
        )
