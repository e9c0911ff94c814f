"""What a process has once, and a kernel may not change: all that is computed after it would be
computed otherwise, or drawn otherwise, or told otherwise."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def attribute(holder: Any, name: str) -> Setting:
    """A setting that is an attribute of something."""
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


def flushes() -> bool:
    """Whether numbers below the normal ones are taken for 0."""
    return bool(torch.tensor(1e-310, dtype=torch.float64) * 1.0 == 0)


def numpy_state() -> list[Any]:
    """The state of numpy's global generator, in what can be compared."""
    return [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()]


def set_environment(before: dict[str, str]) -> None:
    """Makes the process's variables these."""
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def set_collector(enabled: bool) -> None:
    """Whether unreachable objects are looked for."""
    (gc.enable if enabled else gc.disable)()


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
BACKENDS: list[Setting] = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]
SETTINGS: dict[str, Setting] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.set_default_device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch.set_flush_denormal": (flushes, torch.set_flush_denormal),
    "torch.autograd.set_detect_anomaly": (
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
    ),
    "torch.set_autocast_enabled": (
        lambda: [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        lambda before: [*map(torch.set_autocast_enabled, ("cpu", "cuda"), before)],
    ),
    "torch.backends.cuda.enable_flash_sdp or one beside it": (
        lambda: [read() for read, _ in BACKENDS],
        lambda before: [write(value) for (_, write), value in zip(BACKENDS, before)],
    ),
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": attribute(
        MATMUL, "allow_bf16_reduced_precision_reduction"
    ),
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": attribute(
        MATMUL, "allow_fp16_reduced_precision_reduction"
    ),
    "torch.backends.cudnn.benchmark": attribute(CUDNN, "benchmark"),
    "torch.backends.cudnn.deterministic": attribute(CUDNN, "deterministic"),
    "numpy.random": (numpy_state, lambda before: np.random.set_state(tuple(before))),
    "random": (random.getstate, random.setstate),
    "os.environ": (lambda: dict(os.environ), set_environment),
    "warnings.filterwarnings": (
        lambda: list(warnings.filters),
        lambda before: warnings.filters.__setitem__(slice(None), before),
    ),
    "gc.disable": (gc.isenabled, set_collector),
}
"""How each is read and written, by the name of what writes it."""


IMPORTS = frozenset({"os.environ", "warnings.filterwarnings"})
"""What modules write when they are imported, as a kernel's first call may do: that is no habit."""


@contextlib.contextmanager
def watched_settings() -> Iterator[list[str]]:
    """Fills the list, at its end, with what was written within it, and writes it back."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    modules = len(sys.modules)
    written: list[str] = []
    try:
        yield written
    finally:
        for name, (read, write) in SETTINGS.items():
            if read() != before[name]:
                write(before[name])
                if name not in IMPORTS or len(sys.modules) == modules:
                    written.append(name)


@contextlib.contextmanager
def listening() -> Iterator[tuple[io.StringIO, list[warnings.WarningMessage]]]:
    """What is printed and what is warned of within it."""
    printed = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("default")
        yield printed, warned
