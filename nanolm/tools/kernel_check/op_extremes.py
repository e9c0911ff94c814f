"""Trials at the ends of an op's range: numbers at which a formula that is right on paper is not,
sizes that coincide, so that a layout cannot be guessed from them, and float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nanolm.tools.kernel_check.op_trials import (
    BF16,
    FP16,
    FP32,
    FP64,
    cross_entropy_trial,
    glu_trial,
    linear_trial,
    norm_trial,
    rotary_trial,
    symmetric_trial,
)
from nanolm.tools.kernel_check.trial import Trial
from nanolm.tools.kernel_check.variants import derived


def single(device: str) -> dict[str, Any]:
    """float32 on a device."""
    return {"dtype": FP32, "device": device}


def hinted(trial: Trial, hint: str) -> Trial:
    """The trial with what usually is at fault where it fails."""
    return derived(trial, lambda trial: dataclasses.replace(trial, hint=hint))


def extreme_norms(device: str) -> list[Trial]:
    """A mean that is large beside the spread (mean(x^2) - mean(x)^2 cancels), squares that float16
    does not hold, as many rows as columns, an RMSNorm with a bias, and float64."""
    alone: dict[str, Any] = {"bias": False, "residual": False, "device": device}
    return [
        hinted(
            norm_trial("layernorm", 5, 40, mean=30.0, dtype=FP32, **alone),
            "mean(x^2) - mean(x)^2 cancels where the mean is large beside the spread",
        ),
        *(norm_trial(k, 5, 40, size=400.0, dtype=FP16, **alone) for k in ("layernorm", "rmsnorm")),
        norm_trial("rmsnorm", 24, 24, dtype=FP32, **alone),
        norm_trial("rmsnorm", 5, 40, bias=True, residual=True, dtype=FP32, device=device),
        norm_trial("layernorm", 3, 24, bias=True, residual=True, dtype=FP64, device=device),
    ]


def extreme_rotaries(device: str) -> list[Trial]:
    """As many heads as tokens, angles that must not be rounded, and float64."""
    common: dict[str, Any] = {"per_row": False, "device": device}
    return [
        rotary_trial(4, 16, 5, n_tokens=4, dtype=FP32, **common),
        *(rotary_trial(2, 16, 8, cancels=True, dtype=dtype, **common) for dtype in (BF16, FP16)),
        rotary_trial(2, 16, 5, dtype=FP64, **common),
    ]


def extreme_glus(device: str) -> list[Trial]:
    """Gates at which exp overflows beside factors of 0, as many rows as columns, and float64."""
    return [
        *(
            hinted(
                glu_trial(kind, 4, 24, large=True, **single(device)),
                "exp overflows at gates of hundreds, and every third factor is 0",
            )
            for kind in ("swiglu", "geglu")
        ),
        glu_trial("swiglu", 24, 12, **single(device)),
        glu_trial("geglu", 3, 12, dtype=FP64, device=device),
    ]


def extreme_cross_entropies(device: str) -> list[Trial]:
    """Logits at which exp overflows, as many tokens as classes and columns, and float64."""
    plain: dict[str, Any] = {"softcap": None, "label_smoothing": 0.0, "z_loss": 0.0}
    return [
        hinted(
            cross_entropy_trial(
                9, 63, bias=False, exact=True, large=True, **plain, **single(device)
            ),
            "exp overflows at logits of hundreds unless their largest is taken off first",
        ),
        cross_entropy_trial(16, 16, bias=True, **plain, **single(device)),
        cross_entropy_trial(
            5, 31, bias=True, softcap=3.0, label_smoothing=0.1, z_loss=1e-2, dtype=FP64,
            device=device,
        ),
    ]  # fmt: skip


def extreme_products(device: str) -> list[Trial]:
    """A square, and float64."""
    return [
        symmetric_trial(24, 24, **single(device)),
        symmetric_trial(9, 13, dtype=FP64, device=device),
    ]


def extreme_linears(device: str) -> list[Trial]:
    """A square weight of as many rows as the input, and float64."""
    return [
        linear_trial(24, 24, 24, bias=True, **single(device)),
        linear_trial(3, 9, 13, bias=True, dtype=FP64, device=device),
    ]


EXTREME: dict[str, Callable[[str], list[Trial]]] = {
    "norm": extreme_norms,
    "rotary": extreme_rotaries,
    "glu": extreme_glus,
    "linear_cross_entropy": extreme_cross_entropies,
    "symmetric_product": extreme_products,
    "linear": extreme_linears,
}
"""Of each op, by device."""
