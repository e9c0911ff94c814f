"""keeping_input: the same bits, less kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanolm.build import build_kernels
from nanolm.config.model import ModelConfig
from nanolm.config.schema import Config
from nanolm.model.layers import FeedForward
from nanolm.model.rederive import keeping_input


def kept_floats(function):
    """Output of the function, and the sizes of the tensors that its graph keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return out, sorted(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rederive", [True, False])
def test_same_bits_with_and_without(autocast, rederive):
    results = []
    for use in (rederive, False):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

        def product(y, weight=weight):
            return F.linear(y, weight)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            half = x * 0.5
            y = keeping_input(product, F.gelu, half) if use else product(F.gelu(half))
        y.square().sum().backward()
        results.append((y, x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_activations_output_is_freed():
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, weight):
            ctx.save_for_backward(y, weight)
            alive.append(y.untyped_storage()._weak_ref())
            return y @ weight

        @staticmethod
        def backward(ctx, grad):
            y, weight = ctx.saved_tensors
            return grad @ weight.mT, y.mT @ grad

    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    out = keeping_input(lambda y: Watched.apply(y, weight), F.gelu, x * 2)
    assert torch.UntypedStorage._expired(alive[0])
    out.sum().backward()
    assert torch.allclose(weight.grad, F.gelu(x * 2).mT @ torch.ones(6, 2))


def test_checkpointing_keeps_nothing_inside_a_block():
    model = ModelConfig(d_model=8, n_heads=2, vocab_size=64)
    layer = FeedForward(model, build_kernels(Config(model=model), "cpu"))
    layer.keeps_input = False  # what Stack.recompute sets
    x = torch.randn(2, 3, 8, requires_grad=True)
    _, kept = kept_floats(lambda: checkpoint(layer, x, use_reentrant=False))
    assert 6 * model.ff_width not in kept
