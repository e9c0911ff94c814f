"""Kernels that serve one kind of layer only and are wrong on it, each with the words that must name
its fault: what they refuse is left out of the problems, and the rest is asked."""

from __future__ import annotations

import dataclasses

import torch

from nanolm.tools.kernel_check.op_narrowing import SIZES
from tests.kernel_tools.outsider import wrong


def rmsnorm_alone(spec):
    return None if spec.kind == "rmsnorm" and not spec.bias else "it is an RMSNorm"


def forward_alone(spec):
    return "it has no backward pass" if spec.phase == "train" else None


def bfloat16_alone(spec):
    return None if spec.dtype == torch.bfloat16 else "it has tiles of bfloat16"


def float16_alone(spec):
    return None if spec.dtype == torch.float16 else "it has tiles of float16"


def geglu_alone(spec):
    return None if spec.kind == "geglu" else "it has one gate"


def plain_losses_with_z(spec):
    return "it has neither" if spec.softcap is not None or spec.label_smoothing else None


def whole_blocks(spec):
    sizes = [getattr(spec, field) for field in SIZES[type(spec).__name__]]
    return None if all(size % 128 == 0 for size in sizes) else "it has blocks of 128"


@wrong("norm", "(without a bias, as RMSNorm)", rmsnorm_alone)
def norms_its_first_1024_columns(run):
    def norm(x, weight, bias, *, residual=None, **options):
        out, total = run(x, weight, bias, residual=residual, **options)
        return torch.cat([out[..., :1024], total[..., 1024:]], dim=-1), total

    return norm


@wrong("norm", "(forward only)", forward_alone, at="layernorm 300x8 bias residual torch.float32")
def serves_256_rows(run):
    def norm(x, *given, **options):
        out, total = run(x, *given, **options)
        return out * (torch.arange(len(out)) < 256)[:, None] if out.dim() == 2 else out, total

    return norm


@wrong("norm", "it adds up in fewer bits than float32 has", bfloat16_alone, at="sums")
def adds_bfloat16_up_in_bfloat16(run):
    """Of the weight and the bias, by rows of which each is repeated."""

    def norm(x, weight, bias, **options):
        rows = x.flatten(0, -2)
        each = [run(row, weight, bias, **options | {"residual": None})[0] for row in rows]
        if options.get("residual") is not None or len(rows) == 0:
            return run(x, weight, bias, **options)
        return torch.stack(each).view_as(x), x * 1

    return norm


@wrong("glu", "(as GEGLU)", geglu_alone)
def gates_4096_columns(run):
    def glu(gate_up, *, kind):
        out = run(gate_up, kind=kind)
        return out * (torch.arange(out.shape[-1]) < 4096)

    return glu


@wrong("linear_cross_entropy", "it ignores z_loss", plain_losses_with_z)
def has_no_z_loss_beside_a_bias(run):
    def loss(hidden, weight, bias, targets, *, z_loss=0.0, **options):
        z_loss = z_loss if bias is None else 0.0
        return run(hidden, weight, bias, targets, z_loss=z_loss, **options)

    return loss


@wrong("linear", "(in float16)", float16_alone)
def adds_a_bias_to_256_columns(run):
    def linear(x, weight, bias):
        if bias is None:
            return run(x, weight, None)
        return run(x, weight, bias * (torch.arange(len(bias)) < 256))

    return linear


@wrong("rotary", "it changes its input in place", forward_alone)
def turns_in_place(run):
    def rotary(x, cos, sin):
        with torch.no_grad():
            return x.copy_(run(x, cos, sin)) if not x.requires_grad else run(x, cos, sin)

    return rotary


@wrong("symmetric_product", "(forward only)", forward_alone)
def leaves_the_second_tile_out(run):
    return lambda x: run(x) * (torch.arange(x.shape[-2]) < 128)


ASKED = []


def forward_alone_and_notes(spec):
    ASKED.append(spec.vocab_size)
    return forward_alone(spec)


@wrong(
    "linear_cross_entropy",
    "its run goes by the spec that why_not was asked about last",
    forward_alone_and_notes,
    at="answers",
)
def evaluates_as_many_classes_as_it_was_asked_about(run):
    def loss(hidden, weight, bias, targets, **options):
        known = weight * (torch.arange(len(weight)) < ASKED[-1])[:, None]
        return run(hidden, known, bias, targets, **options)

    return loss


def heads_of_64_or_128(spec):
    return None if spec.head_dim in (64, 128) else "it has tiles of 64 and 128 columns"


def causal_bfloat16(spec):
    fits = spec.causal and spec.dtype == torch.bfloat16
    return heads_of_64_or_128(spec) if fits else "it is a GPT's"


def as_many_key_heads(spec):
    return None if spec.n_heads == spec.n_kv_heads else "each head has keys of its own"


@wrong("attention", "without (in heads of 64)", heads_of_64_or_128,
       at="lengths")  # fmt: skip
def has_no_padding_in_wide_heads(run):
    return lambda q, k, v, mask, **options: run(
        q, k, v, dataclasses.replace(mask, key_lengths=None), **options
    )


@wrong("attention", "(in bfloat16, in heads of 64, causal)", causal_bfloat16, at="documents")
def packs_two_documents_at_most(run):
    def attention(q, k, v, mask, **options):
        if mask.documents is not None:
            mask = dataclasses.replace(
                mask, documents=mask.documents.clamp(max=1),
                key_documents=None if mask.key_documents is None else
                mask.key_documents.clamp(max=1),
            )  # fmt: skip
        return run(q, k, v, mask, **options)

    return attention


@wrong("attention", "(without groups of heads)", as_many_key_heads, at="one query, padded cache")
def reads_a_padded_cache_to_its_end(run):
    def attention(q, k, v, mask, **options):
        if q.shape[1] == 1 < k.shape[1] and mask.window is None and options.get("bias") is None:
            mask = dataclasses.replace(mask, key_lengths=None)
        return run(q, k, v, mask, **options)

    return attention


@wrong(
    "norm", "(at multiples of 128)", whole_blocks, at="layernorm 1x5000 bias residual torch.float32"
)
def norms_its_first_4096_columns(run):
    def norm(x, weight, bias, **options):
        out, total = run(x, weight, bias, **options)
        return torch.cat([out[..., :4096], total[..., 4096:]], dim=-1), total

    return norm


@wrong("linear_cross_entropy", "it ignores label_smoothing", whole_blocks)
def does_not_smooth_whole_blocks(run):
    return lambda *given, label_smoothing=0.0, **options: run(*given, **options)


@wrong("glu", "(at multiples of 128)", whole_blocks)
def gates_128_rows(run):
    def glu(gate_up, *, kind):
        out = run(gate_up, kind=kind)
        return out * (torch.arange(out.shape[-2]) < 128)[:, None]

    return glu
