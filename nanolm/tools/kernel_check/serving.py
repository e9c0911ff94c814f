"""What a kernel serves of an attention problem: in which phase and dtype, and at home.

Kernels that are fast serve few widths of heads, or causal layers alone, and all problems of the
suite are small. So a kernel that refuses the plain problem is asked where it is at home, and all
problems are moved there: with its width, or with causality.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, get_args

import torch

from nanolm.ops.contract import Phase
from nanolm.tools.kernel_check.answers import refusal_of
from nanolm.tools.kernel_check.attention_cases import LARGE, SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import spec_of, trial_of
from nanolm.tools.kernel_check.trial import Trial

NARROW = (torch.float16, torch.bfloat16)
WIDTHS = (Case().width, 64, 128, 32)
"""Of heads, in the order in which a kernel is asked about them."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """Finds what a kernel serves on a device, in the first of some phases."""

    kernel: Any
    device: str
    phases: Sequence[Phase] = get_args(Phase)

    def __call__(self, case: Case) -> tuple[Case | None, str]:
        """The case as the kernel serves it, at home if need be, or (None, its reason)."""
        served, reason = self.as_it_is(case)
        if served is not None:
            return served, ""
        for count in range(1, len(self.home) + 1):
            for moved in itertools.combinations(self.home.items(), count):
                served, _ = self.as_it_is(dataclasses.replace(case, **dict(moved)))
                if served is not None:
                    return served, ""
        return None, reason

    @functools.cached_property
    def home(self) -> dict[str, Any]:
        """The fields in which the plainest problem that is served differs from the plain one."""
        for causal, width in itertools.product((False, True), WIDTHS):
            if self.as_it_is(Case(width=width, causal=causal))[0] is not None:
                fields = {"width": width, "causal": causal}
                return {k: value for k, value in fields.items() if value != getattr(Case(), k)}
        return {}

    def as_it_is(self, case: Case) -> tuple[Case | None, str]:
        """The case in the first phase that the kernel serves, or (None, its reason). One in float32
        is put to a kernel of 16 bits in these: it would be tried on a handful of cases otherwise.
        """
        reason = ""
        dtypes = (case.dtype, *(NARROW if case.dtype == torch.float32 else ()))
        for phase, dtype in itertools.product(self.phases, dtypes):
            candidate = dataclasses.replace(case, phase=phase, dtype=dtype)
            if phase == "decode" and case.n_queries != 1:
                candidate = dataclasses.replace(candidate, n_queries=1)
            refusal = refusal_of(self.kernel, spec_of(candidate, self.device))
            if refusal is None:
                return candidate, ""
            reason = reason or refusal
        return None, reason


def served_trial(kernel: Any, name: str, device: str) -> Trial:
    """An attention problem in the first phase that is served, or in training."""
    case = (SINGLE | LARGE)[name]
    served, _ = Serving(kernel, device)(case)
    return trial_of(served or case, device)


def what_was_tried(case: Case, served: Case) -> str:
    """How the case that was served differs from the one that was asked for."""
    words = [] if served.phase == "train" else ["forward only"]
    if served.causal != case.causal:
        words.insert(0, "causal")
    if served.width != case.width:
        words.insert(0, f"in heads of {served.width}")
    if served.dtype != case.dtype:
        words.insert(0, f"in {str(served.dtype).removeprefix('torch.')}")
    return ", ".join(words)
