"""The Triton kernels of norm, rotary, glu, cross-entropy and x x^T against their references."""

import functools

import pytest
import torch

from nanolm.ops.contract import KERNELS, candidates
from nanolm.tools.kernel_check.op_trials import op_trials
from nanolm.tools.kernel_check.sanitizer import sanitized
from nanolm.tools.kernel_check.trial import TOLERANCE, errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("norm", "rotary", "glu", "linear_cross_entropy", "symmetric_product")


@functools.cache
def triton_kernel(op):
    candidates(op)
    return KERNELS[op].get("triton").build()


@pytest.mark.parametrize("op", OPS)
def test_kernel_equals_the_reference(op):
    kernel = triton_kernel(op)
    for trial in op_trials(op, DEVICE):
        assert kernel.why_not(trial.spec) is None
        if DEVICE == "cpu":
            with sanitized():
                found = errors(trial, kernel)
        else:
            found = errors(trial, kernel)
        assert max(found.values()) < TOLERANCE[trial.spec.dtype], (trial.name, found)
