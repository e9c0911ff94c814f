"""Attention by device time: nanolm's kernels beside flash, cuDNN, efficient and FlexAttention.

    python -m nanolm.tools.first_contact.attention_speed [--device cpu] [--json FILE]

TFLOP/s are of the pairs that the mask leaves, two products forward and five backward, the same for
everybody. `differs` is the largest difference of an output from that of nanolm's first kernel.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanolm.ops.contract import candidates
from nanolm.ops.flex import pairs_allowed
from nanolm.ops.masks import Mask
from nanolm.terminal import say
from nanolm.tools.first_contact.device_time import milliseconds
from nanolm.tools.first_contact.measurement import Figures, enter
from nanolm.tools.kernel_check.problems import Sizes
from nanolm.tools.kernel_check.trial import forget_graphs
from nanolm.training.accelerators import find_accelerator

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where."""

    device: str = "cuda"
    """Device type; on a CPU one tiny problem."""
    repetitions: int = 50
    """Calls that are timed."""
    json: str | None = None
    """Also write a line of JSON for each row to this file."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention over B rows of T tokens."""

    sizes: Sizes
    window: int | None = None
    own: tuple[str, ...] = ("triton",)
    """nanolm's kernels that take part."""

    @property
    def words(self) -> str:
        """Shape and mask."""
        s = self.sizes
        shape = f"B {s.batch}, T {s.length}, H {s.heads}, G {s.kv_heads}, K {s.head_dim}"
        window = f", window {self.window}" if self.window else ""
        return f"{shape}{', causal' * s.causal}{window}, {s.dtype}"

    @property
    def mask(self) -> Mask:
        """The mask without tensors that describes it."""
        return Mask(causal=self.sizes.causal, window=self.window)

    def pairs(self) -> int:
        """Pairs of a query and a key that it may see, in one row."""
        length, window = self.sizes.length, self.window or self.sizes.length
        behind = sum(min(t + 1, window) for t in range(length))
        return behind if self.sizes.causal else 2 * behind - length

    def flops(self) -> int:
        """Of the forward pass."""
        return 4 * self.sizes.batch * self.sizes.heads * self.pairs() * self.sizes.head_dim


def problems(device: str) -> list[Problem]:
    """GPT-2's and BERT's attention, then longer, wider, grouped and local ones."""
    if device == "cpu":
        tiny: dict[str, Any] = {"batch": 1, "length": 64, "heads": 2, "kv_heads": 2, "head_dim": 16}
        return [Problem(Sizes(**tiny, dtype="bfloat16", device=device), own=("sdpa",))]

    def problem(
        batch: int, length: int, heads: int, kv_heads: int, width: int, causal: bool = True,
        window: int | None = None, own: tuple[str, ...] = ("triton",),
    ) -> Problem:  # fmt: skip
        shape: dict[str, Any] = {
            "batch": batch,
            "length": length,
            "heads": heads,
            "kv_heads": kv_heads,
        }
        options: dict[str, Any] = {
            "head_dim": width,
            "causal": causal,
            "dtype": "bfloat16",
            "device": device,
        }
        return Problem(Sizes(**shape, **options), window, own)

    return [
        problem(16, 1024, 12, 12, 64, own=("triton", "flex")),  # flex compiles for long: once
        problem(32, 512, 12, 12, 64, causal=False),
        problem(4, 4096, 16, 16, 128),
        problem(8, 2048, 32, 8, 128),
        problem(8, 2048, 9, 3, 64),
        problem(8, 4096, 12, 12, 64, causal=False, window=65),
        problem(8, 4096, 12, 12, 64, window=512),
    ]


def contenders(problem: Problem) -> dict[str, Callable[[], Attend]]:
    """Name -> what makes its call; nanolm's own come first."""
    found: dict[str, Callable[[], Attend]] = {
        f"nanolm {name}": functools.partial(nanolm_call, problem, name) for name in problem.own
    }
    if problem.window is None:
        for backend in backends(problem.sizes.device):
            name = f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
            found[name] = functools.partial(sdpa_call, problem, backend)
    if problem.sizes.device == "cuda":
        found["FlexAttention, mask built once"] = lambda: flex_call(problem)
    return found


def backends(device: str) -> list[SDPBackend]:
    """SDPA's fused kernels on a device type."""
    if device == "cpu":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    return [flash, SDPBackend.CUDNN_ATTENTION, efficient]


def nanolm_call(problem: Problem, name: str) -> Attend:
    """A kernel of nanolm's, as a layer calls it."""
    kernel, mask = candidates("attention")[name], problem.mask
    scale = problem.sizes.head_dim**-0.5
    return lambda q, k, v: kernel.run(q, k, v, mask, scale=scale)


def sdpa_call(problem: Problem, backend: SDPBackend) -> Attend:
    """scaled_dot_product_attention with one backend or none."""
    options: dict[str, Any] = {
        "is_causal": problem.sizes.causal,
        "enable_gqa": problem.sizes.heads != problem.sizes.kv_heads,
    }

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        with sdpa_kernel(backend):
            out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, **options)
        return out_BHTK.transpose(1, 2)

    return attend


def flex_call(problem: Problem) -> Attend:
    """FlexAttention, compiled, with a block mask that is built before."""
    from torch.nn.attention import flex_attention as flex  # noqa: PLC0415  (imports dynamo)

    s, mask = problem.sizes, problem.mask
    block_mask = None
    if mask.kinds():
        allowed = pairs_allowed(mask, s.batch, s.length, s.length)
        block_mask = flex.create_block_mask(allowed, None, None, s.length, s.length, s.device)
    compiled: Any = torch.compile(flex.flex_attention, fullgraph=True)
    options: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": s.heads != s.kv_heads}

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        out_BHTK = compiled(*(x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)), **options)
        return out_BHTK.transpose(1, 2)

    return attend


def measure(problem: Problem, repetitions: int) -> Iterator[dict[str, Any]]:
    """A row for each contender."""
    s = problem.sizes
    torch.manual_seed(0)
    leaves = [s.leaf(s.batch, s.length, n, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads)]
    first: Tensor | None = None
    for name, make in contenders(problem).items():
        row: dict[str, Any] = {"op": "attention", "kernel": name, "problem": problem.words}
        try:
            attend = make()
            out = attend(*leaves).detach().float()
            first = out if first is None else first
            row |= speeds(problem, *times(attend, leaves, repetitions))
            row["differs"] = float((out - first).abs().max())
        except Exception as error:  # noqa: BLE001  (a kernel that cannot serve says so as it likes)
            row["raises"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row
        forget_graphs()
        if s.device == "cuda":
            torch.cuda.empty_cache()


def times(attend: Attend, leaves: list[Tensor], repetitions: int) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of it with the backward pass."""
    device, grad = leaves[0].device.type, torch.randn_like(leaves[0])
    forward = milliseconds(lambda: attend(*leaves), device, repetitions)
    both = milliseconds(
        lambda: torch.autograd.grad(attend(*leaves), leaves, grad), device, repetitions
    )
    return forward, both


def speeds(problem: Problem, forward: float, total: float) -> dict[str, Any]:
    """Times in milliseconds, rates, and the share of the device's peak."""
    flops = problem.flops()
    row: dict[str, Any] = {"forward_ms": forward, "both_ms": total}
    row |= {"forward_tflops": flops / forward / 1e9, "both_tflops": 3.5 * flops / total / 1e9}
    if problem.sizes.device == "cuda":
        found = find_accelerator(torch.cuda.get_device_name())
        row["share_of_peak"] = found and 1e12 * row["both_tflops"] / found.peak("bf16")
    return row


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "raises" in row:
        return f"  {row['kernel']:<31} cannot: {row['raises']}"
    share = row.get("share_of_peak")
    return (
        f"  {row['kernel']:<31} forward {row['forward_ms']:8.3f} ms {row['forward_tflops']:6.1f} "
        f"TFLOP/s   with backward {row['both_ms']:8.3f} ms {row['both_tflops']:6.1f} TFLOP/s"
        f"{f', {share:.0%} of the peak' if share else ''}   differs by {row['differs']:.1e}"
    )


def run(arguments: Arguments) -> int:
    """Measures, prints and writes; 1 when a kernel of nanolm's could not serve."""
    figures, good = Figures(arguments.json), True
    for problem in problems(arguments.device):
        say(f"attention: {problem.words}")
        for row in measure(problem, arguments.repetitions):
            figures.add(row)
            say(line(row))
            good &= not (row["kernel"].startswith("nanolm") and "raises" in row)
    return int(not good)


if __name__ == "__main__":
    enter(Arguments, run, "attention_speed")
