"""Norms, losses, products and the like as outsiders get them wrong, each with the words that must
name its fault."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.kernel_tools.outsider import wrong


@wrong("norm", "after a call with other numbers of these shapes", at="other numbers")
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


@wrong("norm", "under torch.no_grad its out is wrong", at="evaluation")
def forgets_the_bias_where_nothing_trains(run):
    def norm(x, weight, bias, **options):
        trains = torch.is_grad_enabled() and x.requires_grad
        return run(x, weight if trains else weight * 0 + 1, bias, **options)

    return norm


@wrong(
    "linear",
    "after its inputs were given other numbers in place: its out is off by",
    at="other numbers",
)
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


@wrong("glu", "it keeps gate_up, out after the call: memory grows with every step", at="released")
def keeps_every_call(run):
    log = []

    def glu(gate_up, *, kind):
        log.append((gate_up, run(gate_up, kind=kind)))
        return log[-1][1]

    return glu


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


@wrong("norm", "no gradient reaches x when the other inputs are frozen", at="frozen")
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


@wrong("rotary", "it reads an incoming gradient as if that were contiguous", at="layout")
def takes_the_incoming_gradient_for_contiguous(run):
    return lambda *given: Packed.apply(run(*given))


@wrong("linear_cross_entropy", "it raises")
def cannot_bear_a_batch_without_tokens(run):
    def loss(hidden, *given, **options):
        if not len(hidden):
            raise IndexError("a grid of no programs")
        return run(hidden, *given, **options)

    return loss
