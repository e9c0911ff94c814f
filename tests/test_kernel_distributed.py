"""Interpreted Triton kernels inside DDP and FSDP2, on two gloo ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn


class Model(nn.Module):
    """Norm, attention and the projected loss, all in Triton."""

    def __init__(self):
        super().__init__()
        from nanolm.ops.contract import KERNELS, candidates

        self.kernels = {}
        for op in ("attention", "norm", "linear_cross_entropy"):
            candidates(op)
            self.kernels[op] = KERNELS[op].get("triton").build()
        self.norm = nn.Parameter(torch.ones(16))
        self.qkv = nn.Linear(16, 48)
        self.vocabulary = nn.Parameter(torch.randn(32, 16) * 0.1)

    def forward(self, x, targets):
        from nanolm.ops.masks import Mask

        y, _ = self.kernels["norm"].run(x, self.norm, None, kind="rmsnorm", eps=1e-5)
        q, k, v = (z.unflatten(-1, (1, 16)) for z in self.qkv(y).chunk(3, dim=-1))
        out = self.kernels["attention"].run(q, k, v, Mask(causal=True), scale=0.25)
        hidden = out.flatten(2).flatten(0, 1)
        cross_entropy = self.kernels["linear_cross_entropy"]
        return cross_entropy.run(hidden, self.vocabulary, None, targets.flatten()).loss


def gradients(model, x, targets):
    model(x, targets).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name.removeprefix("module.")] = (
            grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        )
    return grads


def work(rank, meeting, kind):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model()
    x, targets = torch.randn(2, 6, 16), torch.randint(32, (2, 6))
    expected = gradients(model, x, targets)
    model.zero_grad(set_to_none=True)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found = gradients(model, x[rank : rank + 1], targets[rank : rank + 1])
    for name, grad in expected.items():  # each rank saw half of the rows: the mean is half the sum
        torch.testing.assert_close(found[name], grad / 2, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_have_the_gradient_of_one(tmp_path, kind):
    multiprocessing.spawn(work, (tmp_path / "meeting", kind), nprocs=2)
