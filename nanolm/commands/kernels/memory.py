"""`nanolm kernels memory`: peak memory of the projected cross-entropy, forward and backward.

Each kernel runs in a process of its own. What is counted is what the op adds to its inputs: on a
CPU the growth of the largest resident set, on a GPU of the largest allocation.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
from typing import Any, Literal

import torch

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.distributed.devices import device_type
from nanolm.errors import UserError
from nanolm.ops.contract import CrossEntropySpec, candidates
from nanolm.tables import show, tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The size of the problem."""

    tokens: Count = 8192
    """Tokens."""
    vocab_size: Count = 50304
    """Vocabulary."""
    width: Count = 64
    """Model width; small, so that the matrices do not hide the logits."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device type."""
    json: str | None = None
    """Also write the table here."""

    def __post_init__(self) -> None:
        device_type(self.device)  # refuses one that is not here


def peak(device: str) -> int:
    """Bytes: the largest that this process has held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, arguments: Arguments, results: Any) -> None:
    """Puts (name, bytes that the op added) into the queue."""
    kernel = candidates("linear_cross_entropy")[name]
    a = arguments
    hidden = torch.randn(a.tokens, a.width, device=a.device, requires_grad=True)
    weight = torch.randn(a.vocab_size, a.width, device=a.device, requires_grad=True)
    targets = torch.randint(a.vocab_size, (a.tokens,), device=a.device)
    tiny = [x[:2].detach().requires_grad_() for x in (hidden, weight)]
    kernel.run(*tiny, None, targets[:2] % 2).loss.backward()  # what libraries allocate once
    before = peak(a.device)
    kernel.run(hidden, weight, None, targets).loss.backward()
    results.put((name, peak(a.device) - before))


def run(arguments: Arguments) -> None:
    """Measure every kernel that `auto` may take here, and the reference."""
    spec = CrossEntropySpec(
        width=arguments.width, vocab_size=arguments.vocab_size, device=arguments.device
    )
    context = multiprocessing.get_context("spawn")
    table = []
    for name, kernel in candidates("linear_cross_entropy").items():
        by_name = arguments.device in getattr(kernel, "only_by_name_on", ())
        if by_name or kernel.why_not(spec) is not None:
            continue
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(name, arguments, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise UserError(f"{name} ended with status {process.exitcode}; try fewer --tokens")
        table.append({"kernel": name, "bytes": results.get()[1]})
    plain = next(row["bytes"] for row in table if row["kernel"] == "reference")
    for row in table:
        row["share"] = row["bytes"] / plain if plain else None  # so small a problem adds nothing
    shares = ["-" if row["share"] is None else f"{row['share']:.3f}" for row in table]
    cells = [
        [row["kernel"], f"{row['bytes'] / 1e6:.1f}", share]
        for row, share in zip(table, shares, strict=True)
    ]
    show(*tables(["kernel", "MB", "of reference"], cells))
    write_json(arguments.json, table)
