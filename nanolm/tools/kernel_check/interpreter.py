"""Whether Triton's interpreter runs the kernels of this process, and which kernels it runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any


def has_interpreter() -> bool:
    """Whether Triton is there, and with it its interpreter."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton, if it is there, runs kernels in its interpreter."""
    return has_interpreter() and os.environ.get("TRITON_INTERPRET") == "1"


def prepare_interpreter() -> None:
    """Makes the interpreter compute as a GPU does, before a kernel of anyone runs in it: as it
    stands it multiplies the bit patterns of bfloat16."""
    if interpreted():
        importlib.import_module("nanolm.kernels.launch")


def has_triton(kernel: Any) -> bool:
    """Whether a module of the kernel's package holds a Triton function."""
    if "triton" not in sys.modules:
        return False
    kind = importlib.import_module("triton.runtime.jit").KernelInterface
    package = type(kernel).__module__.partition(".")[0]
    near = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == package]
    return any(isinstance(value, kind) for module in near for value in vars(module).values())


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the Triton functions that the interpreter runs within it, one a launch; none
    where kernels are compiled."""
    names: list[str] = []
    if not interpreted():
        yield names
        return
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    call = executor.__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        names.append(self.fn.__name__)
        call(self, *arguments, **options)

    executor.__call__ = counted
    try:
        yield names
    finally:
        executor.__call__ = call
