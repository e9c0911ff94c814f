"""bf16 products taken in float32 against autocast's own, and against float32."""

import pytest
import torch

from nanolm.ops import cpu_bf16
from nanolm.ops.chunked_cross_entropy import ChunkedCrossEntropy
from nanolm.ops.contract import AttentionSpec, CrossEntropySpec, LinearSpec, choose
from nanolm.ops.cpu_bf16 import WideAttention, WideCrossEntropy, WideLinearKernel
from nanolm.ops.masks import Mask
from nanolm.ops.pytorch import SdpaAttention
from nanolm.ops.reference import ReferenceLinear

BF16 = torch.bfloat16
ATTENTION = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
CASES = {
    "linear": (LinearSpec, {}, "wide", "reference"),
    "attention": (AttentionSpec, ATTENTION, "wide", "sdpa"),
    "linear_cross_entropy": (CrossEntropySpec, {"width": 8, "vocab_size": 9}, "wide", "chunked"),
}


@pytest.mark.parametrize("op", CASES)
def test_chosen_only_for_bf16_on_a_cpu_that_lacks_it(op, monkeypatch):
    spec, options, wide, usual = CASES[op]
    for native, dtype, name in (
        (False, BF16, wide),
        (True, BF16, usual),
        (False, torch.float32, usual),
    ):
        monkeypatch.setattr(cpu_bf16, "multiplies_bf16", lambda native=native: native)
        assert choose(op, spec(dtype=dtype, **options)).kernel.name == name
    assert WideLinearKernel().why_not(LinearSpec(dtype=BF16, device="cuda"))


def both(wide, usual, inputs, autocast=True):
    """Outputs and gradients of two functions on the same inputs, each as a list."""
    results = []
    for function in (wide, usual):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            out = function(*leaves)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        results.append([out, *(x.grad for x in leaves)])
    return results


def close(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = b.float().abs().max()
        assert (a.float() - b.float()).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_autocasts_to_its_rounding(dtype, bias):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 32).to(dtype), torch.randn(16, 32)]
    inputs += [torch.randn(16)] if bias else []

    def of(kernel):
        return lambda x, w, b=None: kernel.run(x, w, b)

    wide, usual = both(of(WideLinearKernel()), of(ReferenceLinear()), inputs)
    assert wide[0].dtype == BF16
    close(wide, usual, 2**-7)
    exact = both(of(WideLinearKernel()), of(ReferenceLinear()), [x.float() for x in inputs], False)
    assert all(torch.equal(a, b) for a, b in zip(*exact, strict=True))  # no autocast, no rounding


FLOAT_INPUTS = {
    "linear": (
        [(3, 5, 32), (16, 32), (16,)],
        lambda *given: WideLinearKernel().run(*given),
    ),
    "attention": (
        [(2, 7, 2, 8)] * 3,
        lambda *given: WideAttention().run(*given, Mask(causal=True), scale=0.3),
    ),
    "linear_cross_entropy": (
        [(30, 16), (40, 16), (40,)],
        lambda *given: WideCrossEntropy().run(*given, torch.arange(30)).lse,
    ),
}


@pytest.mark.parametrize("op", FLOAT_INPUTS)
def test_every_input_is_rounded_before_it_is_used(op):
    """As autocast does: then it is all the same whether they were rounded already."""
    shapes, function = FLOAT_INPUTS[op]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(function(*inputs), function(*(x.to(BF16).float() for x in inputs)))


def test_linear_keeps_bf16_for_the_backward_pass():
    x, weight = torch.randn(4, 32), torch.randn(16, 32, requires_grad=True)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=BF16),
    ):
        WideLinearKernel().run(x, weight, None)
    assert [tuple(t.shape) for t in kept if t.dtype == BF16] == [(4, 32)]


def test_attention_is_sdpas_to_its_rounding():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 7, heads, 8).to(BF16) for heads in (4, 2, 2)]

    def of(kernel):
        return lambda q, k, v: kernel.run(q, k, v, Mask(causal=True), scale=8**-0.5)

    close(*both(of(WideAttention()), of(SdpaAttention()), inputs), 2**-6)


def test_loss_is_the_chunked_ones_to_its_rounding():
    torch.manual_seed(0)
    targets = torch.randint(0, 40, (30,))
    targets[::4] = -100
    inputs = [torch.randn(30, 16), torch.randn(40, 16), torch.randn(40)]

    def of(kernel):
        return lambda h, w, b: kernel.run(h, w, b, targets, z_loss=1e-3).loss

    wide, usual = both(of(WideCrossEntropy()), of(ChunkedCrossEntropy()), inputs)
    close(wide[:1], usual[:1], 1e-2)
    close(wide[1:], usual[1:], 2**-5)
