"""What torch keeps for the whole process, and a kernel may not change: all that is computed after
it would be computed otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
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
}
"""How each is read and written, by the name of what writes it."""


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
