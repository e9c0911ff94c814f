"""Attention that is right in a call by itself and wrong among others: what sticks to the next call,
lies in others' memory, is lost for the backward pass, or changes the process; each with the words
that must name its fault."""

from __future__ import annotations

import os
import random
import warnings

import numpy as np
import torch

from nanolm.ops.bias import AlibiBias
from tests.kernel_tools.outsider import no_dropout, wrong
from tests.kernel_tools.wrong_masks import Added, Shown


@wrong("attention", "after a call with another window on the same shapes", at="other options")
def keeps_windows_by_shape(run):
    kept = {}

    def attend(q, k, v, mask, **options):
        key = q.shape[1], k.shape[1], mask.causal
        if mask.kinds() <= {"causal", "window"}:
            mask = Shown(kept.setdefault(key, mask.dense(q.shape[1], k.shape[1])))
        return run(q, k, v, mask, **options)

    return attend


@wrong("attention", "after a call with another soft-cap on the same shapes", at="other options")
def compiles_the_softcap_in(run):
    kept = {}

    def attend(q, *given, softcap=None, **options):
        softcap = softcap and kept.setdefault((q.shape, q.dtype), softcap)
        return run(q, *given, softcap=softcap, **options)

    return attend


@wrong("attention", "after a call with another scale on the same shapes", at="other options")
def compiles_the_scale_in(run):
    kept = {}

    def attend(q, *given, scale, **options):
        return run(q, *given, scale=kept.setdefault((q.shape, q.dtype), scale), **options)

    return attend


@wrong("attention", "after the numbers of its mask were changed in place", at="other masks")
def keeps_masks_by_their_object(run):
    kept = {}

    def attend(q, k, v, mask, **options):
        n, m = q.shape[1], k.shape[1]
        seen = kept.setdefault((id(mask), n, m), (mask, mask.dense(n, m)))[1]
        return run(q, k, v, Shown(seen), **options)

    return attend


@wrong("attention", "after a call under torch.inference_mode", at="inference mode")
def keeps_distances_of_an_evaluation(run):
    kept = {}

    def attend(q, k, v, mask, *, bias=None, **options):
        if isinstance(bias, AlibiBias):
            n, m = q.shape[1], k.shape[1]
            if (n, m) not in kept:
                kept[n, m] = -AlibiBias(torch.ones(1)).dense(n, m)
            bias = Added(-bias.slopes_H.float()[:, None, None] * kept[n, m])
        return run(q, k, v, mask, bias=bias, **options)

    return attend


@wrong("attention", "after the call, made of its inputs", at="released")
def keeps_weights_to_be_looked_at(run):
    seen = []

    def attend(q, k, v, mask, **options):
        seen[:] = [(q.detach() @ k.detach()[:, :, :1].mT).sigmoid()]
        return run(q, k, v, mask, **options)

    return attend


class ByTheSpec:
    """What a kernel remembers of the spec that it was asked about."""

    softcap = None

    def __call__(self, spec):
        type(self).softcap = spec.softcap


@wrong(
    "attention",
    "its run goes by the spec that why_not was asked about last",
    ByTheSpec(),
    at="why_not",
)
def remembers_the_soft_cap_of_the_spec(run):
    return lambda *given, softcap=None, **options: run(*given, softcap=ByTheSpec.softcap, **options)


class Tired:
    """Refuses what it served before, once it has been asked often."""

    def __init__(self):
        self.asked = 0

    def __call__(self, spec):
        self.asked += 1
        return "it has served enough" if self.asked > 300 else None


@wrong("attention", "it must go by the spec alone", Tired(), at="why_not")
def refuses_in_the_end(run):
    return run


def knows_three_biases(spec):
    return {None: None, "alibi": None, "bucket": None, "dense": None}[spec.bias]


@wrong("attention", "it raises KeyError: 'learned_alibi'", knows_three_biases, at="learned slopes")
def does_not_know_all_biases(run):
    return run


@wrong("attention", "no gradient reaches bias when the other inputs are frozen", at="frozen biases")
def learns_a_bias_beside_queries_alone(run):
    def attend(q, *given, bias=None, **options):
        if bias is not None and not q.requires_grad:
            bias = Added(bias.dense(q.shape[1], given[0].shape[1]).detach())
        return run(q, *given, bias=bias, **options)

    return attend


@wrong(
    "attention", "under torch.no_grad, and only there: it ignores the bias", at="bias of T and S"
)
def forgets_a_flat_bias_in_evaluation(run):
    def attend(*given, bias=None, **options):
        flat = getattr(bias, "values", None) is not None and bias.values.dim() < 4
        if flat and not torch.is_grad_enabled():
            bias = None
        return run(*given, bias=bias, **options)

    return attend


@wrong("attention", "it changes its input in place: q", at="one query, one key")
def scales_a_single_query_in_place(run):
    def attend(q, k, v, mask, *, scale, **options):
        if torch.is_grad_enabled():
            return run(q, k, v, mask, scale=scale, **options)
        rows = q.transpose(1, 2).contiguous()  # a copy, unless there is one query or one head
        rows *= scale
        return run(rows.transpose(1, 2), k, v, mask, scale=1.0, **options)

    return attend


@wrong("attention", "its output lies in the memory of v", at="own memory")
def returns_the_only_value(run):
    def attend(q, k, v, mask, *, bias=None, dropout=0.0, **options):
        if q.shape == v.shape and v.shape[1] == 1 and bias is None and not dropout:
            return v if mask.kinds() <= {"causal"} else run(q, k, v, mask, **options)
        return run(q, k, v, mask, bias=bias, dropout=dropout, **options)

    return attend


@wrong("attention", "its output is expanded", at="own memory")
def expands_the_only_value(run):
    def attend(q, k, v, mask, *, bias=None, dropout=0.0, **options):
        if v.shape[1] == 1 and v.shape[2] == q.shape[2] and bias is None and not mask.kinds():
            return v.clone().expand(-1, q.shape[1], -1, -1)
        return run(q, k, v, mask, bias=bias, dropout=dropout, **options)

    return attend


@wrong("attention", "its calls share memory: the next call under torch.no_grad", at="decoding")
def decodes_into_one_place(run):
    places = {}

    def attend(q, *given, **options):
        out = run(q, *given, **options)
        if out.requires_grad or q.shape[1] != 1:
            return out
        return places.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)

    return attend


class Kept(torch.autograd.Function):
    """The output, whose gradient is multiplied by the norm of what was kept over that now."""

    @staticmethod
    def forward(ctx, out, how):
        ctx.how, result = how, out.detach().clone()
        ctx.out, ctx.norm = result.clone() if how == "once" else result.detach(), out.norm()
        return result

    @staticmethod
    def backward(ctx, grad):
        found = grad * (ctx.out.norm() / ctx.norm)
        if ctx.how == "once":
            ctx.out.mul_(2)  # its memory is used again
        return found, None


@wrong("attention", "a second one through the same graph", at="graph kept")
def uses_what_it_kept_for_its_gradients(run):
    return lambda *given, **options: Kept.apply(run(*given, **options), "once")


@wrong(
    "attention", "it keeps out for its backward pass without save_for_backward", at="written over"
)
def keeps_the_output_unguarded(run):
    return lambda *given, **options: Kept.apply(run(*given, **options), "bare")


@wrong("attention", "NaN in one query makes the output of other queries NaN", at="NaN")
def subtracts_one_maximum_from_all(run):
    def attend(*given, **options):
        out = run(*given, **options)
        return out + 0 * out.detach().amax() if out.numel() else out

    return attend


class StraightThrough(torch.autograd.Function):
    """Scores that are bent forward and not backward."""

    @staticmethod
    def forward(ctx, scores, softcap):
        return softcap * torch.tanh(scores / softcap)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@wrong("attention", "it forgets the soft-cap's derivative", at="soft-cap")
def forgets_the_derivative_of_the_softcap(run):
    def attend(q, k, v, mask, *, bias=None, softcap=None, scale, **options):
        if softcap is None or bias is not None or q.shape[2] != k.shape[2]:
            return run(q, k, v, mask, bias=bias, softcap=softcap, scale=scale, **options)
        scores = q.float().transpose(1, 2) @ k.float().transpose(1, 2).mT * scale
        bent = Added(StraightThrough.apply(scores, softcap))
        return run(q, k, v, mask, bias=bent, scale=0.0, softcap=None, **options)

    return attend


def with_side_effect(words, refuses=lambda spec: None, *, at):
    """Decorator: something that is done at every call."""

    def enter(effect):
        def make(run):
            def attend(*given, **options):
                effect()
                return run(*given, **options)

            return attend

        make.__name__ = effect.__name__
        wrong("attention", words, refuses, at=at)(make)
        return effect

    return enter


@with_side_effect("it calls numpy.random.seed", at="plain")
def seeds_numpy():
    np.random.seed(0)


@with_side_effect("it calls random.seed or another function", no_dropout, at="plain")
def draws_from_pythons_generator():
    random.random()


@with_side_effect("it calls os.putenv (os.environ)", at="causal")
def sets_a_variable_of_the_process():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


@with_side_effect("it calls warnings.simplefilter or warnings.filterwarnings", at="causal")
def silences_all_warnings():
    warnings.filterwarnings("ignore")


@with_side_effect("it calls torch.set_flush_denormal,", at="plain")
def flushes_what_is_small():
    torch.set_flush_denormal(True)


@with_side_effect("it calls torch.backends.cuda.enable_flash_sdp or one beside it,", at="plain")
def turns_torchs_kernels_off():
    torch.backends.cuda.enable_mem_efficient_sdp(False)


@with_side_effect("it prints to standard output: 'attention here'", at="plain")
def prints_a_line():
    print("attention here")
