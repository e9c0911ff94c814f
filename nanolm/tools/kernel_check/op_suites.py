"""The trials of the ops other than attention: shapes with primes and ends of blocks, larger ones,
and the dtypes that autocast and FSDP mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanolm.tools.kernel_check.main_loops import long_trials
from nanolm.tools.kernel_check.op_extremes import EXTREME
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
from nanolm.tools.kernel_check.trial import Trial
from nanolm.tools.kernel_check.variants import strided, with_axes

DTYPES = (FP32, BF16, FP16)
MIXES = (
    Mix(BF16, FP32, FP32, BF16),  # autocast: linear layers give bf16, the stream stays float32
    Mix(FP16, FP32, FP32, FP16),
    Mix(FP32, BF16, FP32),  # FSDP with 16-bit parameters
    Mix(BF16, BF16, FP32),
    Mix(FP32, FP32, BF16),
)


def op_trials(op: str, device: str = "cpu") -> list[Trial]:
    """The trials of one op: its shapes in each dtype, larger ones, mixed dtypes, strides, and in 16
    bits what its kernel loops over on this device."""
    trials: list[Trial] = []
    for index, dtype in enumerate(DTYPES):
        trials += TRIALS[op](index, {"dtype": dtype, "device": device})
    trials += LARGE[op]({"dtype": FP32, "device": device}) + MIXED[op](device)
    trials += EXTREME[op](device)
    fullest = max(trials, key=lambda trial: len(trial.leaves))
    others = (with_axes(fullest, *axes) for axes in AXES.get(op, ()))
    return [*trials, strided(fullest), *others, *long_trials(op, device)]


def one_more(x: Tensor) -> Tensor:
    """An axis more, as rows of a batch are."""
    return torch.stack([x, x.flip(0)])


Axes = tuple[str, Callable[[Tensor], Tensor]]
ONE_MORE: Axes = ("an axis more", one_more)
ONE_LESS: Axes = ("an axis less", lambda x: x[0])
AXES: dict[str, tuple[Axes, ...]] = {
    "norm": (ONE_MORE,),
    "glu": (ONE_MORE,),
    "linear": (ONE_MORE, ONE_LESS),
    "symmetric_product": (ONE_MORE, ONE_LESS),
}
"""Where an op takes any number of axes: others than its trials have."""


LARGE: dict[str, Callable[[dict[str, Any]], list[Trial]]] = {
    "norm": lambda common: [
        norm_trial("layernorm", *shape, bias=True, residual=True, **common)
        for shape in ((1, 5000), (300, 8), (0, 8))
    ],
    "rotary": lambda common: [rotary_trial(17, 68, 34, per_row=False, n_tokens=70, **common)],
    "glu": lambda common: [
        glu_trial("swiglu", *shape, **common) for shape in ((1, 4500), (200, 3), (0, 3))
    ],
    "linear_cross_entropy": lambda common: (
        [
            cross_entropy_trial(
                *sizes, bias=True, softcap=None, label_smoothing=0.0, z_loss=0.0, **common
            )
            for sizes in ((600, 11), (3, 9001), (0, 11))
        ]
        + [
            cross_entropy_trial(
                4,
                11,
                bias=True,
                softcap=None,
                label_smoothing=0.1,
                z_loss=1e-2,
                ignored=True,
                **common,
            )
        ]
    ),
    "symmetric_product": lambda common: [
        symmetric_trial(*shape, **common) for shape in ((130, 5), (5, 300))
    ],
    "linear": lambda common: [
        linear_trial(*sizes, bias=True, **common) for sizes in ((300, 5, 7), (3, 700, 300))
    ],
}
"""More rows than the other trials have, wider ones, and none: a batch without a token, and one
whose targets are all ignored."""


def norm_trials(index: int, common: dict[str, Any]) -> Iterator[Trial]:
    """Rows of several widths, and rows so small that eps decides."""
    for kind in ("layernorm", "rmsnorm"):
        # A LayerNorm of one number is 0 whatever it is: two tell something.
        least = 2 if kind == "layernorm" else 1
        for n_rows, width in ((37, 24), (1, least), (5, 129), (3, 1000)):
            yield norm_trial(
                kind, n_rows, width, bias=kind == "layernorm" and width != 24,
                residual=(width + index) % 2 == 0, **common,
            )  # fmt: skip
        yield norm_trial(kind, 7, 40, bias=False, residual=index == 0, size=3e-3, **common)


def rotary_trials(index: int, common: dict[str, Any]) -> Iterator[Trial]:
    """Whole heads and parts of them."""
    yield rotary_trial(3, 16, 8, per_row=index == 0, **common)
    yield rotary_trial(1, 20, 5, per_row=True, **common)


def glu_trials(index: int, common: dict[str, Any]) -> Iterator[Trial]:
    """Both gates, on both sides of a block."""
    for kind in ("swiglu", "geglu"):
        for shape in ((3, 127), (1, 1), (2, 1029)):
            yield glu_trial(kind, *shape, **common)


def cross_entropy_trials(index: int, common: dict[str, Any]) -> Iterator[Trial]:
    """Each option, and all at once on a vocabulary of more than one block."""
    for n_tokens, vocab_size, bias, softcap, smoothing, z in (
        (13, 127, False, None, 0.0, 0.0),
        (5, 129, True, None, 0.1, 0.0),
        (7, 31, False, 5.0, 0.0, 1e-2),
        (1, 5000, True, 3.0, 0.1, 1e-2),
    ):
        yield cross_entropy_trial(
            n_tokens, vocab_size, bias=bias, softcap=softcap, label_smoothing=smoothing, z_loss=z,
            **common,
        )  # fmt: skip
    if common["dtype"] != FP32:
        for softcap, smoothing, z in ((None, 0.1, 0.0), (3.0, 0.0, 1e-2)):
            yield cross_entropy_trial(
                9, 129, bias=True, softcap=softcap, label_smoothing=smoothing, z_loss=z, exact=True,
                **common,
            )  # fmt: skip


def symmetric_trials(index: int, common: dict[str, Any]) -> Iterator[Trial]:
    """Tall, tiny and wide."""
    for shape in ((37, 19), (1, 1), (64, 65)):
        yield symmetric_trial(*shape, **common)


def linear_trials(index: int, common: dict[str, Any]) -> Iterator[Trial]:
    """With and without a bias."""
    yield linear_trial(5, 24, 37, bias=True, **common)
    yield linear_trial(1, 129, 3, bias=False, **common)


TRIALS: dict[str, Callable[[int, dict[str, Any]], Iterator[Trial]]] = {
    "norm": norm_trials,
    "rotary": rotary_trials,
    "glu": glu_trials,
    "linear_cross_entropy": cross_entropy_trials,
    "symmetric_product": symmetric_trials,
    "linear": linear_trials,
}


def mixed_norms(device: str) -> list[Trial]:
    """After a sum and alone, in every mix; outputs have the stream's dtype."""
    common: dict[str, Any] = {"dtype": BF16, "device": device}
    return [
        norm_trial(kind, 5, 24, bias=kind == "layernorm", residual=residual, mix=mix, **common)
        for mix in MIXES
        for kind in ("layernorm", "rmsnorm")
        for residual in (True, False)
    ]


def mixed_rotaries(device: str) -> list[Trial]:
    """16-bit heads, and float32 ones in an autocast region; angles are float32 always."""
    return [
        rotary_trial(2, 16, 5, per_row=False, dtype=dtype, device=device, autocast=BF16)
        for dtype in (BF16, FP32)
    ]


def mixed_glus(device: str) -> list[Trial]:
    """The gate's dtype stays, whatever the region's."""
    return [
        glu_trial("swiglu", 3, 40, dtype=dtype, device=device, autocast=BF16)
        for dtype in (BF16, FP32)
    ]


def mixed_cross_entropies(device: str) -> list[Trial]:
    """float32 parameters under autocast, with 16-bit and with float32 hidden states."""
    options: dict[str, Any] = {"bias": True, "softcap": None}
    options |= {"label_smoothing": 0.1, "z_loss": 1e-2}
    return [
        cross_entropy_trial(9, 63, dtype=to, device=device, mix=Mix(x, FP32, x, to), **options)
        for x, to in ((BF16, BF16), (FP32, BF16), (FP32, FP16))
    ]


def mixed_products(device: str) -> list[Trial]:
    """float32 under autocast, which makes it 16-bit, of either kind."""
    return [
        symmetric_trial(33, 9, dtype=FP32, device=device, autocast=autocast)
        for autocast in (BF16, FP16)
    ]


def mixed_linears(device: str) -> list[Trial]:
    """float32 parameters under autocast, with 16-bit and with float32 inputs."""
    return [
        linear_trial(5, 24, 37, bias=True, dtype=to, device=device, mix=Mix(x, FP32, x, to))
        for x, to in ((BF16, BF16), (FP32, BF16), (FP32, FP16))
    ]


MIXED: dict[str, Callable[[str], list[Trial]]] = {
    "norm": mixed_norms,
    "rotary": mixed_rotaries,
    "glu": mixed_glus,
    "linear_cross_entropy": mixed_cross_entropies,
    "symmetric_product": mixed_products,
    "linear": mixed_linears,
}
