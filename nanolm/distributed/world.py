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
import inspect
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from nanolm.config.schema import DistributedConfig
from nanolm.distributed.devices import device_type
from nanolm.distributed.launch_store import exchange, fresh_store, hosted_store, is_kept_by_agent
from nanolm.errors import UserError, require

CPU = torch.device("cpu")
# torch 2.13 renamed this switch of DistributedDataParallel; before, it is broadcast_buffers.
_NEW_SWITCH = "forward_sync_buffers"
_DDP_KEYS = inspect.signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = _NEW_SWITCH if _NEW_SWITCH in _DDP_KEYS else "broadcast_buffers"


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
    def joined(self) -> bool:
        """Whether a process group carries gradients and host numbers: between several ranks, and
        for one alone that was given a control group, which then takes the same ways."""
        return self.size > 1 or self.control is not None

    @property
    def first_of_node(self) -> int:
        """The lowest rank on this rank's node."""
        return self.rank - self.local_rank

    def with_own_group(self) -> "World":
        """The same ranks over a control group of their own, whose collectives a thread may call
        while training calls others; collective."""
        if not self.joined:
            return self
        timeout = datetime.timedelta(seconds=self.timeout)
        return dataclasses.replace(self, control=dist.new_group(backend="gloo", timeout=timeout))

    def call_on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
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
        if not self.joined:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Each rank's JSON value, in rank order, on every rank; collective. Nothing is pickled."""
        text = json.dumps(value)
        if not self.joined:
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


def launch(config: DistributedConfig, device: str = "auto", option: str = "--device") -> World:
    """Joins the process group that torchrun's environment describes, or makes a world of one.
    `option` is how the user says which device.

    Raises UserError when CUDA is asked for and there is none, when there are fewer devices than
    local ranks, for nccl on CPUs, and when two ranks would share a GPU under nccl.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank, option)
    backend = _backend(config.backend, chosen)
    if size == 1:
        return World(device=chosen, timeout=config.timeout)
    timeout = datetime.timedelta(seconds=config.timeout)
    kept = is_kept_by_agent()
    store = (fresh_store if kept else hosted_store)(rank, size, config.timeout)
    on_nccl = backend == "nccl"
    if on_nccl:  # which would end in a riddle, or hang
        require_gpus_apart(exchange(store, rank, size, gpu_identity(chosen)))
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=chosen if on_nccl else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if on_nccl else dist.group.WORLD
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, local_rank, local_size, chosen, config.timeout, control)


def _device(name: str, local_rank: int, option: str) -> torch.device:
    if device_type(name, option) == "cpu":
        return CPU
    count = torch.cuda.device_count()
    # A launcher that shows each task its own GPU alone (SLURM's --gpus-per-task=1) calls it 0.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: torch sees {count}; lower torchrun's "
            f"--nproc_per_node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _backend(name: str, device: torch.device) -> str:
    if name == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    require(
        name != "nccl" or device.type == "cuda",
        "distributed.backend is nccl, which connects GPUs, and this run is on the CPU; set "
        "distributed.backend to auto",
    )
    return name


def gpu_identity(device: torch.device) -> str:
    """A name of the GPU that no other in the job has: its host and its UUID."""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def require_gpus_apart(identities: Sequence[str]) -> None:
    """Raises UserError when two ranks have the same GPU; `identities` are in the order of ranks."""
    for rank, identity in enumerate(identities):
        other = identities.index(identity)
        require(
            other == rank,
            f"ranks {other} and {rank} have the same GPU ({identity}), and nccl wants one for each "
            f"rank; lower torchrun's --nproc_per_node, or set distributed.backend to gloo",
        )


def undivided(config: DistributedConfig, world: World) -> list[str]:
    """What to tell a user who asked to divide the model over one rank."""
    if world.size > 1 or config.strategy == "ddp":
        return []
    lost = " and distributed.cpu_offload keeps nothing in host memory" if config.cpu_offload else ""
    return [
        f"distributed.strategy={config.strategy} divides the model over ranks, and this run has "
        f"one: the whole model is on {world.device}{lost}; torchrun's --nproc_per_node starts more"
    ]


def close(world: World) -> None:
    """Leaves the process group, if there is one."""
    if world.joined and dist.is_initialized():
        dist.destroy_process_group()


def wrap(
    module: nn.Module,
    world: World,
    config: DistributedConfig,
    on_last: Callable[[], None] = lambda: None,
) -> nn.Module:
    """The module as the strategy wants it called; the module itself stays the one to save.

    `ddp`: gradients are summed over ranks during the backward pass (Li et al. 2020, PyTorch
    Distributed). Without a process group the module is returned as it is.
    """
    if not world.joined:
        return module
    switches: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(module, **switches)
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
