"""Ranks: who we are among the processes of a run, and the few collectives that training needs.

torchrun starts one process per device and names each in the environment (RANK, WORLD_SIZE,
LOCAL_RANK); without it a run is a world of one. Two groups exist: the gradient group (nccl on CUDA,
gloo on the CPU), which DDP uses, and a control group (always gloo) for small host-side numbers, so
that counting targets or agreeing on a signal never waits for the accelerator's queue.

Gradients are *summed* over ranks, not averaged: the loss is divided by the global target count
before the first backward (see `trainer.py`), so the sum already is the gradient of one big batch.
"""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from nanolm.config import DistributedConfig
from nanolm.errors import UserError
from nanolm.launch_store import fresh_store, is_kept_by_agent

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class World:
    """One process's place in the run; every collective is the identity in a world of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = CPU
    timeout: float = 600.0
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def first_of_node(self) -> int:
        """The lowest rank on this rank's node."""
        return self.rank - self.local_rank

    def beside(self) -> "World":
        """The same ranks over a control group of their own, whose collectives a thread may call
        while training calls others; collective."""
        if self.size == 1:
            return self
        timeout = datetime.timedelta(seconds=self.timeout)
        return dataclasses.replace(self, control=dist.new_group(backend="gloo", timeout=timeout))

    def agree(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's JSON answer; the first rank's UserError is everybody's. Collective."""
        answer, failure = None, None
        try:
            answer = work()
        except UserError as error:
            failure = str(error)
        told = self.gather({"answer": answer, "failure": failure})
        failure = next((entry["failure"] for entry in told if entry["failure"]), None)
        if failure:
            raise UserError(failure)
        return [entry["answer"] for entry in told]

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum of host numbers over ranks, in float64; collective."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Each rank's JSON value, in rank order, on every rank; collective. Nothing is pickled."""
        text = json.dumps(value)
        if self.size == 1:
            return [json.loads(text)]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.control)
        width = int(max(lengths))
        mine = torch.zeros(width, dtype=torch.uint8)
        mine[: len(data)] = data
        parts = [torch.zeros(width, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.control)
        return [
            json.loads(bytes(part[: int(length)].tolist()))
            for part, length in zip(parts, lengths, strict=True)
        ]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; collective."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self, timeout: float | None = None) -> None:
        """Waits for all ranks; after `timeout` seconds raises RuntimeError naming a late rank."""
        if self.size > 1:
            seconds = datetime.timedelta(seconds=timeout or self.timeout)
            dist.monitored_barrier(self.control, timeout=seconds, wait_all_ranks=True)


def launch(config: DistributedConfig, device: str = "auto") -> World:
    """Joins the process group that torchrun's environment describes, or makes a world of one.

    Raises UserError when CUDA is asked for and there is none, or fewer devices than local ranks.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank)
    if size == 1:
        return World(device=chosen, timeout=config.timeout)
    timeout = datetime.timedelta(seconds=config.timeout)
    on_cuda = chosen.type == "cuda"
    kept = is_kept_by_agent()
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=fresh_store(rank, size, config.timeout) if kept else None,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=chosen if on_cuda else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if on_cuda else dist.group.WORLD
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, local_rank, local_size, chosen, config.timeout, control)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no CUDA device; set run.device to cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: torch sees "
            f"{torch.cuda.device_count()}; lower torchrun's --nproc_per_node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def close(world: World) -> None:
    """Leaves the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def wrap(
    module: nn.Module,
    world: World,
    config: DistributedConfig,
    on_last: Callable[[], None] = lambda: None,
) -> nn.Module:
    """The module as the strategy wants it called; the module itself stays the one to save.

    `ddp`: gradients are summed over ranks during the backward pass (Li et al. 2020, PyTorch
    Distributed). In a world of one the module is returned as it is.
    """
    if world.size == 1:
        return module
    wrapped = DistributedDataParallel(
        module, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    wrapped.register_comm_hook(on_last, _sum_bucket)
    return wrapped


def _sum_bucket(
    on_last: Callable[[], None], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: all-reduce with SUM, where DDP's own would average.

    `on_last` is called when the last bucket leaves: from there on the step only waits for others.
    DDP compares these annotations with the classes, so this module may not postpone annotations.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    if bucket.is_last():
        on_last()
    return work.get_future().then(lambda future: future.value()[0])


@contextlib.contextmanager
def synchronised(module: nn.Module, when: bool) -> Iterator[None]:
    """Forward and backward inside exchange gradients only `when` true: the last micro-batch's do.

    A module that is not distributed has nothing to exchange.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(when)
        yield
    elif isinstance(module, DistributedDataParallel) and not when:
        with module.no_sync():
            yield
    else:
        yield


def peer_lost(error: BaseException) -> bool:
    """Whether an error of a collective means that a peer died or never came."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")
    told = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
    return told or "monitoredBarrier" in str(error)
