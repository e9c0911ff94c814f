"""Triton's interpreter with a machine word of few bits, so that small tensors overflow it.

An index times a stride has to be taken in 64 bits, since in 32 it wraps around beyond 2^31. Numbers
of so many elements cannot be computed in a test. Here sums, differences and products of 32-bit
integers wrap around at 2^11 already, those of 64 bits do not, and a tensor of a few thousand
numbers shows what one of billions would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from nanolm.tools.kernel_check.sanitizer import patched

BITS = 12
"""Room for -2,048 to 2,047: for the offsets within a tile, which are 32 bits wide on purpose."""


@contextlib.contextmanager
def short_integers() -> Iterator[None]:
    """Kernels that run within it have 32-bit integers of BITS bits."""
    original = InterpreterBuilder.binary_op
    half = 1 << (BITS - 1)

    def binary(
        self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Callable
    ) -> TensorHandle:
        result = original(self, left, right, op)
        if left.dtype.scalar == tl.int32 and op in (np.add, np.subtract, np.multiply):
            wide = np.asarray(result.data).astype(np.int64)
            wrapped = ((wide + half) % (2 * half) - half).astype(np.int32)
            return TensorHandle(wrapped, tl.int32)
        return result

    with patched(InterpreterBuilder, {"binary_op": binary}):
        yield
