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
from nanolm.tools.kernel_check.trial import reference


@dataclasses.dataclass(frozen=True)
class Suspect:
    """What a kernel would do wrong, in words, and a kernel that does it."""

    words: str
    run: Callable[..., Any]


class Shown:
    """What a wrong reading of a mask lets be seen, as the definition asks for it."""

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def dense(self, *_: Any) -> Tensor:
        """bool [B or 1, 1, T, S]."""
        return self.allowed

    @classmethod
    def by(cls, reading: Reading, mask: Mask, n_queries: int, n_keys: int) -> Shown:
        """The mask in a wrong reading."""
        return cls(reading(mask, n_queries, n_keys))


Reading = Callable[[Mask, int, int], Tensor]


def prefix_of(mask: Mask, n_keys: int) -> Tensor:
    """bool [B, 1, 1, S]: the keys of the prefix; AttributeError where there is none."""
    lengths = given(mask.prefix_lengths)
    return torch.arange(n_keys, device=lengths.device) < lengths[:, None, None, None]


def given(x: Tensor | None) -> Tensor:
    """A field of a mask that is there; AttributeError says that there is nothing to misread."""
    if x is None:
        raise AttributeError("this mask does not have it")
    return x


def prefix_despite(*fields: str) -> Reading:
    """The prefix is seen whatever these say."""

    def reading(mask: Mask, n: int, m: int) -> Tensor:
        seen = prefix_of(mask, m)
        rest = without(mask, *fields, causal=False)
        return mask.dense(n, m, seen.device) | (seen & rest.dense(n, m, seen.device))

    return reading


def aligned_to_lengths(mask: Mask, n: int, m: int) -> Tensor:
    """Queries stand at the end of a row's own keys."""
    ends = given(mask.key_lengths)
    rest = without(mask, "window", causal=False).dense(n, m, ends.device)
    t = torch.arange(n, device=ends.device)[:, None] + (ends[:, None, None] - n)
    s = torch.arange(m, device=ends.device)
    seen = s <= t if mask.causal else torch.ones_like(s <= t)
    seen = seen if mask.window is None else seen & ((t - s).abs() < mask.window)
    return rest & seen[:, None]


def numbers_as(change: Callable[[Tensor], Tensor]) -> Reading:
    """Documents and places after a change of their numbers."""

    def reading(mask: Mask, n: int, m: int) -> Tensor:
        names = ("documents", "key_documents", "order", "key_order")
        there = {name: x for name in names if (x := getattr(mask, name)) is not None}
        changed = {name: change(x) for name, x in there.items()}
        return dataclasses.replace(mask, **changed).dense(n, m, next(iter(there.values())).device)

    return reading


def runs(x: Tensor) -> Tensor:
    """How often the number has changed up to each place."""
    return F.pad((x[:, 1:] != x[:, :-1]).long(), (1, 0)).cumsum(dim=1)


def ranks(x: Tensor) -> Tensor:
    """Places of which none is shared."""
    return x.argsort(dim=1, stable=True).argsort(dim=1)


def no_negative(mask: Mask, n: int, m: int) -> Tensor:
    """A document below 0 is padding."""
    keys = mask.documents if mask.key_documents is None else mask.key_documents
    return mask.dense(n, m, given(keys).device) & (given(keys) >= 0)[:, None, None]


def no_zero(mask: Mask, n: int, m: int) -> Tensor:
    """A row of 0 keys has no padding."""
    lengths = given(mask.key_lengths)
    return dataclasses.replace(mask, key_lengths=lengths.where(lengths > 0, m)).dense(
        n, m, lengths.device
    )


def first_keys(limit: Callable[[int], int]) -> Reading:
    """No key behind so many is seen."""

    def reading(mask: Mask, n: int, m: int) -> Tensor:
        tensors = [x for x in vars(mask).values() if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        return mask.dense(n, m, device) & (torch.arange(m, device=device) < limit(m))

    return reading


MASKS: dict[str, Reading] = {
    "it shows the prefix beyond the key lengths (padding)": prefix_despite("key_lengths"),
    "it shows the prefix beyond the window": prefix_despite("window"),
    "it takes a mask with a prefix for causal; a layer may be not": (
        lambda mask, n, m: without(mask, causal=given(mask.prefix_lengths) is not None).dense(
            n, m, given(mask.prefix_lengths).device
        )
    ),
    "it puts queries at the end of a row's own keys (key_lengths); they stand at that of all S": (
        aligned_to_lengths
    ),
    "it takes documents for pieces of a row: one that comes back is the same document": (
        numbers_as(runs)
    ),
    "it takes documents below 0 for padding: they are numbers as others are": no_negative,
    "it holds documents or order in 16 bits": numbers_as(lambda x: x.to(torch.int16)),
    "it holds documents or order in float32, where 2^24 and 2^24 + 1 are one": (
        numbers_as(lambda x: x.float())
    ),
    "it takes the order for a permutation: places that are shared are seen both ways": (
        numbers_as(ranks)
    ),
    "it takes a row of 0 keys for one without padding": no_zero,
    **{
        f"it reads the first {n} keys only": first_keys(lambda _, n=n: n)
        for n in (64, 128, 256, 512, 1024)
    },
    **{
        f"it leaves out the keys behind the last whole tile of {n}": first_keys(
            lambda m, n=n: m // n * n
        )
        for n in (16, 32, 64, 128)
    },
}
"""What a wrong reading of a mask is told."""


def wrong_bias(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scores to which `change(bias, scale, T, S)` is added for the bias."""

    def scores(q: Tensor, k: Tensor, *, bias: Any, scale: float, softcap: float | None) -> Tensor:
        plain = reference("attention").scores(q, k, bias=None, scale=scale, softcap=softcap)
        return plain + change(bias, scale, q.shape[1], k.shape[1])

    return scores


def capped_last(q: Tensor, k: Tensor, *, bias: Any, scale: float, softcap: float | None) -> Tensor:
    """The soft-cap is on scores and bias."""
    total = reference("attention").scores(q, k, bias=bias, scale=scale, softcap=None)
    return given(softcap) * torch.tanh(total / softcap)


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
    "it adds a bias that hides as a number: a query that is left with no key gives 0": wrong_bias(
        lambda bias, *_: bias.values.clamp(min=-1e30)
    ),
    **{
        f"its scores leave out the features behind the last {n}": narrower(n)
        for n in (8, 16, 32, 64)
    },
}
"""What scores that are put together otherwise are told."""


def other_scores(scores: Callable[..., Tensor]) -> ReferenceAttention:
    """The definition with other scores."""
    wrong = ReferenceAttention()
    wrong.scores = scores  # type: ignore[method-assign]
    return wrong


def without(mask: Mask, *fields: str, **others: Any) -> Mask:
    """The mask with some fields as if they had not been given."""
    left_out: dict[str, Any] = dict.fromkeys(fields)
    return dataclasses.replace(mask, **left_out, **others)


def attention_suspects() -> Iterator[Suspect]:
    """Conditions and options that are ignored or taken otherwise."""
    right = reference("attention").run

    def masked(change: Callable[[Mask, int, int], Mask]) -> Callable[..., Any]:
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
