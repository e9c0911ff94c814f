"""The Triton kernels of norm, rotary, glu, cross-entropy and x x^T against their references, and
every kernel with the dtypes that autocast and FSDP mix."""

import contextlib
import functools

import pytest
import torch

from nanolm.ops.contract import candidates
from nanolm.registry import KERNELS, OPS
from nanolm.tools.kernel_check.attention_cases import MIXED as MIXED_ATTENTION
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.op_suites import MIXED, op_trials
from nanolm.tools.kernel_check.sanitizer import sanitized
from nanolm.tools.kernel_check.trial import excess, execute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = ("norm", "rotary", "glu", "linear_cross_entropy", "symmetric_product")


def watched():
    """The sanitizer, where kernels are interpreted."""
    return sanitized() if DEVICE == "cpu" else contextlib.nullcontext()


@functools.cache
def triton_kernel(op):
    candidates(op)
    return KERNELS[op].get("triton").build()


def check(kernel, trial):
    """Outputs have the dtype that the contract names; they and the gradients are right."""
    found = execute(trial, kernel, backward=trial.differentiable)
    dtypes = {name: x.dtype for name, x in found.outputs.items()}
    due = trial.dtypes or dict.fromkeys(dtypes, torch.float64) | {"correct": torch.float32}
    assert dtypes == due, trial.name
    off = excess(trial, found)
    assert max(off.values()) < 1, (trial.name, off)


@pytest.mark.parametrize("op", TRITON)
def test_kernel_equals_the_reference(op):
    kernel = triton_kernel(op)
    for trial in op_trials(op, DEVICE):
        assert kernel.why_not(trial.spec) is None
        with watched():
            check(kernel, trial)


def drawn(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


NO_TARGETS = torch.zeros(0, dtype=torch.int64, device=DEVICE)
NOTHING = {
    "norm": ([(0, 24), (24,), (24,)], lambda run, *x: run(*x, kind="layernorm", eps=1e-5)[0]),
    "rotary": ([(2, 0, 2, 16)], lambda run, x: run(x, *torch.ones(2, 1, 0, 6, device=DEVICE))),
    "glu": ([(0, 24)], lambda run, x: run(x, kind="swiglu")),
    "linear_cross_entropy": ([(0, 6), (31, 6), (31,)], lambda run, *x: run(*x, NO_TARGETS).loss),
    "symmetric_product": ([(0, 5, 7)], lambda run, x: run(x)),
}
"""Shapes of leaves without rows, tokens or matrices, and what is made of them."""


@pytest.mark.parametrize("op", TRITON)
def test_of_nothing_outputs_and_gradients_are_zero(op):
    """A sum of no terms, as the gradient of a weight, is written too: new memory is NaN here."""
    shapes, function = NOTHING[op]
    leaves = [drawn(*shape) for shape in shapes]
    torch.use_deterministic_algorithms(True)  # fills new memory
    try:
        out = function(triton_kernel(op).run, *leaves)
        gradients = torch.autograd.grad(out.sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all((x == 0).all() for x in (out, *gradients))


def mixed_trials(op):
    if op == "attention":
        return [trial_of(case, DEVICE) for case in MIXED_ATTENTION.values()]
    return MIXED[op](DEVICE)


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_takes_the_dtypes_that_autocast_and_fsdp_mix(op):
    """The stream of a post-norm layer stays float32 beside 16-bit activations, and a float32 bias
    of 16-bit queries is not rounded: for every kernel that serves, not the Triton ones alone."""
    served = 0
    for kernel in candidates(op).values():
        for trial in mixed_trials(op):
            if kernel.why_not(trial.spec) is None:
                check(kernel, trial)
                served += 1
    assert served >= 2


def test_rows_of_norm_trials_are_of_the_size_of_eps():
    for trial in op_trials("norm"):
        if "of size" in trial.name:
            assert 1e-6 < trial.leaves["x"].float().square().mean() < 1e-4
    assert sum("of size" in trial.name for trial in op_trials("norm")) >= 6
