"""One contestant's training step on random rows: time, tokens a second, MFU, memory, host waits.

    python -m nanolm.tools.first_contact.training --model plain-gpt --shape gpt2 [--compile true]

What is measured, and how, is `once.py`'s business; here it is given a shape of a name and put
into a line. Leaves with LEFT_OUT and a sentence when the contestant cannot take part here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from nanolm.terminal import say
from nanolm.tools.bench.admission import why_not
from nanolm.tools.bench.once import measure
from nanolm.tools.bench.shape import Shape
from nanolm.tools.first_contact.measurement import LEFT_OUT, Figures, enter

SHAPES = {
    "gpt2": Shape(
        n_layers=12, d_model=768, n_heads=12, row_length=1024, batch=16, vocab_size=50_304
    ),
    "bert": Shape(
        n_layers=12, d_model=768, n_heads=12, row_length=512, batch=32, vocab_size=30_528
    ),
    "small": Shape(n_layers=6, d_model=384, n_heads=6, row_length=256, batch=16, vocab_size=8192),
    "smoke": Shape(n_layers=2, d_model=768, n_heads=12, row_length=512, batch=4, vocab_size=512),
    "tiny": Shape(n_layers=2, d_model=32, n_heads=2, row_length=32, batch=2, vocab_size=512),
}
STEPS = {"gpt2": (6, 20), "bert": (6, 20), "small": (10, 50), "smoke": (2, 3), "tiny": (1, 2)}
"""Shape -> steps to warm up, steps that are measured."""
KERNELS = {
    "auto": {},
    "torch": {"attention": "sdpa", "norm": "torch", "linear_cross_entropy": "chunked"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Who trains what, where."""

    model: str = "nanolm"
    """nanolm, plain-gpt, plain-bert, transformers-gpt2 or transformers-bert."""
    objective: Literal["clm", "mlm"] = "clm"
    """The objective."""
    shape: Literal["gpt2", "bert", "small", "smoke", "tiny"] = "gpt2"
    """Model and batch, by name."""
    compile: bool = False
    """With torch.compile."""
    kernels: Literal["auto", "torch"] = "auto"
    """nanolm's kernels: what auto takes, or torch's own."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic."""
    device: str = "cuda"
    """Device type."""
    trace: str | None = None
    """Also record two steps with PyTorch's profiler into this file."""
    json: str | None = None
    """Also write the figures to this file."""

    @property
    def job(self) -> dict[str, Any]:
        """What `measure` (tools/bench/once.py) is to do."""
        warmup, steps = STEPS[self.shape]
        settings = {"model": self.model, "objective": self.objective, "compile": self.compile}
        return {
            "settings": settings | {"kernels": KERNELS[self.kernels]},
            "precision": self.precision,
            "shape": dataclasses.asdict(SHAPES[self.shape]),
            "device": self.device,
            "warmup": warmup,
            "steps": steps,
            **({} if self.trace is None else {"trace": self.trace}),
        }


def line(row: dict[str, Any], kernels: str) -> str:
    """The figures in words."""
    name = f"{row['contestant']} {row['objective']}{', compiled' * row['compile']}"
    name += "" if kernels == "auto" else f", {kernels}'s kernels"
    parts = [f"{row['free_step_ms']:.2f} ms a step ({row['step_ms']:.2f} with a wait after each)"]
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    parts.append("no MFU" if row["mfu"] is None else f"MFU {row['mfu']:.1%}")
    parts.append(f"peak {row['peak_bytes'] / 1e9:.2f} GB")
    if row["host_waits"] is not None:
        parts.append(f"{row['host_waits']} waits of the host a step")
    parts.append(f"loss {row['losses'][0]:.4f} to {row['losses'][1]:.4f}")
    parts.append(f"ready in {row['ready_seconds']:.0f} s")
    return f"{name}: {', '.join(parts)}"


def run(arguments: Arguments) -> int:
    """Measures, prints and writes; 1 when a loss is not finite."""
    reason = why_not(arguments.job, arguments.device)
    if reason is not None:
        say(reason)
        return LEFT_OUT
    row = measure(arguments.job) | {"kernels_asked": arguments.kernels, "size": arguments.shape}
    if "operators" in row:
        print(row.pop("operators"), flush=True)
    Figures(arguments.json).add(row)
    say(line(row, arguments.kernels))
    say(f"kernels: {row['kernels']}; {row['peak_source']}")
    return 0 if all(map(math.isfinite, row["losses"])) else 1


if __name__ == "__main__":
    enter(Arguments, run, "training")
