"""The sanitizer finds what numbers do not show, and names the line."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanolm.kernels import launch  # noqa: F401  (prepares the interpreter)
from nanolm.tools.kernel_check.sanitizer import sanitized, shuffled
from nanolm.tools.kernel_check.watch import KernelFaultError


@triton.jit
def copy_kernel(x, out, n, stride, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n) if CHECKED else tl.load(x + i * stride)
    tl.store(out + i, value, mask=i < n)


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, tl.load(out) + tl.sum(tl.load(x + i), axis=0))


@triton.jit
def lanes_kernel(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i.to(tl.float32))


@triton.jit
def poison_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), axis=0))


@triton.jit
def scalar_kernel(x, out, n, OTHER: tl.constexpr):
    i = tl.program_id(0)
    value = tl.load(x + i, mask=i < n, other=0.0) if OTHER else tl.load(x + i, mask=i < n)
    tl.store(out + i, value)


@triton.jit
def numbered_kernel(out):
    tl.store(out + tl.program_id(0), tl.load(out + 8) + 1)
    tl.store(out + 8, tl.load(out + 8) + 1)


def test_load_beyond_a_tensor():
    x, out = torch.arange(10.0), torch.zeros(10)
    with sanitized() as traffic:
        copy_kernel[(2,)](x, out, 10, 1, 8, True)
    assert traffic.bytes == 80 and traffic.launches == {"copy_kernel": 1}
    with sanitized(), pytest.raises(KernelFaultError, match=r"load of 6 elements.*test_kernel_san"):
        copy_kernel[(2,)](x, out, 10, 1, 8, False)


def test_gap_of_a_view_is_outside():
    x = torch.arange(40.0).view(10, 4)[:, 1:3]  # two of four columns
    out = torch.zeros(20)
    with sanitized(), pytest.raises(KernelFaultError, match="out of bounds"):
        copy_kernel[(1,)](x, out, 16, 1, 16, True)
    with sanitized():
        copy_kernel[(1,)](x, out, 10, 4, 16, True)


def test_race_between_programs():
    x, out = torch.ones(16), torch.zeros(1)
    sum_kernel[(2,)](x, out, 8)
    assert out.item() == 16  # the interpreter runs one program after the other
    with sanitized(), pytest.raises(KernelFaultError, match="write-write race"):
        sum_kernel[(2,)](x, out, 8)
    with sanitized(races=False):
        sum_kernel[(2,)](x, out, 8)


def test_lanes_of_one_store():
    with sanitized(), pytest.raises(KernelFaultError, match="different values"):
        lanes_kernel[(1,)](torch.zeros(8), 16)


def test_undefined_lanes_are_poisoned():
    x, out = torch.ones(8), torch.zeros(1)
    poison_kernel[(1,)](x, out, 5, 8)
    assert out.item() == 5  # the interpreter happens to give 0
    with sanitized():
        poison_kernel[(1,)](x, out, 5, 8)
    assert out.isnan()


def test_a_single_element_that_is_masked_is_what_other_says():
    """Zero too, which the interpreter takes for no `other`."""
    x, out = torch.ones(2), torch.zeros(2)
    with sanitized():
        scalar_kernel[(2,)](x, out, 1, True)
    assert out.tolist() == [1, 0]
    with sanitized():
        scalar_kernel[(2,)](x, out, 1, False)
    assert out[1].isnan()


@triton.jit
def descriptor_kernel(rows, out, n, BLOCK: tl.constexpr, MADE: tl.constexpr):
    if MADE:
        rows = tl.make_tensor_descriptor(rows, [n, 16], [16, 1], [BLOCK, 16])
    block = rows.load([tl.program_id(0) * BLOCK, 0])
    tl.store(out + tl.program_id(0), tl.sum(block))


@pytest.mark.parametrize("where", ["in the kernel", "on the host", "too long"])
def test_a_descriptor_pads_and_reads_its_tensor_alone(where):
    """Its last block goes beyond the tensor, where it gives 0; one that claims more reads there."""
    x, out = torch.ones(5, 16), torch.zeros(2)
    rows = TensorDescriptor(x, [5, 16], [16, 1], [4, 16]) if where == "on the host" else x
    with sanitized() as traffic:
        if where == "too long":
            with pytest.raises(KernelFaultError, match="load of 16 elements out of bounds"):
                descriptor_kernel[(2,)](rows, out, 6, 4, True)
            return
        descriptor_kernel[(2,)](rows, out, 5, 4, where == "in the kernel")
    assert out.tolist() == [64, 16] and traffic.loaded["descriptor_kernel"] == 5 * 16 * 4


def test_shuffled_order_shows_dependence():
    first, second = torch.zeros(9), torch.zeros(9)
    numbered_kernel[(8,)](first)
    with shuffled(0):
        numbered_kernel[(8,)](second)
    assert sorted(first[:8].tolist()) == sorted(second[:8].tolist()) and first[8] == second[8]
    assert not torch.equal(first, second)
