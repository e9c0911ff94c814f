"""Training state as named tensors: what of the learner, the optimizers and the EMA is saved.

Names are the learner's own (`trunk.blocks.0.…`, `heads.lm.…`), tied weights appear once, and
optimizer state is `<parameter name>/<key>`, so it survives a change of parameter order or groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanolm.distributed.sharding import divided, local, rows_of
from nanolm.errors import UserError

Tensors = dict[str, Tensor]


def learner_tensors(learner: nn.Module) -> Tensors:
    """Parameters (each once) and persistent buffers, by name; the live tensors, not copies.

    Of a learner with a PEFT adapter, the adapter's only: its base is on disk already.
    """
    adapter = getattr(learner, "adapter", None)
    if adapter is not None:
        return adapter.tensors(learner)
    persistent = set(learner.state_dict(keep_vars=True))
    named: Tensors = dict(learner.named_parameters())
    named.update({k: v for k, v in learner.named_buffers() if k in persistent})
    return {name: tensor.detach() for name, tensor in named.items()}


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> Tensors:
    """The state of all optimizers, `<parameter name>/<key>`; the live tensors, not copies."""
    found: Tensors = {}
    for name, parameter, optimizer, _ in _walk(optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{name}/{key}"] = torch.as_tensor(value).detach()
    return found


def _walk(
    optimizers: Sequence[torch.optim.Optimizer],
) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer, dict]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                yield name, parameter, optimizer, group


def load_named(target: Tensors, saved: Mapping[str, Tensor], what: str) -> None:
    """Copies saved tensors into the live ones of the same names.

    Raises UserError naming the first key that is missing, too many or of another shape.
    """
    for name, tensor in target.items():
        if name not in saved:
            raise UserError(
                f"{what} has no tensor {name}, which this model has (shape {_shape(tensor)}); "
                f"use the config that the checkpoint was written with"
            )
        found = saved[name]
        if found.shape != tensor.shape:
            raise UserError(
                f"{what} is of another model shape: {name} is {_shape(found)} there and "
                f"{_shape(tensor)} here; use the config that the checkpoint was written with"
            )
    extra = next((name for name in saved if name not in target), None)
    if extra is not None:
        raise UserError(
            f"{what} has a tensor {extra} (shape {_shape(saved[extra])}) that this model lacks; "
            f"use the config that the checkpoint was written with"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            fill(tensor, saved[name])


def fill(target: Tensor, saved: Tensor) -> None:
    """Copies a saved tensor into a live one: of a sharded one, the rows that this rank holds."""
    rows = rows_of(saved, target) if isinstance(target, DTensor) else saved
    local(target).copy_(rows)


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a scalar"


def load_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, Tensor], what: str
) -> None:
    """Restores optimizer state by parameter name.

    Raises UserError for state of an unknown parameter or of a shape that the parameter lacks.
    """
    slots: dict[str, list[str]] = {}
    for key in saved:
        name, _, slot = key.rpartition("/")
        slots.setdefault(name, []).append(slot)
    for name, parameter, optimizer, group in _walk(optimizers):
        state: Tensors = {}
        for slot in slots.pop(name, []):
            tensor = saved[f"{name}/{slot}"]
            if tensor.ndim == parameter.ndim and not _fits(tensor, parameter):
                raise UserError(
                    f"{what} is of another model shape: {name}/{slot} is {_shape(tensor)} "
                    f"there and {_shape(parameter)} here"
                )
            on_device = tensor.ndim > 0 or group.get("fused") or group.get("capturable")
            if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
                state[slot] = divided(tensor, parameter)
            else:
                state[slot] = tensor.to(parameter.device) if on_device else tensor
        if state:
            optimizer.state[parameter] = state
    if slots:
        raise UserError(
            f"{what} holds optimizer state of {next(iter(slots))}, which this run does not train; "
            f"use the config that the checkpoint was written with"
        )


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    """Shaped like the parameter, where Adafactor's row and column means have some sizes one."""
    return all(a in (1, b) for a, b in zip(tensor.shape, parameter.shape, strict=True))
