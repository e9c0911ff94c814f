"""Bytes that kernels ask for, counted by the sanitizer, within 1.25 x of what they must."""

import pytest
import torch

from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check import roofline
from nanolm.tools.kernel_check.sanitizer import sanitized

if torch.cuda.is_available():
    pytest.skip("counts in the interpreter", allow_module_level=True)

from nanolm.kernels import launch
from nanolm.kernels.attention.operator import attention
from nanolm.kernels.cross_entropy import linear_cross_entropy
from nanolm.kernels.glu import glu
from nanolm.kernels.norm import norm
from nanolm.kernels.rotary import rotary


def counted(function, *, kernel=None):
    with sanitized(races=False) as traffic:
        function()
    if kernel is None:
        return traffic.bytes
    return traffic.loaded[kernel] + traffic.stored[kernel]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_memory_bound_kernels_move_each_byte_once():
    x, weight = draw(64, 256), draw(256)
    cases = {
        "norm": (
            lambda: norm(x, weight, None, kind="rmsnorm", eps=1e-5, residual=x),
            roofline.norm(64, 256, residual=True),
        ),
        "rotary": (
            lambda: rotary(draw(1, 16, 8, 32), torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)),
            roofline.rotary(16, 8, 32),
        ),
        "glu": (lambda: glu(draw(16, 512), kind="swiglu"), roofline.glu(16, 256)),
    }
    for name, (function, cost) in cases.items():
        assert cost.bytes * 0.8 <= counted(function) <= cost.bytes * 1.25, name


def test_cross_entropy_reads_logits_twice_and_writes_them_once():
    hidden, weight = draw(8, 16).requires_grad_(), draw(5000, 16)
    targets = torch.zeros(8, dtype=torch.int64)
    actual = counted(
        lambda: linear_cross_entropy(hidden, weight, None, targets), kernel="cross_entropy_kernel"
    )
    assert actual <= roofline.cross_entropy(8, 5000).bytes * 1.25


@pytest.mark.parametrize("causal", [False, True])
def test_attention_reads_what_its_tiles_need(monkeypatch, causal):
    for kind in launch.KINDS:
        monkeypatch.setitem(launch.INTERPRETER, kind, launch.Launch(16, 16))
    q, k, v = draw(1, 64, 2, 16), draw(1, 64, 2, 16), draw(1, 64, 2, 16)
    actual = counted(lambda: attention(q, k, v, Mask(causal=causal), scale=0.25))
    share = 10 / 16 if causal else 1.0  # of 4 x 4 tiles, 10 touch the lower triangle
    cost = roofline.attention(1, 64, 64, 2, 16, m=16, share=share)
    assert cost.bytes * 0.8 <= actual <= cost.bytes * 1.25
