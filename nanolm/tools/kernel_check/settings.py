"""What is kept for the whole process, and a kernel may not change: all that is computed after it
would be computed otherwise.

It is looked at around every check and around every single call: what a call leaves switched in a
region (autocast, torch.no_grad) is switched back when the region ends, and nobody would see it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

DEVICES = ("cpu", "cuda")


def environment() -> dict[str, str]:
    """The environment, without what compilers note there about themselves."""
    own = ("TORCHINDUCTOR", "TRITON", "KINETO")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def restore_environment(before: dict[str, str]) -> None:
    """Writes the environment back."""
    for name in environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def silenced() -> list[Any]:
    """The filters that hide every warning: those of one module or message concern nobody else."""
    return [
        rule
        for rule in warnings.filters
        if rule[0] == "ignore" and rule[2] is Warning and rule[1] is rule[3] is None
    ]


def unsilence(before: list[Any]) -> None:
    """Takes away the filters that were not there."""
    for rule in silenced():
        if rule not in before:
            warnings.filters.remove(rule)  # type: ignore[attr-defined]
    warnings.filterwarnings("default", message="never seen")  # lets go of what is cached
    warnings.filters.pop(0)  # type: ignore[attr-defined]


def set_autocast(before: list[bool]) -> None:
    """Switches autocast back on each type of device."""
    for device, enabled in zip(DEVICES, before, strict=True):
        torch.set_autocast_enabled(device, enabled)


def numpy_state() -> list[Any]:
    """numpy's random numbers, in what can be compared."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, torch.set_default_device),
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
    "random.seed or another function of random": (random.getstate, random.setstate),
    "numpy.random.seed or another function of numpy.random": (
        numpy_state,
        lambda state: np.random.set_state((state[0], np.array(state[1], np.uint32), *state[2:])),
    ),
    "os.putenv (os.environ)": (environment, restore_environment),
    "warnings.simplefilter": (silenced, unsilence),
    "logging.disable": (lambda: logging.root.manager.disable, logging.disable),
}
"""How each is read and written, by the name of what writes it."""

CHANGED = "it calls {}, which changes what all others compute after it"


class SettingsChangedError(Exception):
    """A call left the process otherwise than it was; the message is the sentence that says so."""


@contextlib.contextmanager
def watched_settings() -> Iterator[list[str]]:
    """Fills the list, at its end, with what was written within it, and writes it back."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    written: list[str] = []
    try:
        yield written
    finally:
        for name, (read, write) in SETTINGS.items():
            if read() != before[name]:
                write(before[name])
                written.append(name)


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """A call of a kernel, in whatever region. Raises SettingsChangedError at its end when it left
    the process otherwise than it was, or printed to standard output, where results are written."""
    with watched_settings() as written, contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    if written:
        raise SettingsChangedError(CHANGED.format(", ".join(written)))
    if printed.getvalue():
        words = printed.getvalue().strip().splitlines()
        raise SettingsChangedError(f"it prints to standard output: {words[0] if words else ''!r}")
