"""Attention whose masks, biases, numbers or dropout are wrong where only some data show it, each
with the words that must name its fault."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from nanolm.ops.bias import AlibiBias, BucketBias, DenseBias
from tests.kernel_tools.outsider import wrong


class Shown:
    """A mask that shows what it is given."""

    def __init__(self, allowed):
        self.allowed = allowed

    def dense(self, *_):
        return self.allowed


def wrong_mask(words, at):
    """Decorator: a function of (mask, T, S) that gives what a kernel shows."""

    def enter(reading):
        def make(run):
            def attend(q, k, v, mask, **options):
                return run(q, k, v, Shown(reading(mask, q.shape[1], k.shape[1])), **options)

            return attend

        make.__name__ = reading.__name__
        wrong("attention", words, at=at)(make)
        return reading

    return enter


def without(mask, *fields):
    off = {field: False if field in ("causal", "strict") else None for field in fields}
    return dataclasses.replace(mask, **off)


def prefix(mask, m):
    return (torch.arange(m) < mask.prefix_lengths[:, None, None])[:, None]


@wrong_mask("it shows the prefix beyond the key lengths", at="prefix and padding")
def takes_padding_for_a_prefix(mask, n, m):
    allowed = mask.dense(n, m)
    if not mask.causal or mask.prefix_lengths is None:
        return allowed
    return allowed | prefix(mask, m) & without(mask, "causal", "key_lengths").dense(n, m)


@wrong_mask("it shows the prefix beyond the window", at="prefix under a window")
def shows_a_prefix_through_every_window(mask, n, m):
    allowed = mask.dense(n, m)
    if not mask.causal or mask.prefix_lengths is None:
        return allowed
    return allowed | prefix(mask, m) & without(mask, "causal", "window").dense(n, m)


@wrong_mask("it takes a mask with a prefix for causal", at="prefix without causality")
def takes_every_prefix_for_causal(mask, n, m):
    causal = mask.causal or mask.prefix_lengths is not None
    return dataclasses.replace(mask, causal=causal).dense(n, m)


@wrong_mask("it puts queries at the end of a row's own keys", at="causal over a padded cache")
def aligns_queries_with_each_rows_keys(mask, n, m):
    if mask.key_lengths is None or not mask.causal or n == m or mask.window is not None:
        return mask.dense(n, m)
    t = torch.arange(n)[:, None] + (mask.key_lengths[:, None, None] - n)
    return without(mask, "causal").dense(n, m) & (torch.arange(m) <= t)[:, None]


@wrong_mask("it takes documents for pieces of a row", at="documents that come back")
def counts_documents_by_their_changes(mask, n, m):
    if mask.documents is None or mask.key_documents is not None:
        return mask.dense(n, m)
    changes = (mask.documents[:, 1:] != mask.documents[:, :-1]).long()
    return dataclasses.replace(mask, documents=F.pad(changes, (1, 0)).cumsum(1)).dense(n, m)


@wrong_mask("it takes documents below 0 for padding", at="documents below 0")
def knows_minus_one_as_padding(mask, n, m):
    if mask.documents is None:
        return mask.dense(n, m)
    keys = mask.documents if mask.key_documents is None else mask.key_documents
    return mask.dense(n, m) & (keys >= 0)[:, None, None]


def converted(mask, dtype):
    names = ("documents", "key_documents", "order", "key_order")
    there = {name: getattr(mask, name) for name in names if getattr(mask, name) is not None}
    return dataclasses.replace(mask, **{name: x.to(dtype) for name, x in there.items()})


@wrong_mask("it holds documents or order in float32", at="large documents")
def holds_documents_in_float32(mask, n, m):
    return converted(mask, torch.float32).dense(n, m)


@wrong_mask("it holds documents or order in 16 bits", at="large documents")
def holds_documents_in_16_bits(mask, n, m):
    return converted(mask, torch.int16).dense(n, m)


@wrong_mask("it takes the order for a permutation", at="places shared")
def sorts_the_order(mask, n, m):
    if mask.order is None or mask.key_order is not None:
        return mask.dense(n, m)
    places = mask.order.argsort(dim=1, stable=True).argsort(dim=1)
    return dataclasses.replace(mask, order=places).dense(n, m)


@wrong_mask("it takes a row of 0 keys for one without padding", at="lengths")
def takes_no_length_for_all(mask, n, m):
    if mask.key_lengths is None:
        return mask.dense(n, m)
    lengths = mask.key_lengths.where(mask.key_lengths > 0, m)
    return dataclasses.replace(mask, key_lengths=lengths).dense(n, m)


@wrong_mask("it ignores key lengths (padding)", at="one query, padded cache, window")
def decodes_with_a_window_and_no_lengths(mask, n, m):
    return without(mask, *(("key_lengths",) if n == 1 and mask.window else ())).dense(n, m)


@wrong_mask("it reads the first 512 keys only", at="1100 keys")
def has_four_tiles(mask, n, m):
    return mask.dense(n, m) & (torch.arange(m) < 512)


def wrong_bias(words, at):
    """Decorator: a function of (bias, q, T, S) that gives what a kernel adds, or the bias."""

    def enter(change):
        def make(run):
            def attend(q, k, v, mask, *, bias=None, **options):
                if bias is not None:
                    bias = change(bias, q, k.shape[1])
                return run(q, k, v, mask, bias=bias, **options)

            return attend

        make.__name__ = change.__name__
        wrong("attention", words, at=at)(make)
        return change

    return enter


class Added:
    """A bias of these numbers, whatever they are."""

    def __init__(self, values):
        self.values = values

    def dense(self, *_):
        return self.values


@wrong_bias("it multiplies the bias by `scale`", at="alibi")
def scales_the_bias(bias, q, m):
    return Added(bias.dense(q.shape[1], m) * 1.1 * q.shape[-1] ** -0.5)


@wrong_bias("it takes the first row's bias for all rows", at="bias by row")
def reads_one_row_of_a_bias(bias, q, m):
    one = isinstance(bias, DenseBias) and bias.values.dim() == 4 and bias.values.shape[1] == 1
    return DenseBias(bias.values[:1]) if one else bias


@wrong("attention", "it adds a bias that hides as a number", at="bias that hides")
def adds_the_lowest_number(run):
    def attend(q, k, v, mask, *, bias=None, **options):
        out = run(q, k, v, mask, bias=bias, **options)
        if not isinstance(bias, DenseBias) or mask.kinds() or bias.values.dim() < 4:
            return out
        blind = bias.dense(0, 0).isneginf().all(-1).transpose(1, 2)[..., None]
        return out.where(~blind, v.mean(1, keepdim=True))  # a softmax of equal numbers

    return attend


@wrong_bias(
    "it counts the bias's distances from the beginning of the keys", at="T5 decoder over a cache"
)
def counts_distances_from_the_top(bias, q, m):
    if not isinstance(bias, BucketBias):
        return bias
    n = max(q.shape[1], m)
    return Added(bias.dense(n, n)[:, : q.shape[1], :m])


@wrong_bias("ALiBi's distance is absolute", at="alibi")
def has_signed_distances(bias, q, m):
    if not isinstance(bias, AlibiBias):
        return bias
    distance = torch.arange(q.shape[1])[:, None] + (m - q.shape[1]) - torch.arange(m)
    return Added(-bias.slopes_H.float()[:, None, None] * distance)


@wrong_bias("its out is off by", at="slopes and far keys in bfloat16")
def rounds_far_distances(bias, q, m):
    far = isinstance(bias, AlibiBias) and q.dtype == torch.bfloat16
    return Added(bias.dense(q.shape[1], m).to(q.dtype)) if far else bias


class BiasOfEachQuery(torch.autograd.Function):
    """A bias, whose gradient is summed over rows and heads alone."""

    @staticmethod
    def forward(ctx, values, shape):
        ctx.shape = values.shape
        return values.expand(shape).clone()

    @staticmethod
    def backward(ctx, grad):
        places = (n for n, size in enumerate(ctx.shape) if size == 1 and grad.shape[n] > 1)
        for n in places:
            grad = grad.sum(n, keepdim=True) if n < 2 else grad.narrow(n, 0, 1)
        return grad, None


@wrong_bias("the gradient of bias is off by", at="bias of keys")
def forgets_queries_that_share_a_bias(bias, q, m):
    if not isinstance(bias, DenseBias) or bias.values.dim() < 4:
        return bias
    shape = (len(q), q.shape[2], q.shape[1], m)
    return DenseBias(BiasOfEachQuery.apply(bias.values, shape))


@wrong(
    "attention",
    "it takes the soft-cap of scores and bias together",
    at="soft-cap under a learned bias",
)
def caps_scores_and_bias(run):
    def attend(q, k, v, mask, *, bias=None, softcap=None, scale, **options):
        if bias is None or softcap is None:
            return run(q, k, v, mask, bias=bias, softcap=softcap, scale=scale, **options)
        repeats = q.shape[2] // k.shape[2]
        keys = k.repeat_interleave(repeats, 2).transpose(1, 2).to(q.dtype)
        scores = q.transpose(1, 2) @ keys.mT * scale
        total = scores + bias.dense(q.shape[1], k.shape[1])
        bent = softcap * torch.tanh(total / softcap)
        return run(q, k, v, mask, bias=Added(bent), scale=0.0, softcap=None, **options)

    return attend


@wrong("attention", "NaN in a query gives numbers", at="NaN")
def clears_what_is_not_a_number(run):
    return lambda *given, **options: torch.nan_to_num(run(*given, **options))


@wrong(
    "attention", "it reads its inputs as if they were contiguous", at="q, k and v of unlike strides"
)
def takes_the_strides_of_keys_for_those_of_values(run):
    def attend(q, k, v, mask, **options):
        reach = sum((n - 1) * step for n, step in zip(k.shape, k.stride()))
        if v.numel() and reach + v.storage_offset() < v.untyped_storage().nbytes() // v.itemsize:
            v = v.as_strided(v.shape, k.stride(), v.storage_offset())
        return run(q, k, v, mask, **options)

    return attend


def wrong_dropout(words, at="dropout"):
    """Decorator: a function of (shape of the weights, rate) that gives what they are multiplied
    by."""

    def enter(factors):
        def make(run):
            def attend(q, k, v, mask, *, scale, dropout=0.0, **options):
                if not dropout:
                    return run(q, k, v, mask, scale=scale, **options)
                weights = (q.transpose(1, 2) @ k.transpose(1, 2).mT * scale).softmax(-1)
                weights = weights * factors(weights.shape, dropout)
                return (weights @ v.transpose(1, 2)).transpose(1, 2)

            return attend

        make.__name__ = factors.__name__
        wrong("attention", words, at=at)(make)
        return factors

    return enter


@wrong_dropout("its dropout drops the same weights in all heads", at="dropout")
def draws_for_one_head(shape, rate):
    return (torch.rand(shape[0], 1, *shape[2:]) >= rate) / (1 - rate)


@wrong_dropout("its dropout drops the same weights in all rows", at="dropout")
def draws_for_one_row(shape, rate):
    return (torch.rand(1, *shape[1:]) >= rate) / (1 - rate)


@wrong_dropout("its dropout drops the same weights again 64 queries on", at="dropout")
def draws_for_one_tile(shape, rate):
    tile = torch.rand(*shape[:2], 64, 64).repeat(1, 1, 1 + shape[2] // 64, 1 + shape[3] // 64)
    return (tile[:, :, : shape[2], : shape[3]] >= rate) / (1 - rate)


@wrong_dropout("at a dropout of 0.1 it drops 6", at="dropout")
def has_four_bits_of_randomness(shape, rate):
    return (torch.randint(0, 16, shape) >= int(rate * 16)) / (1 - rate)


@wrong_dropout("as if it divided by the sum of what is kept", at="dropout")
def divides_by_what_is_kept(shape, rate):
    kept = (torch.rand(shape) >= rate).float()
    return kept / kept.mean(-1, keepdim=True).clamp(min=1e-6)


@wrong("attention", "it drops other weights with gradients than without", at="dropout")
def drops_in_training_alone(run):
    def attend(*given, dropout=0.0, **options):
        trains = torch.is_grad_enabled()
        if dropout and not trains:
            torch.rand(1)
        return run(*given, dropout=dropout, **options)

    return attend
