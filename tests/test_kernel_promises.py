"""What `why_not` says and what `run` does: what a kernel says it serves, it serves."""

import dataclasses

import pytest
import torch

from nanolm.ops.bias import AlibiBias, BucketBias, DenseBias
from nanolm.ops.contract import AttentionSpec, SymmetricProductSpec, candidates
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.op_trials import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPECS = {
    "attention": AttentionSpec(n_heads=2, n_kv_heads=2, head_dim=16),
    "symmetric_product": SymmetricProductSpec(rows=64, columns=192),
}


@pytest.mark.parametrize(
    ("op", "name", "served"),
    [
        ("attention", "sdpa", FLOATS),
        ("attention", "triton", FLOATS),
        ("attention", "triton_tf32x3", FLOATS[:1]),
        ("attention", "flex", FLOATS[:3]),
        ("symmetric_product", "triton", FLOATS),
        ("symmetric_product", "triton_tf32x3", FLOATS[:1]),
    ],
)
def test_a_dtype_that_a_kernel_lacks_is_refused(op, name, served):
    specs = [dataclasses.replace(SPECS[op], device="cuda", dtype=dtype) for dtype in FLOATS]
    kernel = candidates(op)[name]
    assert [spec.dtype for spec in specs if kernel.why_not(spec) is None] == list(served)


def draw(*shape, seed=0):
    return normal(*shape, dtype=torch.float32, seed=seed, device=DEVICE)


def biases(n_queries):
    """One of each kind; what learns in a model is a parameter here, in inference too."""
    slopes, table, values = draw(2), draw(8, 2), draw(2, n_queries, 5)
    return {
        "alibi": AlibiBias(slopes.abs()),
        "learned_alibi": AlibiBias(torch.nn.Parameter(slopes)),
        "bucket": BucketBias(torch.nn.Parameter(table), False, 16),
        "dense": DenseBias(torch.nn.Parameter(values)),
    }


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
@pytest.mark.parametrize("name", ["sdpa", "triton", "triton_decode"])
def test_a_bias_that_a_kernel_says_it_serves_it_adds(name, phase):
    n_queries = 1 if phase == "decode" else 5
    given = draw(1, n_queries, 2, 16), draw(1, 5, 2, 16, seed=1), draw(1, 5, 2, 16, seed=2)
    kernels = candidates("attention")
    for kind, bias in biases(n_queries).items():
        spec = dataclasses.replace(SPECS["attention"], device=DEVICE, phase=phase, bias=kind)
        if kernels[name].why_not(spec) is None:
            with torch.set_grad_enabled(phase == "train"):
                found, right = (
                    kernels[kernel].run(*given, Mask(causal=True), bias=bias, scale=0.25)
                    for kernel in (name, "reference")
                )
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
