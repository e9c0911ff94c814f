"""Kernels that give the right output and a wrong gradient, or keep and write what they must not in
their backward pass; each with the words that must name its fault."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanolm.ops.reference import CrossEntropyOutput
from tests.kernel_tools.outsider import wrong


def with_gradient_of(value, other):
    """The numbers of one tensor with the gradient of another."""
    return other + (value - other).detach()


def loss_with_gradient_of(run, other):
    """The right loss with the gradient of `other`, a loss of the same arguments."""

    def loss(*given, **options):
        found = run(*given, **options)
        return found._replace(loss=with_gradient_of(found.loss, other(*given, **options)))

    return loss


@wrong("linear_cross_entropy", "its gradient lacks that of z_loss")
def forgets_z_loss_in_the_gradient(run):
    return loss_with_gradient_of(run, lambda *given, **o: run(*given, **(o | {"z_loss": 0.0})).loss)


@wrong("linear_cross_entropy", "its gradient lacks the slope of the soft-cap")
def forgets_the_slope_of_the_softcap(run):
    def flat(hidden, weight, bias, targets, *, softcap, **options):
        if softcap is None:
            return run(hidden, weight, bias, targets, softcap=None, **options).loss
        logits = F.linear(hidden, weight, bias).float()
        logits = with_gradient_of(softcap * torch.tanh(logits / softcap), logits)
        return run(logits, torch.eye(len(weight)), None, targets, **options).loss

    return loss_with_gradient_of(run, flat)


class Unscaled(torch.autograd.Function):
    """A gradient of one, whatever comes in."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones_like(grad)


@wrong("linear_cross_entropy", "it ignores the gradient that comes in for its loss")
def ignores_the_incoming_gradient(run):
    def loss(*given, **options):
        found = run(*given, **options)
        return found._replace(loss=Unscaled.apply(found.loss))

    return loss


@wrong("linear_cross_entropy", "its gradient of the bias counts tokens whose target is -100")
def counts_ignored_tokens_for_the_bias(run):
    def counted(hidden, weight, bias, targets, **options):
        if bias is None:
            return run(hidden, weight, bias, targets, **options).loss
        every = run(hidden.detach(), weight.detach(), bias, targets.clamp(min=0), **options).loss
        return run(hidden, weight, bias.detach(), targets, **options).loss + every

    return loss_with_gradient_of(run, counted)


class KeptOnce(torch.autograd.Function):
    """A loss whose gradients, made in the forward pass, are scaled where they are kept."""

    @staticmethod
    def forward(ctx, run, options, targets, *leaves):
        with torch.enable_grad():
            again = [x if x is None else x.detach().requires_grad_() for x in leaves]
            found = run(*again, targets, **options)
            wanted = [x for x in again if x is not None]
            ctx.grads = list(torch.autograd.grad(found.loss, wanted))
        ctx.mark_non_differentiable(*found[1:])
        return tuple(x.detach() for x in found)

    @staticmethod
    def backward(ctx, grad, *_):
        for x in ctx.grads:
            x.mul_(grad)
        return None, None, None, *ctx.grads, *[None] * (3 - len(ctx.grads))


@wrong("linear_cross_entropy", "when it is taken again (retain_graph=True)", at="twice")
def scales_its_gradients_where_it_keeps_them(run):
    def loss(hidden, weight, bias, targets, **options):
        if not any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
            return run(hidden, weight, bias, targets, **options)
        return CrossEntropyOutput(*KeptOnce.apply(run, options, targets, hidden, weight, bias))

    return loss


@wrong("glu", "its slope of the activation lacks a term")
def takes_the_activation_for_a_factor(run):
    def glu(gate_up, *, kind):
        gate, up = gate_up.chunk(2, dim=-1)
        cdf = gate.sigmoid() if kind == "swiglu" else 0.5 * (1 + torch.erf(gate / 2**0.5))
        return with_gradient_of(run(gate_up, kind=kind), gate * cdf.detach() * up)

    return glu


@wrong("rotary", "its backward pass rotates forward again; it turns back by -sin")
def rotates_forward_twice(run):
    return lambda x, cos, sin: with_gradient_of(run(x, cos, sin), run(x, cos, -sin))


@wrong("rotary", "no gradient reaches the features that are not rotated")
def drops_the_gradient_of_the_rest(run):
    def rotary(x, cos, sin):
        n = 2 * cos.shape[-1]
        return run(torch.cat([x[..., :n], x[..., n:].detach()], dim=-1), cos, sin)

    return rotary


@wrong("symmetric_product", "its gradient is 2 g x; (g + g^T) x is due")
def takes_the_incoming_gradient_for_symmetric(run):
    return lambda x: with_gradient_of(run(x), 2 * (x @ x.mT.detach()))


@wrong("norm", "its gradient lacks what comes in through its second output")
def forgets_the_gradient_of_the_sum(run):
    def norm(*given, **options):
        out, total = run(*given, **options)
        return out, total.detach() if total.is_leaf else with_gradient_of(total, 0 * total)

    return norm


@wrong("norm", "its numbers have been rounded to bfloat16")
def rounds_the_gradient_of_the_stream(run):
    def norm(x, *given, residual=None, **options):
        if residual is None or not residual.requires_grad or x.dtype == residual.dtype:
            return run(x, *given, residual=residual, **options)
        return run(x, *given, residual=RoundedGradient.apply(residual, x.dtype), **options)

    return norm


class RoundedGradient(torch.autograd.Function):
    """Its input, whose gradient has passed through another dtype."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


class OfTrainedWeights(torch.autograd.Function):
    """A bias that learns where the weight does."""

    @staticmethod
    def forward(ctx, bias, weight):
        return bias.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad, None) if ctx.needs_input_grad[1] else (None, None)


@wrong("norm", "no gradient reaches bias when the other inputs are frozen", at="frozen")
def trains_no_bias_beside_a_frozen_weight(run):
    def norm(x, weight, bias, **options):
        bias = None if bias is None else OfTrainedWeights.apply(bias, weight)
        return run(x, weight, bias, **options)

    return norm


class AddsItself(torch.autograd.Function):
    """A weight whose gradient goes into its .grad where there is one, as a fused backward pass of
    large models does."""

    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.weight.grad is None:
            return grad
        ctx.weight.grad += grad
        return None


@wrong("linear", "it writes into the .grad of weight by itself", at="accumulated")
def adds_to_the_gradient_by_itself(run):
    def linear(x, weight, bias):
        return run(x, AddsItself.apply(weight) if weight.requires_grad else weight, bias)

    return linear


class KeepsItsOutput(torch.autograd.Function):
    """A gate that keeps its output as an attribute: the output's graph holds the output."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run, ctx.x = run, x.detach()
        ctx.out = run(x)
        return ctx.out

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            return None, torch.autograd.grad(ctx.run(x), x, grad)[0]


@wrong("glu", "in a circle of references", at="released")
def keeps_its_output_on_ctx(run):
    return lambda x, *, kind: KeepsItsOutput.apply(lambda given: run(given, kind=kind), x)
