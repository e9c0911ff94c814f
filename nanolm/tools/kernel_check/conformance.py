"""The conformance suite: is this kernel right, for everything that it says it can serve?

It asks `why_not` for every trial first. A refusal is fine, in words; a wrong answer is not. Kernels
that refuse training but serve prefill or decoding are checked forward only.

    parity        outputs and gradients against the float64 reference, feature by feature
    leaks         hidden keys change nothing, for each kind of mask
    determinism   twice the same bits
    memory        what is saved for the backward pass does not grow with T x S
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from nanolm.ops.masks import Mask
from nanolm.registry import OPS
from nanolm.tools.kernel_check.attention_trials import HARD, SINGLE, Case, spec_of, trial_of
from nanolm.tools.kernel_check.leaks import KINDS, NAMES, leak
from nanolm.tools.kernel_check.op_trials import op_trials
from nanolm.tools.kernel_check.trial import (
    TOLERANCE,
    Trial,
    distance,
    errors,
    execute,
    forget_graphs,
    reference,
)

MASK_OF = {kind: kind for kind in ("causal", "window", "lengths", "documents", "prefix")} | {
    "order": "order",
    "strict order": "order",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's verdict: "pass", "FAIL" or "refused", and what there is to say."""

    check: str
    verdict: str
    words: str = ""


Check = Callable[[Any, str], Finding]
"""What is done with a kernel on a device."""


def check_kernel(
    op: str, kernel: Any, device: str = "cpu", *, quick: bool = False
) -> list[Finding]:
    """All findings about a kernel of an op. Raises ValueError for an unknown op."""
    return [check(kernel, device) for check in checks_of(op, quick=quick)]


def checks_of(op: str, *, quick: bool = False) -> list[Check]:
    """The suite of an op, each check by itself. Raises ValueError for an unknown op."""
    if op not in OPS:
        raise ValueError(f"there is no op {op!r}; choose from {', '.join(OPS)}")
    if op != "attention":
        return [trial_check(op, number) for number in range(len(op_trials(op)))]
    cases = SINGLE | ({} if quick else HARD)
    return [
        *(case_check(name, case) for name, case in cases.items()),
        *(leak_check(kind) for kind in KINDS),
        check_determinism,
        check_memory,
    ]


def trial_check(op: str, number: int) -> Check:
    """Parity on the op's trial of this number."""
    return lambda kernel, device: check_trial(kernel, op_trials(op, device)[number])


def case_check(name: str, case: Case) -> Check:
    """Parity on this attention problem."""
    return lambda kernel, device: check_case(kernel, name, case, device)


def leak_check(kind: str) -> Check:
    """No leak through this kind of mask."""
    return lambda kernel, device: check_leak(kernel, kind, device)


def serving(kernel: Any, case: Case, device: str) -> tuple[Case | None, str]:
    """The case in the first phase that the kernel serves, or (None, its reason)."""
    reason = ""
    for phase in ("train", "prefill", "decode"):
        if phase == "decode" and case.n_queries != 1:
            case = dataclasses.replace(case, n_queries=1)
        candidate = dataclasses.replace(case, phase=phase)
        refusal = kernel.why_not(spec_of(candidate, device))
        if refusal is None:
            return candidate, ""
        reason = reason or refusal
    return None, reason


def check_case(kernel: Any, name: str, case: Case, device: str) -> Finding:
    """Parity on one attention problem; a mask that is ignored is named."""
    served, reason = serving(kernel, case, device)
    if served is None:
        return Finding(name, "refused", reason)
    return told(name, lambda: explained(kernel, served, name, device))


def explained(kernel: Any, case: Case, name: str, device: str) -> Finding:
    """Parity, where a failure that comes of an ignored mask says so."""
    finding = parity(kernel, trial_of(case, device), name)
    if finding.verdict == "FAIL" and name in MASK_OF and ignores(kernel, case, name, device):
        label = NAMES.get(name, f"the mask kind {name!r}")
        words = f"it ignores {label}: its output is that of attention without this mask"
        return Finding(name, "FAIL", words)
    return finding


def ignores(kernel: Any, case: Case, name: str, device: str) -> bool:
    """Whether the kernel's output equals the reference's without the mask kind."""
    trial = trial_of(case, device)
    without = trial_of(case, device, mask=Mask(causal=name == "prefix"))
    actual = execute(trial, kernel, case.dtype, backward=False).outputs["out"]
    plain = execute(without, reference("attention"), torch.float64, backward=False).outputs["out"]
    return distance(actual, plain) < TOLERANCE[case.dtype]


def check_trial(kernel: Any, trial: Trial, name: str | None = None) -> Finding:
    """Parity on one trial."""
    name = name or trial.name
    reason = kernel.why_not(trial.spec)
    if reason is not None:
        return Finding(name, "refused", reason)
    return told(name, lambda: parity(kernel, trial, name))


def told(name: str, work: Callable[[], Finding]) -> Finding:
    """The finding, or that the kernel raises: a foreign one may raise anything."""
    forget_graphs()
    try:
        return work()
    except Exception as error:  # noqa: BLE001  (it is reported)
        return Finding(name, "FAIL", f"it raises {type(error).__name__}: {error}")


def parity(kernel: Any, trial: Trial, name: str) -> Finding:
    """How far outputs and gradients are from the reference's, and whether they have their dtype."""
    found = errors(trial, kernel)
    dtype = next(iter(execute(trial, kernel, trial.spec.dtype, backward=False).outputs.values()))
    worst = max(found, key=found.get)
    limit = TOLERANCE[trial.spec.dtype]
    if not found[worst] < limit:
        words = f"{worst} is off by {found[worst]:.1e} of its largest value, {limit:.0e} allowed"
        return Finding(name, "FAIL", words)
    if dtype.dtype not in (trial.spec.dtype, torch.float32, torch.float64):
        return Finding(name, "FAIL", f"its output is {dtype.dtype}")
    forward = "" if trial.differentiable else ", forward only"
    return Finding(name, "pass", f"{found[worst]:.0e}{forward}")


def check_leak(kernel: Any, kind: str, device: str) -> Finding:
    """Hidden keys change nothing."""
    name = f"leak: {kind}"
    served, reason = serving(kernel, SINGLE[kind], device)
    if served is None or served.phase == "decode":
        return Finding(name, "refused", reason)

    def work() -> Finding:
        words = leak(kernel, kind, device)
        return Finding(name, "pass") if words is None else Finding(name, "FAIL", words)

    return told(name, work)


def check_determinism(kernel: Any, device: str) -> Finding:
    """The same bits twice."""
    served, reason = serving(kernel, SINGLE["causal"], device)
    if served is None:
        return Finding("determinism", "refused", reason)
    return told("determinism", lambda: same_twice(kernel, served, device))


def same_twice(kernel: Any, case: Case, device: str) -> Finding:
    """Which results of two runs are not bit-equal."""
    trial = trial_of(case, device)
    runs = [
        execute(trial, kernel, case.dtype, backward=trial.differentiable).tensors for _ in range(2)
    ]
    changed = [name for name, x in runs[0].items() if not torch.equal(x, runs[1][name])]
    if changed:
        return Finding("determinism", "FAIL", f"{', '.join(changed)} differ between two runs")
    return Finding("determinism", "pass")


def check_memory(kernel: Any, device: str) -> Finding:
    """Bytes saved for the backward pass, against those of q, k, v, out and lse."""
    served, reason = serving(kernel, Case(n_rows=1, n_queries=128, n_keys=128), device)
    if served is None or served.phase != "train":
        return Finding("memory", "refused", reason)
    return told("memory", lambda: kept(kernel, served, device))


def kept(kernel: Any, case: Case, device: str) -> Finding:
    """What a forward pass keeps for the backward one."""
    trial = trial_of(case, device)
    leaves = {name: x.detach().requires_grad_() for name, x in trial.leaves.items()}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        trial.run(kernel, leaves)
    n_bytes = sum(saved.values())
    needed = sum(x.untyped_storage().nbytes() for x in leaves.values()) * 4 // 3
    needed += case.n_heads * case.n_queries * 4
    words = f"{n_bytes} bytes saved, {needed} for q, k, v, out and lse"
    quadratic = case.n_heads * case.n_queries * case.n_keys * 4
    if n_bytes >= needed + quadratic:
        return Finding("memory", "pass", f"{words}: it keeps [T, S] weights")
    return Finding("memory", "pass", words)
