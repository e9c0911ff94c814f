"""Kernels that give the right numbers in a plain training step and are wrong beside it, each with
the words that must name its fault."""

from __future__ import annotations

import torch

from tests.kernel_tools.outsider import wrong


class Changed(torch.autograd.Function):
    """A gate that does something else besides, forward or backward."""

    @staticmethod
    def forward(ctx, run, keep, finish, x):
        ctx.run, ctx.finish, ctx.kept = run, finish, keep(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.kept.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.run(x), x, grad.clone())
        ctx.finish(grad)
        return None, None, None, found


def always_in(places, x):
    """x's numbers, in the one place that is kept for tensors of this shape."""
    return places.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(x)


@wrong(
    "glu",
    "its calls share memory: when another one is made before its backward pass, dgate_up",
    at="overlapping",
)
def has_one_place_for_what_the_backward_pass_needs(run):
    places = {}

    def glu(x, *, kind):
        return Changed.apply(
            lambda given: run(given, kind=kind),
            lambda given: always_in(places, given.detach()),
            lambda grad: None,
            x,
        )

    return glu


@wrong(
    "rotary",
    "its calls share memory: when another one is made before its backward pass, out is",
    at="overlapping",
)
def hands_out_the_same_memory_each_time(run):
    places = {}
    return lambda *given: SamePlace.apply(run(*given), places)


class SamePlace(torch.autograd.Function):
    """Its input, in the one place that is kept for tensors of this shape."""

    @staticmethod
    def forward(ctx, x, places):
        return always_in(places, x).data  # as a kernel writes it, unseen by autograd

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@wrong("glu", "its backward pass changes the incoming gradient in place", at="unchanged")
def halves_the_incoming_gradient_in_place(run):
    def glu(x, *, kind):
        return Changed.apply(
            lambda given: run(given, kind=kind), lambda given: given, lambda grad: grad.mul_(0.5), x
        )

    return glu


@wrong("norm", "it raises ValueError: too many values to unpack")
def knows_rows_and_columns_only(run):
    def norm(x, *given, **options):
        _n_rows, _width = x.shape
        return run(x, *given, **options)

    return norm


@wrong("symmetric_product", "it raises ValueError: not enough values to unpack")
def knows_batches_only(run):
    def product(x):
        _n_batches, _n_rows, _n_columns = x.shape
        return run(x)

    return product


@wrong(
    "linear_cross_entropy",
    "outside the vocabulary of 127, leaves its loss, nll, grad",
    at="outside",
)
def takes_the_nearest_class(run):
    def loss(hidden, weight, bias, targets, **options):
        near = targets.clamp(0, len(weight) - 1).where(targets != -100, -100)
        return run(hidden, weight, bias, near, **options)

    return loss


@wrong("linear_cross_entropy", "its loss is NaN or infinite where it should not be")
def divides_by_the_number_of_targets(run):
    def loss(hidden, weight, bias, targets, **options):
        found, n_targets = run(hidden, weight, bias, targets, **options), (targets != -100).sum()
        return found._replace(loss=found.loss / n_targets * n_targets) if len(hidden) else found

    return loss


@wrong("linear", "it calls torch.set_float32_matmul_precision")
def sets_the_precision_of_all_products(run):
    def linear(*given):
        torch.set_float32_matmul_precision("high")
        return run(*given)

    return linear


@wrong("rotary", "it raises SystemExit")
def leaves_the_process(run):
    def rotary(*given):
        raise SystemExit(0)

    return rotary
