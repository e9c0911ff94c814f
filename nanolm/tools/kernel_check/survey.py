"""All kernels that serve a device, each against its reference there.

Kernels are compiled when they are first called, hundreds of them: several processes share the
checks, and find what one would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from nanolm.errors import UserError
from nanolm.ops.contract import (
    AttentionSpec,
    CrossEntropySpec,
    GluSpec,
    LinearSpec,
    NormSpec,
    RotarySpec,
    Spec,
    SymmetricProductSpec,
    candidates,
    choose,
)
from nanolm.registry import OPS
from nanolm.tools.kernel_check.apart import Elsewhere, Here, ProcessEndedError, Worker
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.examination import errands, silent
from nanolm.tools.kernel_check.workers import findings

MOST_JOBS = 8
"""Processes that share a GPU unless `jobs` says otherwise: each holds a context there."""


def typical(op: str, device: str, *, head_dim: int = 64, causal: bool = True) -> Spec:
    """The spec that kernels of an op are asked about."""
    specs: dict[str, Callable[[], Spec]] = {
        "attention": lambda: AttentionSpec(
            n_heads=8, n_kv_heads=8, head_dim=head_dim, causal=causal, device=device
        ),
        "linear": lambda: LinearSpec(device=device),
        "linear_cross_entropy": lambda: CrossEntropySpec(
            width=512, vocab_size=32000, device=device
        ),
        "norm": lambda: NormSpec(kind="rmsnorm", width=512, device=device),
        "rotary": lambda: RotarySpec(head_dim=head_dim, device=device),
        "glu": lambda: GluSpec(kind="swiglu", width=1408, device=device),
        "symmetric_product": lambda: SymmetricProductSpec(rows=512, columns=1408, device=device),
    }
    return specs[op]()


def describe(device: str) -> str:
    """Device and versions, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, {triton_version()}"


def triton_version() -> str:
    """Triton's version by the module itself: it comes in packages of several names."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    return f"triton {importlib.import_module('triton').__version__}"


@dataclasses.dataclass(frozen=True)
class Patient:
    """A kernel that can serve the device, and whether `auto` takes it."""

    op: str
    kernel: str
    auto: bool


def patients(device: str) -> list[Patient]:
    """All kernels to check, op by op."""
    found = []
    for op in OPS:
        spec = typical(op, device)
        chosen = choose(op, spec).kernel.name
        for name, kernel in candidates(op).items():
            if name != "reference" and kernel.why_not(spec) is None:
                found.append(Patient(op, name, name == chosen))
    return found


def default_jobs(device: str) -> int:
    """As many processes as cores compile for a GPU, up to a limit; a CPU computes with one."""
    return 1 if device == "cpu" else min(os.cpu_count() or 1, MOST_JOBS)


@dataclasses.dataclass(frozen=True)
class Roll:
    """Imports modules and finds the kernels to check, as a process can be sent it."""

    device: str
    plugins: tuple[str, ...]

    def run(self) -> tuple[list[Patient], list[str]]:
        """The kernels, and a sentence about each module that registers none."""
        sentences = silent(self.plugins)
        return patients(self.device), sentences


def called(roll: Roll) -> tuple[list[Patient], list[str]]:
    """What the roll gives, by a process of its own when strangers' modules are imported for it;
    raises UserError when that ends the process."""
    worker: Worker = Elsewhere(roll.device) if roll.plugins else Here()
    try:
        return worker.ask(roll)
    except ProcessEndedError as error:
        names = ", ".join(roll.plugins)
        raise UserError(f"plugins: the process that imports {names} {error}") from None
    finally:
        worker.close()


def survey(
    device: str,
    *,
    quick: bool,
    jobs: int,
    plugins: Sequence[str] = (),
    began: Callable[[str], None] = lambda name: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> Iterator[tuple[Patient, list[Finding]]]:
    """Each kernel with its findings, in order, as they come; `jobs` processes share the checks, and
    import the plug-ins. `began` is told what is waited for, `note` what there is to say first."""
    found, sentences = called(Roll(device, tuple(plugins)))
    for sentence in sentences:
        note(sentence)
    waiting = {
        patient: errands(patient.op, patient.kernel, device, quick=quick) for patient in found
    }
    stream = findings([errand for todo in waiting.values() for errand in todo], jobs, plugins)
    with contextlib.closing(stream):
        for patient, todo in waiting.items():
            told = []
            for errand in todo:
                began(f"{patient.op} {patient.kernel}: {errand.name}")
                told.append(next(stream))
            yield patient, told
