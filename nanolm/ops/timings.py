"""Timings of kernels on one machine: what `nanolm kernels bench --save FILE` writes.

A config names the file in `kernels.timings`; `kernels.attention: fastest` takes from it, as `auto`
does for Muon's products (`by_time.py`), and otherwise `auto` compares itself with it.

A timing is {"op", "kernel", "device_name", "problem": its sizes in words, "ms", "spec"}, with the
spec as JSON (`kept.spec_record`). It speaks for a layer when device, dtype, head width and whether
it is causal are the same and the backward pass was timed too; for a symmetric product, which has no
backward pass in Muon, when device, dtype and the matrix's size are. What a batch may bring besides
(documents, a bias, dropout) is not in it, and the log says so.
"""

from __future__ import annotations

import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nanolm.errors import UserError
from nanolm.files import write_json
from nanolm.ops.kept import spec_record

DECISIVE = ("dtype", "device", "phase")
"""Fields of a spec in which a timing must agree, whatever the op …"""
SIZES = {"attention": ("head_dim", "causal"), "symmetric_product": ("rows", "columns")}
"""… and those of the ops whose kernel is chosen by timings."""
FIELDS: dict[str, type | tuple[type, ...]] = {
    "op": str,
    "kernel": str,
    "device_name": str,
    "problem": str,
    "ms": (int, float),
}
UNTIMED: dict[str, Any] = {
    "window": None,
    "masks": [],
    "bias": None,
    "softcap": None,
    "dropout": 0.0,
    "cross": False,
}
"""Fields that `kernels bench` leaves at these values."""

Timing = Mapping[str, Any]


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return processor_name()


def processor_name() -> str:
    """The CPU's name, as far as the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def read_timings(path: str) -> list[Timing]:
    """The file's timings; raises UserError when it is missing or no such file."""
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"kernels.timings={path}: {error.strerror}; write it with nanolm kernels bench --save "
            f"{path}"
        ) from error
    except ValueError as error:
        raise UserError(f"kernels.timings={path} is not JSON: {error}") from error
    good = isinstance(found, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("spec"), dict)
        and all(isinstance(row.get(key), kinds) for key, kinds in FIELDS.items())
        for row in found
    )
    if not good:
        raise UserError(
            f"kernels.timings={path} holds no timings; nanolm kernels bench --save FILE writes them"
        )
    return found


def save_timings(path: str, new: Sequence[Timing]) -> None:
    """Adds timings to the file, in place of earlier ones of the same kernel on the same problem.

    Raises UserError when the file is there and holds something else.
    """

    def what(row: Timing) -> tuple:
        return (*(row[key] for key in FIELDS if key != "ms"), json.dumps(row["spec"]))

    old = read_timings(path) if pathlib.Path(path).exists() else []
    merged = {what(row): row for row in [*old, *new]}
    write_json(path, list(merged.values()))


def timings_of(timings: Sequence[Timing], op: str, spec: Any) -> list[Timing]:
    """Those that speak for this layer, of one problem: one with as many heads, if there is one, and
    the last that was saved."""
    now, name = spec_record(spec), device_name(spec.device)
    found = [
        row
        for row in timings
        if (row["op"], row["device_name"]) == (op, name)
        and all(row["spec"].get(key) == now[key] for key in (*DECISIVE, *SIZES[op]))
    ]
    alike = [row for row in found if all(row["spec"].get(k) == now[k] for k in heads(now))]
    problem = (alike or found)[-1]["problem"] if found else None
    return [row for row in found if row["problem"] == problem]


def heads(spec: Mapping[str, Any]) -> list[str]:
    """The fields of a spec that count heads."""
    return [key for key in spec if key.endswith("heads")]


def untimed(spec: Any) -> str:
    """What of the layer no timing knows, in words; empty when it is as it was timed."""
    now = spec_record(spec)
    names = [key for key, usual in UNTIMED.items() if now[key] != usual]
    return f", without the layer's {', '.join(names)}" if names else ""


def how_to_time(spec: Any) -> str:
    """The command that times this layer of attention."""
    now = spec_record(spec)
    sizes = {"heads": now["n_heads"], "kv_heads": now["n_kv_heads"], "head_dim": now["head_dim"]}
    sizes |= {"causal": str(now["causal"]).lower(), "dtype": now["dtype"], "device": now["device"]}
    words = " ".join(f"--{name} {size}" for name, size in sizes.items())
    return f"nanolm kernels bench --op attention {words} --save FILE"


def how_to_time_sizes(op: str, specs: Sequence[Any]) -> str:
    """The command that times an op of registry.SIZED at the sizes of these specs."""
    sizes = " ".join(spec.size.replace(" ", "") for spec in specs)
    now = spec_record(specs[0])
    return (
        f"nanolm kernels bench --op {op} --matrices {sizes} --dtype {now['dtype']} --device "
        f"{now['device']} --save FILE"
    )
