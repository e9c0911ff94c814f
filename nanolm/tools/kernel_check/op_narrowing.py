"""A trial of an op cut down to what a kernel serves: fewer options, a forward pass alone, 16 bits.

Most trials combine options, and all are of float32 training unless they are about something else: a
kernel of RMSNorm alone, of bfloat16, or for evaluation would be asked next to nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch

from nanolm.ops.contract import Phase, Spec
from nanolm.tools.kernel_check.answers import refusal_of
from nanolm.tools.kernel_check.trial import Trial

NARROW = (torch.bfloat16, torch.float16)


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
            assert trial.again is not None  # `candidates` has asked
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
        o for o in GIVEN_UP.get(type(spec).__name__, ()) if getattr(spec, o.field) != o.plain
    ]
    dtypes = [spec.dtype]
    if trial.again is None:
        options = []
    elif of_one_dtype(trial) and spec.dtype in (torch.float32, *NARROW):
        dtypes += [dtype for dtype in NARROW if dtype != spec.dtype]
    for count in range(len(options) + 1):
        for left_out in itertools.combinations(options, count):
            plain = dataclasses.replace(spec, **{o.field: o.plain for o in left_out})
            for phase, dtype in itertools.product(PHASES, dtypes):
                changes = {o.field: o.argument for o in left_out}
                words = [o.words for o in left_out]
                if dtype != spec.dtype:
                    changes["dtype"] = dtype
                    words.append(f"in {str(dtype).removeprefix('torch.')}")
                words += ["forward only"] * (phase != spec.phase)
                part = Part(changes, phase, ", ".join(words))
                yield dataclasses.replace(plain, phase=phase, dtype=dtype), part


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
