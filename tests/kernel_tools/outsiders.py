"""Kernels as outsiders get them wrong, each with the words that must name its fault.

`Outsider` is a right kernel of an op; every entry changes one thing in it, as a person would.
`python -m tests.kernel_tools.outsiders` prints what `kernels check` says of each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F

from nanolm.ops.contract import KERNELS, candidates
from nanolm.tools.kernel_check.conformance import check_kernel


def right(op: str) -> Any:
    """The op's definition."""
    candidates(op)
    return KERNELS[op].get("reference").build().run


class Outsider:
    """A kernel that serves everything by a function, unless `refuses` says otherwise."""

    name = "outsider"

    def __init__(self, run, refuses=lambda spec: None):
        self.run, self.why_not = run, refuses


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A wrong kernel: its op, what makes it, and what `kernels check` must say."""

    name: str
    op: str
    make: Any
    words: str
    refuses: Any = lambda spec: None

    def kernel(self):
        return Outsider(self.make(right(self.op)), self.refuses)


WRONG = []


def wrong(op, words, refuses=lambda spec: None):
    """Decorator: enters a function that makes a wrong `run` of a right one."""

    def enter(make):
        WRONG.append(Wrong(make.__name__, op, make, words, refuses))
        return make

    return enter


def no_dropout(spec):
    return "it has no dropout" if getattr(spec, "dropout", 0) else None


@wrong("attention", "it changes its input in place: q")
def scales_queries_in_place(run):
    def attend(q, k, v, mask, *, scale, **options):
        q.data.mul_(scale)
        return run(q, k, v, mask, scale=1.0, **options)

    return attend


@wrong("attention", "torch.bfloat16 is due")
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


@wrong("attention", "it ignores dropout: no weight is dropped")
def ignores_dropout(run):
    return lambda *given, dropout=0.0, **options: run(*given, **options)


@wrong("attention", "is not scaled by 1 / (1 - dropout)")
def does_not_scale_what_it_keeps(run):
    def attend(*given, dropout=0.0, **options):
        return run(*given, dropout=dropout, **options) * (1 - dropout)

    return attend


@wrong("attention", "two calls in a row drop the same weights")
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


@wrong("attention", "with dropout its gradient of q is not that of its output")
def draws_dropout_anew_in_the_backward_pass(run):
    def attend(q, k, v, mask, *, dropout=0.0, **options):
        if not dropout:
            return run(q, k, v, mask, **options)
        whole = functools.partial(run, mask=mask, dropout=dropout, **options)
        return OtherDropout.apply(whole, q, k, v)

    return attend


@wrong("attention", "out is off by")
def forgets_keys_beyond_a_thousand(run):
    def attend(q, k, v, mask, **options):
        if k.shape[1] <= 1024:
            return run(q, k, v, mask, **options)
        k = torch.cat([k[:, :1024], k[:, 1024:] * 0], dim=1)
        return run(q, k, v, mask, **options)

    return attend


@wrong("attention", "it puts queries at the beginning of the keys")
def aligns_queries_at_the_top(run):
    def attend(q, k, v, mask, **options):
        n, m = q.shape[1], k.shape[1]
        if options.get("bias") is not None or mask.kinds() != {"causal"} or m <= n:
            return run(q, k, v, mask, **options)
        return run(q, k[:, :n], v[:, :n], mask, **options)

    return attend


@wrong("attention", "a query head reads the wrong key head")
def takes_the_group_for_the_head(run):
    def attend(q, k, v, mask, **options):
        repeats = q.shape[2] // k.shape[2]
        return run(q, k.repeat(1, 1, repeats, 1), v.repeat(1, 1, repeats, 1), mask, **options)

    return attend


@wrong("attention", "it ignores `scale`")
def knows_the_scale_better(run):
    return lambda q, *rest, scale, **options: run(q, *rest, scale=q.shape[-1] ** -0.5, **options)


@wrong("attention", "its window is one too wide")
def counts_the_window_from_nought(run):
    def attend(q, k, v, mask, **options):
        if mask.window is not None:
            mask = dataclasses.replace(mask, window=mask.window + 1)
        return run(q, k, v, mask, **options)

    return attend


@wrong("attention", "a query that may see no key gives 0")
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


@wrong("attention", "no gradient reaches bias: it detaches them")
def forgets_the_gradient_of_the_bias(run):
    def attend(*given, bias=None, **options):
        if bias is not None:
            frozen = {name: x.detach() for name, x in vars(bias).items() if torch.is_tensor(x)}
            bias = dataclasses.replace(bias, **frozen)
        return run(*given, bias=bias, **options)

    return attend


@wrong("attention", "it ignores the soft-cap")
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


@wrong("attention", "is NaN or infinite where it should not be")
def takes_exp_of_large_scores(run):
    def attend(q, k, v, mask, *, scale, **options):
        out = run(q, k, v, mask, scale=scale, **options)
        return out.where((q.float().norm() * k.float().norm() * scale) < 8e3, torch.inf)

    return attend


@wrong("norm", "after a call with other numbers of these shapes")
def remembers_by_shape(run):
    memory = {}

    def norm(x, *given, **options):
        key = (x.shape, x.dtype, tuple(options.items())) if not x.requires_grad else x.shape
        if x.shape != (37, 24):
            return run(x, *given, **options)
        return memory.setdefault((key, x.dtype), run(x, *given, **options))

    return norm


@wrong("norm", "torch.float32 is due")
def rounds_the_stream_to_x(run):
    def norm(x, *given, residual=None, **options):
        residual = None if residual is None else residual.to(x.dtype)
        return run(x, *given, residual=residual, **options)

    return norm


@wrong("norm", "it ignores eps")
def has_no_eps(run):
    return lambda *given, eps, **options: run(*given, eps=0.0, **options)


@wrong("norm", "its second output is x; x + residual is due")
def returns_x_for_the_sum(run):
    return lambda x, *given, **options: (run(x, *given, **options)[0], x)


@wrong("linear_cross_entropy", "its loss is the mean over tokens; their sum is due")
def takes_the_mean(run):
    def loss(hidden, weight, bias, targets, **options):
        found = run(hidden, weight, bias, targets, **options)
        return found._replace(loss=found.loss / (targets != -100).sum())

    return loss


@wrong("linear_cross_entropy", "it counts tokens whose target is -100")
def counts_ignored_tokens(run):
    return lambda h, w, b, targets, **options: run(h, w, b, targets.clamp(min=0), **options)


@wrong("linear_cross_entropy", "it ignores label_smoothing")
def does_not_smooth(run):
    return lambda *given, label_smoothing=0.0, **options: run(*given, **options)


@wrong("glu", "its GELU is the approximation by tanh")
def approximates_gelu(run):
    def glu(gate_up, *, kind):
        gate, up = gate_up.chunk(2, dim=-1)
        return (
            run(gate_up, kind=kind) if kind == "swiglu" else F.gelu(gate, approximate="tanh") * up
        )

    return glu


@wrong("glu", "it takes the second half for the gate")
def swaps_the_halves(run):
    return lambda x, **options: run(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), **options)


@wrong("rotary", "it rotates neighbours; the pairs are (i, i + R)")
def rotates_neighbours(run):
    def rotary(x, cos, sin):
        n = 2 * cos.shape[-1]
        a, b = x[..., 0:n:2].float(), x[..., 1:n:2].float()
        c, s = cos[:, :, None], sin[:, :, None]
        pairs = torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)
        return torch.cat([pairs.to(x.dtype), x[..., n:]], dim=-1)

    return rotary


@wrong("rotary", "it takes the first row's angles for all")
def takes_one_row_of_angles(run):
    return lambda x, cos, sin: run(x, cos[:1], sin[:1])


@wrong("linear", "it ignores the bias")
def has_no_bias(run):
    return lambda x, weight, bias: run(x, weight, None)


@wrong("symmetric_product", "it writes the lower half of the product only")
def writes_the_lower_half_only(run):
    return lambda x: run(x).tril()


@wrong("glu", "it reads its inputs as if they were contiguous")
def takes_no_notice_of_strides(run):
    def glu(gate_up, *, kind):
        return run(gate_up.as_strided(gate_up.shape, (gate_up.shape[-1], 1)), kind=kind)

    return glu


@wrong("norm", "under torch.no_grad its out is wrong")
def forgets_the_bias_where_nothing_trains(run):
    def norm(x, weight, bias, **options):
        trains = torch.is_grad_enabled() and x.requires_grad
        return run(x, weight if trains else weight * 0 + 1, bias, **options)

    return norm


@wrong("linear", "after its inputs were given other numbers in place: its out is off by")
def remembers_weights_by_their_place_in_memory(run):
    memory = {}

    def linear(x, weight, bias):
        key = weight.data_ptr(), weight.shape, weight.dtype
        copy = memory.setdefault(key, (weight, weight.detach().clone()))[1]
        return run(x, weight + (copy - weight).detach(), bias)

    return linear


@wrong("linear_cross_entropy", "it changes its input in place: targets")
def clears_ignored_targets_in_place(run):
    def loss(hidden, weight, bias, targets, **options):
        found = run(hidden, weight, bias, targets.clone(), **options)
        targets.clamp_(min=0)
        return found

    return loss


@wrong("attention", "it changes its input in place: key_lengths")
def gives_empty_rows_a_key(run):
    def attend(q, k, v, mask, **options):
        out = run(q, k, v, mask, **options)
        if mask.key_lengths is not None:
            mask.key_lengths.clamp_(min=1)
        return out

    return attend


@wrong("glu", "it keeps gate_up, out after the call: memory grows with every step")
def keeps_every_call(run):
    log = []

    def glu(gate_up, *, kind):
        log.append((gate_up, run(gate_up, kind=kind)))
        return log[-1][1]

    return glu


@wrong("attention", "the gradient of bias is off by")
def averages_the_gradient_of_a_shared_bias(run):
    def attend(q, *given, bias=None, **options):
        if getattr(bias, "values", None) is not None and bias.values.shape[0] == 1:
            half = bias.values / q.shape[0]
            bias = dataclasses.replace(bias, values=half + (bias.values - half).detach())
        return run(q, *given, bias=bias, **options)

    return attend


@wrong("attention", "it ignores the window")
def takes_a_window_of_one_for_none(run):
    def attend(q, k, v, mask, **options):
        if mask.window == 1:
            mask = dataclasses.replace(mask, window=None)
        return run(q, k, v, mask, **options)

    return attend


class OfTrainedWeights(torch.autograd.Function):
    """A norm whose backward pass does nothing unless the weight is trained."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.run = run
        return run(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.needs_input_grad[2]:
            return (None,) * 4
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            outputs = ctx.run(*leaves)
        return None, *torch.autograd.grad(outputs, leaves, grads)


@wrong("norm", "no gradient reaches x when the other inputs are frozen")
def has_no_gradient_beside_a_frozen_weight(run):
    def norm(x, weight, bias, *, residual=None, **options):
        if bias is not None or residual is None:
            return run(x, weight, bias, residual=residual, **options)
        return OfTrainedWeights.apply(
            lambda x, w, r: run(x, w, None, residual=r, **options), x, weight, residual
        )

    return norm


class Packed(torch.autograd.Function):
    """The gradient's numbers as they lie in memory, whatever its strides."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.as_strided(grad.shape, torch.empty(grad.shape).stride())


@wrong("rotary", "it reads an incoming gradient as if that were contiguous")
def takes_the_incoming_gradient_for_contiguous(run):
    return lambda *given: Packed.apply(run(*given))


@wrong("linear_cross_entropy", "it raises")
def cannot_bear_a_batch_without_tokens(run):
    def loss(hidden, *given, **options):
        if not len(hidden):
            raise IndexError("a grid of no programs")
        return run(hidden, *given, **options)

    return loss


def told(wrong):
    """What `kernels check` says of a wrong kernel: the sentence that names its fault, else all."""
    found = check_kernel(wrong.op, wrong.kernel(), quick=True)
    words = [finding.words for finding in found if finding.verdict == "FAIL"]
    return next((sentence for sentence in words if wrong.words in sentence), "; ".join(words))


def main():
    """Prints each wrong kernel and its sentence, as a table."""
    print("| op | a kernel that | is told |\n|---|---|---|")
    for wrong in WRONG:
        name = wrong.name.replace("_", " ")
        print(f"| `{wrong.op}` | {name} | {told(wrong).splitlines()[0]} |", flush=True)


if __name__ == "__main__":
    main()
