"""`nanolm kernels bench`: attention kernels beside each other on the device at hand.

Milliseconds are medians over repetitions in alternating order; TFLOP/s count the visible half of a
causal mask only. On a CPU without the interpreter Triton is left out, with its reason.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from nanolm.commands.figures import write_json
from nanolm.masks import Mask
from nanolm.ops import AttentionSpec, candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    batch: int = 4
    """Rows."""
    length: int = 1024
    """Queries and keys."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key/value heads."""
    head_dim: int = 64
    """Width of a head."""
    causal: bool = True
    """Causal or bidirectional."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device type."""
    repetitions: int = 7
    """Measurements of each kernel."""
    backward: bool = True
    """Forward and backward, or forward only."""
    json: str | None = None
    """Also write the table here."""


def inputs(arguments: Arguments) -> list[torch.Tensor]:
    """q, k, v."""
    a, dtype = arguments, getattr(torch, arguments.dtype)
    return [
        torch.randn(
            a.batch, a.length, heads, a.head_dim,
            dtype=dtype, device=a.device, requires_grad=a.backward,
        )
        for heads in (a.heads, a.kv_heads, a.kv_heads)
    ]  # fmt: skip


def once(kernel: Any, tensors: list[torch.Tensor], arguments: Arguments) -> float:
    """Seconds of one call."""
    synchronize = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    mask = Mask(causal=arguments.causal)
    synchronize()
    start = time.perf_counter()
    out = kernel.run(*tensors, mask, scale=arguments.head_dim**-0.5)
    if arguments.backward:
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    synchronize()
    return time.perf_counter() - start


def run(arguments: Arguments) -> None:
    """Measure and print."""
    a = arguments
    spec = AttentionSpec(
        n_heads=a.heads, n_kv_heads=a.kv_heads, head_dim=a.head_dim, causal=a.causal,
        device=a.device, dtype=getattr(torch, a.dtype),
    )  # fmt: skip
    serving = {}
    for name, kernel in candidates("attention").items():
        reason = kernel.why_not(spec)
        if reason is None and a.device not in getattr(kernel, "only_by_name_on", ()):
            serving[name] = kernel
        else:
            print(f"{name:<14} left out: {reason or 'interpreted'}")
    tensors = inputs(a)
    times: dict[str, list[float]] = {name: [] for name in serving}
    for _ in range(a.repetitions + 1):  # the first round warms up
        for name, kernel in serving.items():
            times[name].append(once(kernel, tensors, a))
    flops = 4 * a.batch * a.heads * a.length**2 * a.head_dim * (0.5 if a.causal else 1)
    flops *= 3.5 if a.backward else 1
    table = []
    for name, measured in times.items():
        seconds = statistics.median(measured[1:])
        row = {"kernel": name, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}
        print(f"{name:<14} {row['ms']:9.2f} ms {row['tflops']:9.3f} TFLOP/s")
        table.append(row)
    write_json(a.json, table)
