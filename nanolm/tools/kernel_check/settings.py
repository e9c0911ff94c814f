"""What a process has once, and a kernel may not change: all that is computed after it would be
computed otherwise, or drawn otherwise, or told otherwise.

It is looked at around every check and around every single call: what a call leaves switched in a
region (autocast, torch.no_grad) is switched back when the region ends, and nobody would see it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch

DEVICES = ("cpu", "cuda")
Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def attribute(holder: Any, name: str) -> Setting:
    """A setting that is an attribute of something."""
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


def flushes() -> bool:
    """Whether numbers below the normal ones are taken for 0."""
    return bool(torch.tensor(1e-310, dtype=torch.float64) * 1.0 == 0)


def environment() -> dict[str, str]:
    """The environment, without what compilers note there about themselves."""
    own = ("TORCHINDUCTOR", "TRITON", "KINETO")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def restore_environment(before: dict[str, str]) -> None:
    """Writes the environment back."""
    for name in environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def set_autocast(before: list[bool]) -> None:
    """Switches autocast back on each type of device."""
    for device, enabled in zip(DEVICES, before, strict=True):
        torch.set_autocast_enabled(device, enabled)


def numpy_state() -> list[Any]:
    """The state of numpy's global generator, in what can be compared."""
    return [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()]


def set_filters(before: list[Any]) -> None:
    """Makes these the warnings' filters, in the list that is theirs."""
    cast(list[Any], warnings.filters)[:] = before


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
    "torch.set_default_device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_autocast_enabled": (
        lambda: [torch.is_autocast_enabled(device) for device in DEVICES],
        set_autocast,
    ),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.set_flush_denormal": (flushes, torch.set_flush_denormal),
    "torch.autograd.set_detect_anomaly": (
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
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
    "random.seed or another function of random": (random.getstate, random.setstate),
    "numpy.random.seed or another function of numpy.random": (
        numpy_state,
        lambda before: np.random.set_state(tuple(before)),
    ),
    "os.putenv (os.environ)": (environment, restore_environment),
    "warnings.simplefilter or warnings.filterwarnings": (
        lambda: list(warnings.filters),
        set_filters,
    ),
    "logging.disable": (lambda: logging.root.manager.disable, logging.disable),
    "gc.disable": (gc.isenabled, set_collector),
}
"""How each is read and written, by the name of what writes it."""

CHANGED = "it calls {}, which changes what all others compute after it"


class SettingsChangedError(Exception):
    """A call left the process otherwise than it was; the message is the sentence that says so."""


IMPORTS = frozenset({"os.putenv (os.environ)", "warnings.simplefilter or warnings.filterwarnings"})
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
def one_call() -> Iterator[None]:
    """A call of a kernel, in whatever region. Raises SettingsChangedError at its end when it left
    the process otherwise than it was."""
    with watched_settings() as written:
        yield
    if written:
        raise SettingsChangedError(CHANGED.format(", ".join(written)))


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
