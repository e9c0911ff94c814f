"""A trial of an op cut down to what a kernel serves: fewer options, sizes of whole blocks, 16 bits,
a forward pass alone.

Most trials combine options, their sizes are odd, and all are of float32 training unless they are
about something else: a kernel of RMSNorm alone, of widths by 128, of bfloat16, or for evaluation
would be asked next to nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch

from nanolm.ops.contract import Phase, Spec
from nanolm.tools.kernel_check.answers import refusal_of
from nanolm.tools.kernel_check.op_trials import BF16, FP16, FP32
from nanolm.tools.kernel_check.trial import Trial

NARROW = (BF16, FP16)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option that a trial may be asked without: in words, in its spec, and the argument that the
    trial is made with."""

    words: str
    field: str
    plain: Any
    argument: Any


GIVEN_UP = {
    "NormSpec": (
        Option("without a residual", "residual", False, False),
        Option("without a bias", "bias", False, False),
        Option("as RMSNorm", "kind", "rmsnorm", "rmsnorm"),
    ),
    "GluSpec": (Option("as GEGLU", "kind", "geglu", "geglu"),),
    "CrossEntropySpec": (
        Option("without z-loss", "z_loss", False, 0.0),
        Option("without label smoothing", "label_smoothing", False, 0.0),
        Option("without a soft-cap", "softcap", None, None),
        Option("without a bias", "bias", False, False),
    ),
}
"""By spec, the first given up before the others."""

SIZES = {
    "NormSpec": {"width": "width"},
    "GluSpec": {"width": "width"},
    "CrossEntropySpec": {"width": "width", "vocab_size": "vocab_size"},
    "RotarySpec": {"head_dim": "width"},
    "SymmetricProductSpec": {"rows": "n_rows", "columns": "n_columns"},
}
"""By spec, the fields that are sizes, and the arguments that trials are made with."""
STEPS = (1, 64, 128, 1024)
"""What sizes are rounded up to a multiple of, for kernels of whole blocks."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a kernel serves of a trial."""

    changes: Mapping[str, Any]
    """Arguments of the trial that are other than it has them."""
    phase: Phase
    words: str
    """How the part differs from the whole; empty when it does not."""

    def of(self, trial: Trial) -> Trial:
        """This part of a trial of the same options."""
        if self.changes:
            assert trial.again is not None  # `parts` changes what is among its arguments
            trial = trial.again(**self.changes)
        if self.phase == trial.spec.phase:
            return trial
        return dataclasses.replace(trial, spec=dataclasses.replace(trial.spec, phase=self.phase))


def of_one_dtype(trial: Trial) -> bool:
    """Whether all that learns has the dtype of the spec, in no autocast region: then another dtype
    makes sense of the trial too."""
    dtypes = {x.dtype for x in trial.leaves.values()}
    return dtypes == {trial.spec.dtype} and trial.autocast is None


PHASES = get_args(Phase)


def parts(trial: Trial) -> Iterator[tuple[Spec, Part]]:
    """(spec, part) of every part of a trial, the whole first, then with fewer and fewer options."""
    spec = trial.spec
    options = [
        option
        for option in GIVEN_UP.get(type(spec).__name__, ())
        if getattr(spec, option.field) != option.plain and option.field in trial.arguments
    ]
    dtypes = [spec.dtype]
    if "dtype" in trial.arguments and of_one_dtype(trial) and spec.dtype in (FP32, *NARROW):
        dtypes += [dtype for dtype in NARROW if dtype != spec.dtype]
    steps = list(STEPS) if set(sizes_of(spec).values()) <= trial.arguments else [1]
    for count in range(len(options) + 1):
        for left_out in itertools.combinations(options, count):
            for step, phase, dtype in itertools.product(steps, PHASES, dtypes):
                yield part_of(trial, left_out, step, phase, dtype)


def sizes_of(spec: Spec) -> Mapping[str, str]:
    """The spec's fields that are sizes, and the arguments that trials are made with."""
    return SIZES.get(type(spec).__name__, {})


def part_of(
    trial: Trial, left_out: Sequence[Option], step: int, phase: Phase, dtype: torch.dtype
) -> tuple[Spec, Part]:
    """(spec, part) of a trial without these options, at multiples of a step."""
    spec = trial.spec
    larger = {field: -(-getattr(spec, field) // step) * step for field in sizes_of(spec)}
    moved = {field: size for field, size in larger.items() if size != getattr(spec, field)}
    changes: dict[str, Any] = {option.field: option.argument for option in left_out}
    changes |= {sizes_of(spec)[field]: size for field, size in moved.items()}
    words = [option.words for option in left_out]
    words += [f"at multiples of {step}"] * bool(moved)
    if dtype != spec.dtype:
        changes["dtype"] = dtype
        words.append(f"in {str(dtype).removeprefix('torch.')}")
    words += ["forward only"] * (phase != spec.phase)
    fields: dict[str, Any] = {option.field: option.plain for option in left_out}
    fields |= moved | {"phase": phase, "dtype": dtype}
    return dataclasses.replace(spec, **fields), Part(changes, phase, ", ".join(words))


def part_served(kernel: Any, trial: Trial, device: str | None = None) -> tuple[Part | None, str]:
    """(the first part that the kernel serves, "") or (None, why it refuses the whole); `device` is
    one that it is asked about instead of the trial's."""
    whole = ""
    for spec, part in parts(trial):
        reason = refusal_of(kernel, dataclasses.replace(spec, device=device or spec.device))
        if reason is None:
            return part, ""
        whole = whole or reason
    return None, whole
