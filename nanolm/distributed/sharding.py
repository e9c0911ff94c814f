"""Sharding: every rank keeps a part of the weights, gradients and optimizer state (FSDP2).

    fsdp   each weight's rows are divided over all ranks (Zhao et al. 2023; ZeRO-3)
    hsdp   divided over the `shard_size` ranks of a node, replicated over nodes (ZeRO-3 in a node)

A block's weights are gathered before its forward and backward pass and dropped after it. Embeddings
and heads, which share the tied table, form the outermost group. Gradients are summed over ranks,
not averaged, as under DDP: the loss is divided by global counts before.

A model that no host can hold is built on the meta device; `shard` then draws the initial weights
one parameter at a time, the same as an unsharded model would get, and keeps this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nanolm.config.schema import Config, DistributedConfig
from nanolm.distributed.world import World
from nanolm.errors import require

REFUSED = {
    "adafactor": "torch's Adafactor takes row and column means of the rows that a rank holds only",
}
"""Optimizers whose update of a part of a matrix is not the part of its update."""


def require_shardable(config: Config) -> None:
    """Raises UserError for what cannot be sharded rightly."""
    strategy, optim = config.distributed.strategy, config.optim.name
    remedy = "set distributed.strategy to ddp"
    require(optim not in REFUSED, f"optim={optim} with {strategy}: {REFUSED.get(optim)}; {remedy}")
    require(
        not (optim == "muon" and config.distributed.cpu_offload),
        "optim=muon with distributed.cpu_offload: Muon gathers whole matrices on the accelerator, "
        "and offloaded ones are in host memory; set distributed.cpu_offload to false",
    )
    require(
        config.train.rule.name == "plain",
        f"train.rule={config.train.rule.name} with {strategy}: it changes weights between passes, "
        f"which are gathered block by block; {remedy}",
    )
    require(
        config.peft.name != "adalora",
        f"peft=adalora with {strategy}: it scores rows and columns of whole matrices between "
        f"steps, and a rank holds some rows of each; {remedy}, or peft to lora",
    )


def build_mesh(world: World, config: DistributedConfig) -> DeviceMesh:
    """All ranks in one dimension (fsdp), or replicas of groups of `shard_size` ranks (hsdp).

    Raises UserError when shard_size does not divide the number of ranks.
    """
    kind = world.device.type
    if config.strategy == "fsdp":
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    size = config.shard_size or world.local_size
    require(
        world.size % size == 0,
        f"distributed.shard_size={size} does not divide the {world.size} ranks of this run",
    )
    names = ("replicate", "shard")
    return init_device_mesh(kind, (world.size // size, size), mesh_dim_names=names)


def shard(
    learner: nn.Module,
    world: World,
    config: Config,
    initialise: Callable[[str, Tensor], None] | None = None,
) -> nn.Module:
    """Shards the learner in place, block by block, and returns it.

    `initialise(name, tensor)` fills weights that are on the meta device, in the order of
    `named_parameters`; it runs on the CPU, on one whole parameter at a time.
    """
    require_shardable(config)
    options = _options(world, config)
    last = {id(list(block.parameters())[-1]): block for block in cast(Any, learner).trunk.blocks}
    made: dict[int, nn.Parameter] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        for name, parameter in list(learner.named_parameters()):
            if parameter.is_meta:
                assert initialise is not None, f"nothing draws {name}, which is on the meta device"
                full = torch.empty(parameter.shape, dtype=parameter.dtype)
                initialise(name, full)
                made[id(parameter)] = nn.Parameter(full.to(world.device), parameter.requires_grad)
            block = last.get(id(parameter))
            if block is not None:  # its parameters are all there: keep this rank's rows only
                _put(block.to(world.device) if not parameter.is_meta else block, made)
                fully_shard(block, **options)
    _put(learner, made)
    learner.to(world.device)
    # The outermost group is needed first in the backward pass: it stays gathered until then.
    fully_shard(learner, **{k: v for k, v in options.items() if k != "reshard_after_forward"})
    for module in sharded_modules(learner):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return learner


def _options(world: World, config: Config) -> dict:
    distributed = config.distributed
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    precision = MixedPrecisionPolicy(
        param_dtype=half,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    options = {
        "mesh": build_mesh(world, distributed),
        "mp_policy": precision,
        "reshard_after_forward": distributed.reshard_after_forward,
    }
    if distributed.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    return options


def _put(module: nn.Module, made: dict[int, nn.Parameter]) -> None:
    """Replaces meta parameters by those made for them; one that is shared stays shared."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta and id(parameter) in made:
                child.register_parameter(name, made[id(parameter)])


def sharded_modules(module: nn.Module) -> list[FSDPModule]:
    """The groups that are gathered together, the outermost first; none when nothing is sharded."""
    return [child for child in module.modules() if isinstance(child, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, collective; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_position(tensor: DTensor) -> tuple[int, int, bool]:
    """(which part of how many parts of its rows this rank holds, whether it is the first to)."""
    mesh, dims = tensor.device_mesh, range(tensor.device_mesh.ndim)
    (dim,) = [d for d in dims if isinstance(tensor.placements[d], Shard)]
    first = all(mesh.get_local_rank(d) == 0 for d in dims if d != dim)
    return mesh.get_local_rank(dim), mesh.size(dim), first


def rows_of(full: Tensor, like: DTensor) -> Tensor:
    """The rows of a whole tensor that this rank holds of `like`."""
    part, parts, _ = shard_position(like)
    pieces = full.chunk(parts)
    return pieces[part] if part < len(pieces) else full[:0]


def divided(full: Tensor, like: DTensor) -> DTensor:
    """A whole tensor, sharded as `like` is, on its device."""
    return DTensor.from_local(
        rows_of(full, like).to(local(like).device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )
