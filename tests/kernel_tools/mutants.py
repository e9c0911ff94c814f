"""Planted bugs: the project's own kernels with one line changed, and which check finds each.

A mutant is a copy of the kernel files in a package of its own, with its own operators, so that it
can run beside the real ones. Three checks look at it: `numbers` (against the float64 reference),
`sanitizer` (bounds, races) and `poison` (numbers again, with undefined lanes poisoned).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib
import sys
from typing import Any

import torch

from nanolm.ops.reference import AttentionOutput
from nanolm.tools.kernel_check.attention_trials import SINGLE, Case, trial_of
from nanolm.tools.kernel_check.op_trials import norm_trial
from nanolm.tools.kernel_check.sanitizer import sanitized
from nanolm.tools.kernel_check.trial import TOLERANCE, Trial, errors
from nanolm.tools.kernel_check.watch import KernelFaultError

FILES = (
    "attention.forward",
    "attention.scores",
    "attention.ranges",
    "attention.backward",
    "attention.bias_gradient",
    "attention.call",
    "attention.operator",
    "norm",
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One changed place: `old` in `file` becomes `new`; `case` names the trial that shows it."""

    name: str
    file: str
    old: str
    new: str
    case: str = "plain"


SMALL = {"n_queries": 20, "n_keys": 20, "n_rows": 1, "n_heads": 1, "n_kv_heads": 1}
CASES = {name: dataclasses.replace(case, **SMALL) for name, case in SINGLE.items()} | {
    "lengths": dataclasses.replace(SINGLE["lengths"], **SMALL | {"n_rows": 2}),
    "grouped heads": dataclasses.replace(SINGLE["grouped heads"], n_queries=20, n_keys=20),
    "two rows": Case(**SMALL | {"n_rows": 2}),
    "more keys": Case(**SMALL | {"n_keys": 37}, causal=True),
    "narrow": Case(**SMALL, width=20),
}

MUTANTS = (
    Mutant(
        "load without row mask", "attention.scores",
        "inside = (row < n_rows) & (column < WIDTH)\n        return tl.load",
        "inside = (row >= 0) & (column < WIDTH)\n        return tl.load",
    ),
    Mutant(
        "padded columns left undefined", "attention.scores",
        "tl.load(pointers, mask=inside, other=0.0)", "tl.load(pointers, mask=inside)", "narrow",
    ),
    Mutant(
        "store without row mask", "attention.scores",
        "inside = (row < n_rows) & (column < WIDTH)\n    tl.store",
        "inside = (row >= 0) & (column < WIDTH)\n    tl.store", "two rows",
    ),
    Mutant(
        "dQ without scale", "attention.backward",
        "store_tile(grad_q, grad_q_head, total * scale", "store_tile(grad_q, grad_q_head, total",
    ),
    Mutant(
        "causal aligned top-left", "attention.scores",
        "at = t + (shape.n_keys - shape.n_queries)", "at = t + 0", "more keys",
    ),
    Mutant(
        "key lengths ignored", "attention.scores",
        "allowed = allowed & (s < tl.load(masks.key_lengths + batch))", "allowed = allowed",
        "lengths",
    ),
    Mutant(
        "window one too wide", "attention.scores",
        "(at - s < masks.window)", "(at - s <= masks.window)", "window",
    ),
    Mutant(
        "documents ignored", "attention.scores",
        "allowed = allowed & (mine == theirs)", "allowed = allowed", "documents",
    ),
    Mutant(
        "strict order taken as loose", "attention.scores",
        "(theirs < mine) if STRICT", "(theirs <= mine) if STRICT", "strict order",
    ),
    Mutant(
        "last visible tile skipped", "attention.ranges",
        "end = tl.minimum(end, tl.maximum(high + 1, prefix))",
        "end = tl.minimum(end, tl.maximum(high - 15, prefix))", "causal",
    ),
    Mutant(
        "running sum not rescaled", "attention.forward",
        "acc * shrink[:, None] + update", "acc + update",
    ),
    Mutant(
        "division by an empty row's sum", "attention.forward",
        "divisor = tl.where(seen, l, 1.0)", "divisor = l", "lengths",
    ),
    Mutant(
        "wrong key head for a query head", "attention.forward",
        "k_head = head_pointer(k, batch, head // GROUP)",
        "k_head = head_pointer(k, batch, head % (shape.n_heads // GROUP))", "grouped heads",
    ),
    Mutant(
        "all groups write dK of head 0", "attention.backward",
        "grad_k_head = head_pointer(grad_k, batch, group)",
        "grad_k_head = head_pointer(grad_k, batch, group * 0)", "grouped heads",
    ),
    Mutant(
        "delta forgotten", "attention.backward",
        "weight * (grad_weight - delta_tile)", "weight * grad_weight",
    ),
    Mutant(
        "slope of the soft-cap forgotten", "attention.backward",
        "grad_dots = grad_score * slope", "grad_dots = grad_score", "soft-cap",
    ),
    Mutant(
        "bucket bias one off", "attention.scores",
        "distance + (shape.n_queries - 1)", "distance + shape.n_queries", "bucket bias",
    ),
    Mutant(
        "bucket gradient of the neighbour", "attention.bias_gradient",
        "index = difference + shape.n_keys - 1", "index = difference + shape.n_keys",
        "bucket bias",
    ),
    Mutant(
        "programs add to one row without atomics", "norm",
        "own = tl.program_id(0) * WIDTH + column\n    tl.store(grad_weight + own, sum_weight",
        "own = tl.program_id(0) * 0 + column\n"
        "    sum_weight += tl.load(grad_weight + own, mask=column < WIDTH, other=0.0)\n"
        "    tl.store(grad_weight + own, sum_weight", "norm",
    ),
)  # fmt: skip


class MutantKernel:
    """A mutant's operators behind the contract's `run`."""

    def __init__(self, package: str, op: str) -> None:
        self.op = op
        self.module = importlib.import_module(
            f"{package}.{'attention.operator' if op == 'attention' else op}"
        )

    def run(self, *args: Any, return_lse: bool = False, **kwargs: Any) -> Any:
        """As the real kernel."""
        if self.op == "norm":
            return self.module.norm(*args, **kwargs)
        out, lse = self.module.attention(*args, **kwargs)
        return AttentionOutput(out, lse) if return_lse else out


def build(mutant: Mutant | None, index: int, folder: pathlib.Path) -> MutantKernel:
    """Writes the mutated kernels into a package under `folder` and imports them; with no mutant
    the copy is unchanged. Raises ValueError when the place to change is not there once."""
    package = f"mutant_{index}"
    target = folder / package
    (target / "attention").mkdir(parents=True)
    source = pathlib.Path(importlib.import_module("nanolm.kernels.launch").__file__).parent
    for name in FILES:
        file = f"{name.replace('.', '/')}.py"
        text = (source / file).read_text(encoding="utf-8")
        if mutant is not None and name == mutant.file:
            if text.count(mutant.old) < 1:
                raise ValueError(f"{mutant.name}: {file} has no {mutant.old!r}")
            text = text.replace(mutant.old, mutant.new)
            if name == "norm":  # what is added to must start at zero
                text = text.replace("grad_weight = mean.new_empty", "grad_weight = mean.new_zeros")
        for other in FILES:
            text = text.replace(f"nanolm.kernels.{other} ", f"{package}.{other} ")
        text = text.replace(
            "from nanolm.kernels.attention import", f"from {package}.attention import"
        )
        text = text.replace('"nanolm::', f'"{package}::').replace("ops.nanolm.", f"ops.{package}.")
        (target / file).write_text(text, encoding="utf-8")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return MutantKernel(package, "norm" if mutant and mutant.file == "norm" else "attention")


def trial_for(mutant: Mutant) -> Trial:
    """The inputs on which the mutant is looked at."""
    if mutant.case == "norm":
        return norm_trial(
            "rmsnorm", 300, 24, bias=False, residual=False, dtype=torch.float32, device="cpu"
        )
    return trial_of(CASES[mutant.case], lse=True)


def wrong(trial: Trial, kernel: MutantKernel) -> bool:
    """Whether numbers differ from the reference."""
    worst = max(errors(trial, kernel).values())
    return not (worst < TOLERANCE[trial.spec.dtype]) or math.isnan(worst)


def verdict(mutant: Mutant, kernel: MutantKernel) -> dict[str, str]:
    """What each check says: "found", "-", or "unsafe" where the bug may not run unwatched because
    it writes into memory that is not its own."""
    trial = trial_for(mutant)
    found = {"numbers": "-", "sanitizer": "-", "poison": "-"}
    unsafe = False
    try:
        with sanitized():
            poisoned = wrong(trial, kernel)
    except KernelFaultError as fault:
        found["sanitizer"] = "found"
        unsafe = "out of bounds" in str(fault)
        poisoned = False
    if unsafe:
        found["numbers"] = "unsafe"
    elif wrong(trial, kernel):
        found["numbers"] = "found"
    elif poisoned:
        found["poison"] = "found"
    return found


def table(verdicts: dict[str, dict[str, str]]) -> str:
    """The verdicts as text, one line per mutant."""
    width = max(map(len, verdicts))
    checks = list(next(iter(verdicts.values())))
    lines = [f"{'planted bug':<{width}}  " + "  ".join(checks)]
    for name, found in verdicts.items():
        cells = (f"{found[check]:<{len(check)}}" for check in checks)
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)
