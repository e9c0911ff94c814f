"""Attention as outsiders get it wrong, each with the words that must name its fault."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from tests.kernel_tools.outsider import no_dropout, wrong


@wrong("attention", "it changes its input in place: q")
def scales_queries_in_place(run):
    def attend(q, k, v, mask, *, scale, **options):
        q.data.mul_(scale)
        return run(q, k, v, mask, scale=1.0, **options)

    return attend


@wrong("attention", "torch.bfloat16 is due", at="bfloat16")
def returns_float32(run):
    return lambda q, *rest, **options: run(q, *rest, **options).float()


@wrong("attention", "it gives other numbers each time on the same input", no_dropout)
def is_noisy(run):
    state = itertools.count(1)
    return lambda *given, **options: run(*given, **options) * (1 + 0.01 * next(state))


@wrong("attention", "it changes the state of torch's random numbers", no_dropout)
def seeds_torch(run):
    def attend(*given, **options):
        torch.manual_seed(0)
        return run(*given, **options)

    return attend


@wrong("attention", "it ignores dropout: no weight is dropped", at="dropout")
def ignores_dropout(run):
    return lambda *given, dropout=0.0, **options: run(*given, **options)


@wrong("attention", "is not scaled by 1 / (1 - dropout)", at="dropout")
def does_not_scale_what_it_keeps(run):
    def attend(*given, dropout=0.0, **options):
        return run(*given, dropout=dropout, **options) * (1 - dropout)

    return attend


@wrong("attention", "two calls in a row drop the same weights", at="dropout")
def drops_the_same_each_time(run):
    def attend(*given, dropout=0.0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return run(*given, dropout=dropout, **options)

    return attend


class OtherDropout(torch.autograd.Function):
    """Attention whose backward pass draws its dropout anew."""

    @staticmethod
    def forward(ctx, run, q, k, v):
        ctx.save_for_backward(q, k, v)
        ctx.run = run
        return run(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(99)
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = ctx.run(*leaves)
        return None, *torch.autograd.grad(out, leaves, grad)


@wrong("attention", "with dropout its gradient of q is not that of its output", at="dropout")
def draws_dropout_anew_in_the_backward_pass(run):
    def attend(q, k, v, mask, *, dropout=0.0, **options):
        if not dropout:
            return run(q, k, v, mask, **options)
        whole = functools.partial(run, mask=mask, dropout=dropout, **options)
        return OtherDropout.apply(whole, q, k, v)

    return attend


@wrong("attention", "out is off by", at="1100 keys")
def forgets_keys_beyond_a_thousand(run):
    def attend(q, k, v, mask, **options):
        if k.shape[1] <= 1024:
            return run(q, k, v, mask, **options)
        k = torch.cat([k[:, :1024], k[:, 1024:] * 0], dim=1)
        return run(q, k, v, mask, **options)

    return attend


@wrong("attention", "it puts queries at the beginning of the keys", at="fewer queries than keys")
def aligns_queries_at_the_top(run):
    def attend(q, k, v, mask, **options):
        n, m = q.shape[1], k.shape[1]
        if options.get("bias") is not None or mask.kinds() != {"causal"} or m <= n:
            return run(q, k, v, mask, **options)
        return run(q, k[:, :n], v[:, :n], mask, **options)

    return attend


@wrong("attention", "a query head reads the wrong key head", at="grouped heads")
def takes_the_group_for_the_head(run):
    def attend(q, k, v, mask, **options):
        repeats = q.shape[2] // k.shape[2]
        return run(q, k.repeat(1, 1, repeats, 1), v.repeat(1, 1, repeats, 1), mask, **options)

    return attend


@wrong("attention", "it ignores `scale`")
def knows_the_scale_better(run):
    return lambda q, *rest, scale, **options: run(q, *rest, scale=q.shape[-1] ** -0.5, **options)


@wrong("attention", "its window is one too wide", at="window")
def counts_the_window_from_nought(run):
    def attend(q, k, v, mask, **options):
        if mask.window is not None:
            mask = dataclasses.replace(mask, window=mask.window + 1)
        return run(q, k, v, mask, **options)

    return attend


@wrong("attention", "a query that may see no key gives 0", at="lengths")
def divides_by_nothing(run):
    def attend(q, k, v, mask, **options):
        blind = ~mask.dense(q.shape[1], k.shape[1], q.device).any(-1)  # [B or 1, 1, T]
        out = run(q, k, v, mask, **options)
        return out.masked_fill(blind[:, 0, :, None, None], torch.nan)

    return attend


@wrong("attention", "no gradient reaches k, q, v")
def is_forward_only_and_says_nothing(run):
    return lambda *given, **options: run(*given, **options).detach()


@wrong("attention", "its output is right and its backward pass is not: the gradient of v")
def scales_the_gradient_of_values(run):
    return lambda q, k, v, *rest, **options: run(q, k, 2 * v - v.detach(), *rest, **options)


@wrong("attention", "no gradient reaches bias: it detaches them", at="bucket bias")
def forgets_the_gradient_of_the_bias(run):
    def attend(*given, bias=None, **options):
        if bias is not None:
            frozen = {name: x.detach() for name, x in vars(bias).items() if torch.is_tensor(x)}
            bias = dataclasses.replace(bias, **frozen)
        return run(*given, bias=bias, **options)

    return attend


@wrong("attention", "it ignores the soft-cap", at="soft-cap")
def has_no_softcap(run):
    return lambda *given, softcap=None, **options: run(*given, **options)


@wrong("attention", "it raises TypeError")
def does_not_know_an_option(run):
    def attend(q, k, v, mask, *, scale, bias=None, dropout=0.0):
        return run(q, k, v, mask, scale=scale, bias=bias, dropout=dropout)

    return attend


@wrong("attention", "why_not returned False", lambda spec: False)
def answers_why_not_with_a_bool(run):
    return run


@wrong("attention", "is of shape")
def returns_heads_first(run):
    return lambda *given, **options: run(*given, **options).transpose(1, 2)


@wrong("attention", "is NaN or infinite where it should not be", at="large scores")
def takes_exp_of_large_scores(run):
    def attend(q, k, v, mask, *, scale, **options):
        out = run(q, k, v, mask, scale=scale, **options)
        return out.where((q.float().norm() * k.float().norm() * scale) < 8e3, torch.inf)

    return attend


@wrong("attention", "it changes its input in place: key_lengths", at="lengths")
def gives_empty_rows_a_key(run):
    def attend(q, k, v, mask, **options):
        out = run(q, k, v, mask, **options)
        if mask.key_lengths is not None:
            mask.key_lengths.clamp_(min=1)
        return out

    return attend


@wrong("attention", "the gradient of bias is off by", at="bias that hides")
def averages_the_gradient_of_a_shared_bias(run):
    def attend(q, *given, bias=None, **options):
        if getattr(bias, "values", None) is not None and bias.values.shape[0] == 1:
            half = bias.values / q.shape[0]
            bias = dataclasses.replace(bias, values=half + (bias.values - half).detach())
        return run(q, *given, bias=bias, **options)

    return attend


@wrong("attention", "it ignores the window", at="window of one")
def takes_a_window_of_one_for_none(run):
    def attend(q, k, v, mask, **options):
        if mask.window == 1:
            mask = dataclasses.replace(mask, window=None)
        return run(q, k, v, mask, **options)

    return attend


@wrong("attention", "it takes the integers of masks for int64; these are int32", at="int32 masks")
def reads_masks_as_64_bits(run):
    def misread(x):
        return x.long() + (x.flatten().roll(-1).long() << 32).view(x.shape)

    def attend(q, k, v, mask, **options):
        numbers = {name: x for name, x in vars(mask).items() if torch.is_tensor(x)}
        wrong = {name: misread(x) for name, x in numbers.items() if x.dtype == torch.int32}
        return run(q, k, v, dataclasses.replace(mask, **wrong), **options)

    return attend
