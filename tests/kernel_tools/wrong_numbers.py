"""Kernels whose numbers are right in most places: formulas that fail at large numbers, sums in 16
bits, layouts that are guessed, loops that end too early; each with the words that must name its
fault."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.kernel_tools.outsider import wrong


def norm_by(change):
    """A norm whose `change(y, eps)` is what its rows are divided by, squared."""

    def norm(x, weight, bias, *, kind, eps, residual=None):
        total = x if residual is None else x + residual
        y = total.to(torch.promote_types(total.dtype, torch.float32))
        mean = y.mean(-1, keepdim=True) if kind == "layernorm" else 0.0
        out = (y - mean) * change(y, mean, eps).rsqrt() * weight
        return (out if bias is None else out + bias).to(total.dtype), total

    return norm


def mean_square(y):
    return y.square().mean(-1, keepdim=True)


@wrong("norm", "mean(x^2) - mean(x)^2 cancels where the mean is large beside the spread")
def takes_the_variance_in_one_pass(run):
    def variance(y, mean, eps):
        return mean_square(y) - mean * mean + eps

    return norm_by(variance)


@wrong("norm", "it squares in float16")
def squares_in_the_dtype_of_x(run):
    right = norm_by(lambda y, mean, eps: mean_square(y - mean) + eps)
    half = norm_by(lambda y, mean, eps: mean_square((y - mean).half()).to(y.dtype) + eps)
    return lambda x, *given, **o: (half if x.dtype == torch.float16 else right)(x, *given, **o)


@wrong("norm", "it takes the larger of variance and eps; their sum is due")
def takes_the_larger_of_variance_and_eps(run):
    return norm_by(lambda y, mean, eps: mean_square(y - mean).clamp(min=eps))


@wrong("norm", "it divides by D - 1; the variance is over D")
def divides_by_one_less(run):
    return norm_by(lambda y, mean, eps: (y - mean).square().sum(-1, True) / (y.shape[-1] - 1) + eps)


@wrong(
    "norm",
    "after a call of these shapes with other options: it takes an eps of its own, 1e-05",
    at="other options 0",
)
def is_compiled_for_the_first_eps(run):
    first = {}
    return lambda x, *given, eps, **o: run(
        x, *given, eps=first.setdefault((o["kind"], x.shape[-1]), eps), **o
    )


class SummedIn16Bits(torch.autograd.Function):
    """A parameter for each of some blocks of rows, whose gradients are added in its own dtype."""

    @staticmethod
    def forward(ctx, parameter, n_blocks):
        return parameter.expand(n_blocks, *parameter.shape).clone()

    @staticmethod
    def backward(ctx, grads):
        total = torch.zeros_like(grads[0])
        for grad in grads:
            total += grad
        return total, None


def by_blocks(run, x, weight, bias, size):
    """A linear layer block of rows by block of rows."""
    rows = x.reshape(-1, x.shape[-1])
    blocks = rows.split(size) if len(rows) else (rows,)
    weights = SummedIn16Bits.apply(weight, len(blocks))
    out = torch.cat([run(block, w, bias) for block, w in zip(blocks, weights, strict=True)])
    return out.view(*x.shape[:-1], -1)


@wrong(
    "linear",
    "it adds up in fewer bits than float32 has: right on few terms, wrong on 4096",
    at="sums",
)
def adds_up_the_weight_gradient_in_16_bits(run):
    return lambda x, weight, bias: by_blocks(run, x, weight, bias, 64)


@wrong("symmetric_product", "it adds up in fewer bits than float32 has", at="sums")
def adds_up_blocks_of_columns_in_16_bits(run):
    def product(x):
        total = None
        for block in x.split(64, dim=-1):
            total = run(block) if total is None else total + run(block)
        return total

    return product


@wrong("rotary", "it rounds cos and sin to")
def rounds_the_angles(run):
    return lambda x, cos, sin: run(x, cos.to(x.dtype), sin.to(x.dtype))


@wrong("rotary", "it takes heads for tokens where there are as many of both")
def guesses_the_layout(run):
    def rotary(x, cos, sin):
        if x.shape[1] != x.shape[2]:
            return run(x, cos, sin)
        return run(x.transpose(1, 2), cos, sin).transpose(1, 2)

    return rotary


@wrong("rotary", "it reads cos and sin as if they were contiguous")
def takes_the_angles_for_contiguous(run):
    def packed(x):
        return x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))

    return lambda x, cos, sin: run(x, packed(cos), packed(sin))


@wrong("rotary", "it is wrong along axis 1 of 4097 only from 2048 on", at="long")
def has_a_grid_of_2048_tokens(run):
    def rotary(x, cos, sin):
        return torch.cat([run(x[:, :2048], cos[:, :2048], sin[:, :2048]), x[:, 2048:]], dim=1)

    return rotary


@wrong("glu", "exp overflows at gates of hundreds")
def divides_exp_by_exp(run):
    def glu(gate_up, *, kind):
        gate, up = gate_up.chunk(2, dim=-1)
        if kind == "geglu":
            return run(gate_up, kind=kind)
        e = gate.float().exp()
        return gate * (e / (1 + e)).to(gate.dtype) * up

    return glu


@wrong("glu", "it is wrong along axis 1 of 127 only from 120 on")
def takes_eight_columns_at_a_time(run):
    def glu(gate_up, *, kind):
        out = run(gate_up, kind=kind)
        whole = out.shape[-1] // 8 * 8
        return torch.cat([out[..., :whole], 0 * out[..., whole:]], dim=-1) if whole else out

    return glu


class OutputOverUp(torch.autograd.Function):
    """SwiGLU that gets its activation back from what it gave."""

    @staticmethod
    def forward(ctx, gate, up):
        out = F.silu(gate) * up
        ctx.save_for_backward(gate, up, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up, out = ctx.saved_tensors
        s = gate.sigmoid()
        return grad * up * s * (1 + gate * (1 - s)), grad * (out / up)


@wrong("glu", "its backward pass gives NaN: in the gradient of gate_up")
def divides_its_output_by_a_factor(run):
    def glu(gate_up, *, kind):
        if kind == "geglu":
            return run(gate_up, kind=kind)
        wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
        return OutputOverUp.apply(*wide.chunk(2, dim=-1)).to(gate_up.dtype)

    return glu


@wrong("linear_cross_entropy", "exp overflows at logits of hundreds unless their largest")
def takes_exp_of_the_logits_as_they_are(run):
    def loss(hidden, weight, bias, targets, **options):
        found = run(hidden, weight, bias, targets, **options)
        with torch.no_grad():
            logits = F.linear(hidden, weight, bias).float()
            total = logits.exp().sum(dim=-1)
        return found._replace(loss=found.loss + (total - total).sum())

    return loss


@wrong("linear_cross_entropy", "it smooths over the V - 1 other classes; all V are due")
def smooths_over_the_other_classes(run):
    def loss(hidden, weight, *given, label_smoothing=0.0, **options):
        more = label_smoothing * len(weight) / (len(weight) - 1)
        return run(hidden, weight, *given, label_smoothing=more, **options)

    return loss


@wrong("linear_cross_entropy", "its lse is that of ignored tokens too")
def gives_every_token_its_lse(run):
    def loss(hidden, weight, bias, targets, **options):
        found = run(hidden, weight, bias, targets, **options)
        counted = run(hidden, weight, bias, targets.clamp(min=0), **options)
        return found._replace(lse=counted.lse)

    return loss


@wrong(
    "linear_cross_entropy", "classes right: one is the argmax, and an untrained model", at="ties"
)
def calls_a_class_right_that_none_exceeds(run):
    def loss(hidden, weight, bias, targets, **options):
        found = run(hidden, weight, bias, targets, **options)
        with torch.no_grad():
            logits = F.linear(hidden, weight, bias)
            classes = targets.clamp(0, len(weight) - 1)[:, None]
            best = logits.gather(1, classes)[:, 0] >= logits.amax(dim=-1)
            tied = (logits == logits.amax(dim=-1, keepdim=True)).sum(dim=-1) > 1
        kept = best & tied & (targets != -100)
        return found._replace(correct=torch.where(kept, 1.0, found.correct))

    return loss
