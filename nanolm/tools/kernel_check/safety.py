"""Triton kernels of outsiders under the sanitizer, as those of this project are in the tests.

A kernel may be right on the numbers that were tried and wrong all the same: it reads beyond a
tensor, two of its programs write one element, or it counts on what lies in masked lanes. What a GPU
does then is luck; in Triton's interpreter, on any CPU, it is seen. `memory_finding` watches the
trials of an op in this process, which must have been started with TRITON_INTERPRET=1;
`watched_elsewhere` starts one that is.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from nanolm.config.load import import_plugins
from nanolm.ops.contract import candidates
from nanolm.processes import python_path
from nanolm.tools.kernel_check.attention_cases import HARD, LARGE, SINGLE
from nanolm.tools.kernel_check.attention_trials import trial_of
from nanolm.tools.kernel_check.conformance import Finding, refusal_of
from nanolm.tools.kernel_check.op_suites import op_trials
from nanolm.tools.kernel_check.trial import Trial, excess, execute

NAME = "memory"
UNSAFE = "the other checks are left out, as it would write over memory that is not its own"


def interpreted() -> bool:
    """Whether Triton, if it is there, runs kernels in its interpreter."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and os.environ.get("TRITON_INTERPRET") == "1"


def prepare_interpreter() -> None:
    """Makes the interpreter compute as a GPU does, before a kernel of anyone runs in it: as it
    stands it multiplies the bit patterns of bfloat16."""
    if interpreted():
        importlib.import_module("nanolm.kernels.launch")


def watched_trials(op: str) -> Iterator[Trial]:
    """The trials of an op that are watched: single features, odd widths, many rows and heads."""
    if op != "attention":
        yield from op_trials(op)
        return
    others = ("head of 20", "one query, many keys", "nine rows", "eighteen heads")
    cases = SINGLE | {name: (HARD | LARGE)[name] for name in others}
    for name, case in cases.items():
        for phase in ("train", "prefill", "decode"):
            if phase != "decode" or case.n_queries == 1:
                trial = trial_of(dataclasses.replace(case, phase=phase))
                yield dataclasses.replace(trial, name=name)


def served(kernel: Any, trial: Trial) -> bool:
    """Whether the kernel takes the trial's problem, here or on the GPU that it is meant for."""
    specs = (trial.spec, dataclasses.replace(trial.spec, device="cuda"))
    return any(refusal_of(kernel, spec) is None for spec in specs)


def memory_finding(op: str, kernel: Any) -> Finding | None:
    """What the sanitizer sees, or None when the kernel launches nothing that it could watch.

    The first fault ends it. Call it in a process with TRITON_INTERPRET=1.
    """
    launches: dict[str, int] = {}
    n_watched = 0
    for trial in watched_trials(op):
        if not served(kernel, trial):
            continue
        try:
            words = memory_fault(kernel, trial, launches)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (parity tells it; here it could not be watched)
            words = f"not watched: in the interpreter it raises {type(error).__name__}: {error}"
            return Finding(NAME, "refused", f"{trial.name}: {words}")
        if words is not None:
            return Finding(NAME, "FAIL", f"{trial.name}: {words}")
        if not launches:
            return None
        n_watched += 1
    if not n_watched:
        return None
    return Finding(NAME, "pass", f"{n_watched} trials of {', '.join(sorted(launches))} watched")


def memory_fault(kernel: Any, trial: Trial, launches: dict[str, int]) -> str | None:
    """A sentence about what the kernel does with memory on one trial, or None; counts launches."""
    from nanolm.tools.kernel_check.sanitizer import sanitized  # noqa: PLC0415  (imports Triton)
    from nanolm.tools.kernel_check.watch import KernelFaultError  # noqa: PLC0415

    try:
        with sanitized() as traffic:
            found = execute(trial, kernel, backward=trial.differentiable)
    except KernelFaultError as error:
        return f"{error}; {UNSAFE}" if "store of" in str(error) else str(error)
    for name, count in traffic.launches.items():
        launches[name] = launches.get(name, 0) + count
    off = excess(trial, found)
    wrong = [name for name, share in off.items() if not share < 1]
    if not wrong:
        return None
    plain = excess(trial, execute(trial, kernel, backward=trial.differentiable))
    wrong = [name for name in wrong if plain[name] < 1]
    if not wrong:
        return None  # its numbers are wrong whatever lies in masked lanes, which parity tells
    return (
        f"its {', '.join(wrong)} depend on masked lanes, which are undefined on a GPU: a load with "
        f"`mask` and without `other` whose hidden lanes are used"
    )


def watched_elsewhere(module: str | None, op: str, name: str) -> Finding | None:
    """`memory_finding` by a process of its own, in Triton's interpreter, without this one's GPU."""
    words = [sys.executable, "-m", __name__, module or "", op, name]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return Finding(
            NAME, "refused", f"not watched: the process that interprets it ended: {last}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else Finding(**found)


def has_triton(kernel: Any) -> bool:
    """Whether a module of the kernel's package holds a Triton function."""
    if "triton" not in sys.modules:
        return False
    kind = importlib.import_module("triton.runtime.jit").KernelInterface
    package = type(kernel).__module__.partition(".")[0]
    near = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == package]
    return any(isinstance(value, kind) for module in near for value in vars(module).values())


def main() -> None:
    """The process of `watched_elsewhere`: prints the finding, as JSON, on its last line."""
    module, op, name = sys.argv[1:]
    prepare_interpreter()
    candidates(op)
    if module:
        import_plugins([module])
    finding = memory_finding(op, candidates(op)[name])
    print("\n" + json.dumps(finding and dataclasses.asdict(finding)))


if __name__ == "__main__":
    main()
