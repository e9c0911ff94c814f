"""Kernels that a run was trained with: written into its checkpoints, and used again on resume.

`auto` may choose otherwise on a resume: after an update, or where Triton was installed meanwhile.
Two kernels of one op agree to rounding, not bit for bit, so a resumed run keeps those it had.

A record is one layer kind: {"op": …, "kernel": its registered name, "spec": the spec as JSON}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from nanolm.errors import UserError

Record = Mapping[str, Any]


def plain(value: Any) -> Any:
    """A field of a spec as JSON knows it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return sorted(value) if isinstance(value, frozenset) else value


def spec_record(spec: Any) -> dict[str, Any]:
    """A spec as JSON."""
    return {f.name: plain(getattr(spec, f.name)) for f in dataclasses.fields(spec)}


def records(choices: Iterable[Any]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of a model's choices (contract.Choice)."""
    return [
        {"op": choice.op, "kernel": choice.kernel.name, "spec": spec_record(choice.spec)}
        for choice in choices
    ]


def read_records(trainer: Mapping[str, Any] | None) -> list[Record]:
    """The records in a checkpoint's trainer.json; none in those of early versions, nor without a
    checkpoint. Raises UserError when they are damaged."""
    found = [] if trainer is None else trainer.get("kernels", [])
    shape = {"op": str, "kernel": str, "spec": dict}
    good = isinstance(found, list) and all(
        isinstance(record, dict) and all(isinstance(record.get(k), t) for k, t in shape.items())
        for record in found
    )
    if not good:
        raise UserError("the checkpoint's trainer.json has no usable 'kernels'; use another one")
    return found


def kept_record(kept: Sequence[Record], op: str, spec: Any) -> Record | None:
    """The record of this layer kind: of the same device, else of another, else None.

    Fields that later versions add to a spec are not compared.
    """
    now = spec_record(spec)
    for ignored in ((), ("device",)):
        for record in kept:
            same = [now.get(k) == v for k, v in record["spec"].items() if k not in ignored]
            if record["op"] == op and all(same):
                return record
    return None
