"""All kernels that serve a device, each against its reference there.

Kernels are compiled when they are first called, hundreds of them: several processes share the
checks, and find what one would.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import torch

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
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.workers import errands, findings

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


def survey(
    device: str, *, quick: bool, jobs: int, plugins: Sequence[str] = ()
) -> Iterator[tuple[Patient, list[Finding]]]:
    """Each kernel with its findings, in order, as they come; `jobs` processes share the checks, and
    import the plug-ins."""
    waiting = {
        patient: errands(patient.op, patient.kernel, device, quick=quick)
        for patient in patients(device)
    }
    stream = findings([errand for todo in waiting.values() for errand in todo], jobs, plugins)
    for patient, todo in waiting.items():
        yield patient, list(itertools.islice(stream, len(todo)))
