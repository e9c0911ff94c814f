"""The trials of an op on the device at hand, made once for a whole suite, and what one trial alone
does not show: sums of many terms, and a call behind one with other options."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.diagnosis import fault
from nanolm.tools.kernel_check.op_suites import op_trials
from nanolm.tools.kernel_check.op_trials import (
    BF16,
    FP16,
    FP32,
    Mix,
    cross_entropy_trial,
    glu_trial,
    linear_trial,
    norm_trial,
    rotary_trial,
    symmetric_trial,
)
from nanolm.tools.kernel_check.trial import Trial, execute
from nanolm.tools.kernel_check.variants import remade


class Stock:
    """The trials of an op, device by device, with the numbers that they were made with: a check
    before may have been of a kernel that writes into its inputs."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.trials: dict[str, list[Trial]] = {}
        self.numbers: dict[str, list[dict[str, Tensor]]] = {}

    def all(self, device: str) -> list[Trial]:
        """Every trial, as it was made."""
        if device not in self.trials:
            made = op_trials(self.op, device)
            self.trials[device] = made
            self.numbers[device] = [{n: x.clone() for n, x in inputs(t).items()} for t in made]
        return [self.take(number, device) for number in range(len(self.trials[device]))]

    def take(self, number: int, device: str) -> Trial:
        """One trial, as it was made."""
        if device not in self.trials:
            self.all(device)
        trial, before = self.trials[device][number], self.numbers[device][number]
        for name, x in inputs(trial).items():
            x.copy_(before[name])
        return trial

    def names(self, device: str) -> frozenset[str]:
        """Of all trials."""
        self.all(device)
        return frozenset(trial.name for trial in self.trials[device])

    def habits(self, device: str) -> list[Trial]:
        """The trials that habits are asked on: the first, those with the fewest and the most inputs
        that learn, and one in an autocast region. What is right beside a bias may be wrong without
        one, and the reverse."""
        trials = self.all(device)
        plain = [t for t in trials if t.spec.dtype == FP32 and t.autocast is None]
        chosen = [
            trials[0],
            min(plain, key=lambda trial: len(trial.leaves)),
            max(plain, key=lambda trial: len(trial.leaves)),
            *[trial for trial in trials if trial.autocast is not None][:1],
        ]
        return list({trial.name: trial for trial in chosen}.values())


def inputs(trial: Trial) -> dict[str, Tensor]:
    """All tensors that a kernel is handed."""
    return {**trial.leaves, **trial.constants}


ROWS = 4096
"""Terms of a sum, all equal: a sum in 16 bits is further off with each, and stands still in the
end, while one in float32 is exact."""


INTERPRETED_ROWS = 250
"""Of Triton kernels in its interpreter, where each program takes milliseconds."""


def rows_for(kernel: Any, short: Trial) -> int:
    """How many rows a long trial has for this kernel, as a short one shows."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return ROWS
    from nanolm.tools.kernel_check.sanitizer import sanitized  # noqa: PLC0415  (imports Triton)

    with sanitized(races=False) as traffic:
        execute(short, kernel, backward=short.differentiable)
    return INTERPRETED_ROWS if traffic.launches else ROWS


def long_rotary(n_tokens: int, device: str) -> Trial:
    """Many tokens: more than one program of a kernel, or one axis of its grid, takes."""
    return rotary_trial(
        1, 4, 2, per_row=False, n_tokens=n_tokens + 1, dtype=FP32, device=device
    )  # fmt: skip


def long_glu(n_rows: int, device: str) -> Trial:
    """Many rows."""
    return glu_trial("swiglu", n_rows + 1, 3, dtype=FP32, device=device)


LONG: dict[str, Callable[[int, str], Trial]] = {"rotary": long_rotary, "glu": long_glu}
"""Of ops that add up nothing over their rows."""


@remade
def sum_of_norms(
    n_rows: int, device: str, *, kind: str = "layernorm", bias: bool = True, width: int = 8,
    dtype: torch.dtype = FP16,
) -> Trial:  # fmt: skip
    """The gradients of weight and bias over many equal rows."""
    whole = norm_trial(kind, 1, width, bias=bias, residual=False, dtype=dtype, device=device)
    x = whole.leaves["x"].expand(n_rows, -1).contiguous()
    leaves = {name: x for name, x in whole.leaves.items() if name != "x"}
    return of_sums(whole, leaves, lambda given: given | {"x": x.to(given["weight"].dtype)})


@remade
def sum_of_linears(n_rows: int, device: str, *, dtype: torch.dtype = FP16) -> Trial:
    """The gradients of weight and bias over many equal rows."""
    whole = linear_trial(1, 6, 5, bias=True, dtype=dtype, device=device)
    x = whole.leaves["x"][:1].expand(1, n_rows, -1).contiguous()
    leaves = {name: x for name, x in whole.leaves.items() if name != "x"}
    return of_sums(whole, leaves, lambda given: given | {"x": x.to(given["weight"].dtype)})


def of_sums(
    trial: Trial, leaves: dict[str, Tensor], fill: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Trial:
    """The trial of which the parameters alone learn, and whose output is summed over all rows, so
    that every row brings the same gradient."""

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        out = trial.run(kernel, fill(given))["out"]
        return {"sum": out.float().flatten(0, -2).sum(dim=0)}

    name = f"sums of rows {trial.name}"
    return dataclasses.replace(trial, name=name, leaves=leaves, run=run, dtypes={}, computes=None)


@remade
def sum_of_losses(
    n_rows: int, device: str, *, bias: bool = True, dtype: torch.dtype = FP16,
    width: int = 4, vocab_size: int = 8,
) -> Trial:  # fmt: skip
    """The gradients of weight and bias over many tokens that are all the same."""
    trial = cross_entropy_trial(
        1, vocab_size, bias=bias, softcap=None, label_smoothing=0.0, z_loss=0.0, width=width,
        dtype=dtype, device=device,
    )  # fmt: skip
    hidden = trial.leaves["hidden"].expand(n_rows, -1).contiguous()
    targets = torch.full((n_rows,), 3, device=device)

    def run(kernel: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        given_hidden = hidden.to(given["weight"].dtype)
        loss = kernel.run(given_hidden, given["weight"], given.get("bias"), targets).loss
        return {"loss": loss}

    leaves = {name: x for name, x in trial.leaves.items() if name != "hidden"}
    name = f"sums of tokens {trial.name}"
    return dataclasses.replace(
        trial, name=name, leaves=leaves, run=run, detached=frozenset(), dtypes={}, constants={}
    )


@remade
def sum_of_products(n_columns: int, device: str, *, dtype: torch.dtype = FP16) -> Trial:
    """Products of rows of many equal columns."""
    trial = symmetric_trial(3, n_columns, dtype=dtype, device=device)
    x = torch.tensor([0.7, -0.3, 0.55], dtype=dtype, device=device)[:, None].repeat(1, n_columns)
    return dataclasses.replace(trial, name=f"sums {trial.name}", leaves={"x": x})


SUMS: dict[str, Callable[[int, str], Trial]] = {
    "norm": sum_of_norms,
    "linear": sum_of_linears,
    "linear_cross_entropy": sum_of_losses,
    "symmetric_product": sum_of_products,
}


def sums(kernel: Any, short: Trial, make: Callable[[int], Trial]) -> str | None:
    """A sentence about a kernel on a trial of many equal terms, beside one of few of them."""
    alone = fault(kernel, short)
    if alone is not None:
        return alone
    n_rows = rows_for(kernel, short)
    words = fault(kernel, make(n_rows))
    return words and (
        f"it adds up in fewer bits than float32 has: right on few terms, wrong on {n_rows}: {words}"
    )


def long(kernel: Any, short: Trial, make: Callable[[int], Trial]) -> str | None:
    """A sentence about a kernel on a trial of many rows."""
    return fault(kernel, short) or fault(kernel, make(rows_for(kernel, short)))


Three = tuple[Trial, Trial, Trial]


def options_of(op: str, device: str) -> list[Three]:
    """(a trial, one of the same shapes with other options, the first one in a shape of its own)."""
    common: dict[str, Any] = {"dtype": FP32, "device": device}
    norms: dict[str, Any] = {"bias": True, "residual": False, "size": 3e-3, **common}
    losses: dict[str, Any] = {"bias": True, **common}

    def three(make: Callable[[int, Any], Trial], option: Any, other: Any, size: int) -> Three:
        return make(size, option), make(size, other), make(size + 2, option)

    def mixed(dtype: torch.dtype) -> dict[str, Any]:
        return {"dtype": dtype, "device": device, "mix": Mix(FP32, FP32, FP32, dtype)}

    def loss(width: int, how: tuple[float | None, float, float]) -> Trial:
        cap, smoothing, z = how
        return cross_entropy_trial(
            9, 61, softcap=cap, label_smoothing=smoothing, z_loss=z, width=width, **losses
        )

    found: dict[str, Callable[[], list[Three]]] = {
        "norm": lambda: [
            three(lambda n, eps: norm_trial("layernorm", 7, n, eps=eps, **norms), 1e-3, 1e-5, 41),
            three(lambda n, kind: norm_trial(kind, 7, n, **norms), "rmsnorm", "layernorm", 45),
        ],
        "rotary": lambda: [
            three(lambda n, pairs: rotary_trial(2, n, pairs, per_row=False, **common), 5, 8, 22)
        ],
        "glu": lambda: [three(lambda n, k: glu_trial(k, 3, n, **common), "geglu", "swiglu", 41)],
        "linear_cross_entropy": lambda: [three(loss, (3.0, 0.2, 1e-2), (None, 0.1, 1e-3), 12)],
        "linear": lambda: [
            three(lambda n, to: linear_trial(5, n, 37, bias=True, **mixed(to)), FP16, BF16, 22)
        ],
        "symmetric_product": lambda: [
            three(lambda n, to: symmetric_trial(31, n, autocast=to, **common), FP16, BF16, 9)
        ],
    }
    return found[op]()


def other_options(kernel: Any, trial: Trial, before: Trial, alone: Trial) -> str | None:
    """A call behind one of the same shapes with other options, or in a region of another dtype."""
    words = fault(kernel, alone) or fault(kernel, before)
    if words is not None:
        return words
    words = fault(kernel, trial)
    return words and f"after a call of these shapes with other options: {words}"
