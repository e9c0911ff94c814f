"""bfloat16 in the interpreter: as hardware computes it, and how wrong the stock interpreter is."""

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import triton
import triton.language as tl

from nanolm.kernels import interpreter, launch  # noqa: F401  (launch installs the patches)


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def arithmetic_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, x * y)
    tl.store(out + 2 * N + i, tl.maximum(x, y))
    tl.store(out + 3 * N + i, tl.where(x < y, x, -y))
    tl.store(out + 4 * N + i, (x.to(tl.float32) / 3).to(tl.bfloat16))
    tl.store(out + 5 * N + i, tl.sum(x, axis=0))
    tl.store(out + 6 * N + i, tl.max(x, axis=0))
    tl.store(out + 7 * N + i, tl.exp(x.to(tl.float32)))


def draw(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16()


def dot_error():
    a, b = draw(16, 16), draw(16, 16) * 2
    out = torch.empty(16, 16)
    product_kernel[(1,)](a, b, out, 16)
    return float((out - a.double() @ b.double()).abs().max())


def test_dot_multiplies_numbers():
    assert dot_error() < 1e-5


def test_stock_interpreter_multiplies_bit_patterns():
    interpreter.uninstall()
    try:
        assert dot_error() > 1e3
    finally:
        interpreter.install()
    assert dot_error() < 1e-5


def test_arithmetic_equals_torch():
    a, b = draw(64), draw(64).flip(0)
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, out, 64)
    third = (a.float() / 3).bfloat16()
    total = a.float().sum().bfloat16().expand(64)
    expected = [a + b, a * b, torch.maximum(a, b), torch.where(a < b, a, -b), third, total]
    expected += [a.max().expand(64), a.float().exp().bfloat16()]
    for row, wanted in zip(out, expected, strict=True):
        assert torch.equal(row, wanted)


def test_rounds_to_nearest_even():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        [x, np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    ours = torch.from_numpy(interpreter.narrow(x).view(np.int16)).view(torch.bfloat16)
    torchs = torch.from_numpy(x).bfloat16()
    same = (ours == torchs) | (ours.isnan() & torchs.isnan())
    assert same.all()
    assert np.array_equal(
        interpreter.widen(interpreter.narrow(x)), ours.float().numpy(), equal_nan=True
    )
