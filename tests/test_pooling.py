"""Sums over the tokens of a sequence: the same bits every time, on every device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanolm.finetune.tasks.heads import Layout, group_sums, pool

ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "put_")
"""Operators that add floating-point numbers atomically on CUDA."""


class Watch(TorchDispatchMode):
    """Notes the atomic operators that are asked to add floating-point numbers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # What gathers rows has a sum that is sorted first, and so repeatable.
        floats = isinstance(out, torch.Tensor) and out.is_floating_point()
        if floats and name != "_index_put_impl_" and any(word in name for word in ATOMIC):
            self.seen.append(name)
        return out


def layout(lengths):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ends = torch.tensor(lengths).cumsum(0)
    return Layout(torch.arange(len(owner)), owner, ends - torch.tensor(lengths), ends - 1)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_adds_nothing_atomically(pooling):
    hidden = torch.randn(2, 11, 5, requires_grad=True)
    where = layout([7, 1, 9, 5])
    with Watch() as watch:
        pooled = pool(hidden, where, pooling)
        pooled.square().sum().backward()
    assert not watch.seen
    if pooling == "mean":
        parts = hidden.flatten(0, 1).split([7, 1, 9, 5])
        torch.testing.assert_close(pooled, torch.stack([part.mean(0) for part in parts]))


def test_the_watch_sees_what_adds_atomically():
    with Watch() as watch:
        torch.zeros(2, 3).index_add(0, torch.tensor([0, 0, 1]), torch.ones(3, 3))
    assert watch.seen == ["index_add"]


def test_group_sums_are_those_of_index_add():
    values = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([7, 0, 10, 5]))
    expected = values.new_zeros(4, 3).index_add(0, owner, values)
    assert torch.equal(group_sums(values, owner, 4), expected)
    assert torch.equal(group_sums(values[:, 0], owner, 4), expected[:, 0])
