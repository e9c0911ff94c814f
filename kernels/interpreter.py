"""Makes Triton's interpreter compute bfloat16 as a GPU does.

With TRITON_INTERPRET=1 kernels run in numpy, which has no bfloat16: the interpreter keeps its bits
in uint16. As it stands (seen in 3.7.1) tl.dot multiplies those bit patterns as integers, so do +, *
and comparisons, conversion from float32 truncates, and atomic additions fail. `install` replaces
these operations: widen to float32 (exact), compute, round to nearest even, as hardware does.

Numbers checked by tests/test_kernel_interpreter.py. Called by kernels/launch.py before any kernel
can run; without the interpreter this module is not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
)

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest, ties to even; NaN becomes the quiet NaN."""
    x = np.asarray(x, dtype=np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded.reshape(x.shape)).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32, exactly."""
    bits = np.asarray(bits)
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(bits.shape)


def is_bfloat16(handle: TensorHandle) -> bool:
    """Whether the handle's elements are bfloat16."""
    return handle.dtype.scalar == tl.bfloat16


def values(handle: TensorHandle) -> np.ndarray:
    """The handle's numbers, bfloat16 widened."""
    return widen(handle.data) if is_bfloat16(handle) else handle.data


def bfloat16(x: np.ndarray) -> TensorHandle:
    """A bfloat16 handle of rounded numbers."""
    return TensorHandle(narrow(x), tl.bfloat16)


def faithful_cast(original: Callable) -> Callable:
    """Casts from and to bfloat16 by value."""

    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        to_bfloat16 = target.scalar == tl.bfloat16
        if is_bfloat16(source) == to_bfloat16:
            return original(self, source, target)
        if to_bfloat16:
            return bfloat16(source.data)
        return original(self, TensorHandle(widen(source.data), tl.float32), target)

    return cast


def faithful_fp_to_fp(original: Callable) -> Callable:
    """The explicit conversion, which can also be asked to truncate."""

    def convert(
        self: InterpreterBuilder, source: TensorHandle, target: Any, rounding: Any
    ) -> TensorHandle:
        truncate = rounding == stock._ir.ROUNDING_MODE.RTZ
        if target.scalar == tl.bfloat16 and not truncate and source.dtype.scalar == tl.float32:
            return bfloat16(source.data)
        return original(self, source, target, rounding)

    return convert


def faithful_binary(original: Callable) -> Callable:
    """Arithmetic and comparisons on values; bit operations stay on bits."""

    def binary(
        self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Callable
    ) -> TensorHandle:
        if not (is_bfloat16(left) and is_bfloat16(right)) or op in BITWISE:
            return original(self, left, right, op)
        result = op(values(left), values(right))
        return TensorHandle(result, tl.int1) if op in COMPARISONS else bfloat16(result)

    return binary


def faithful_unary(original: Callable) -> Callable:
    """Elementary functions of one argument."""

    def unary(self: InterpreterBuilder, argument: TensorHandle, op: Callable) -> TensorHandle:
        if not is_bfloat16(argument):
            return original(self, argument, op)
        return bfloat16(op(values(argument)))

    return unary


def faithful_ternary(original: Callable) -> Callable:
    """Clamping; a select moves bits and is right as it is."""

    def ternary(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Callable
    ) -> TensorHandle:
        if op is np.where or not is_bfloat16(a):
            return original(self, a, b, c, op)
        return bfloat16(op(values(a), values(b), values(c)))

    return ternary


def faithful_fma(original: Callable) -> Callable:
    """x y + z, rounded once."""

    def fma(
        self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
    ) -> TensorHandle:
        if not is_bfloat16(z):
            return original(self, x, y, z)
        return bfloat16(values(x) * values(y) + values(z))

    return fma


def faithful_dot(original: Callable) -> Callable:
    """Products of the widened operands, summed in the accumulator's dtype."""

    def dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, *options: Any
    ) -> TensorHandle:
        if not (is_bfloat16(a) or is_bfloat16(b)):
            return original(self, a, b, c, *options)
        total = np.matmul(values(a), values(b)) + values(c)
        return bfloat16(total) if is_bfloat16(c) else TensorHandle(total, c.dtype.scalar)

    return dot


def faithful_sum(original: Callable) -> Callable:
    """tl.sum over bfloat16: summed in float32, rounded once."""

    def total(self: ReduceOps, x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return original(self, x)
        wide = np.sum(widen(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(wide), tl.bfloat16)

    return total


def faithful_min_max(original: Callable) -> Callable:
    """tl.max and tl.min over bfloat16, by value."""

    def extreme(self: ReduceOps, x: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        first = x[0] if isinstance(x, tuple) else x
        if first.dtype != tl.bfloat16:
            return original(self, x, val_reduce_op, idx_reduce_op)
        wide = self.to_tensor(widen(first.handle.data), tl.float32)
        result = original(self, wide, val_reduce_op, idx_reduce_op)
        best = result[0] if isinstance(result, tuple) else result
        best = self.to_tensor(narrow(best.handle.data), tl.bfloat16)
        return (best, result[1]) if isinstance(result, tuple) else best

    return extreme


def indexable_scalars(original: Callable) -> Callable:
    """Scalars as Python integers, in which loops count: Triton 3.6 asks int() of an array of one
    element, which numpy 2.5 refuses."""

    def patch(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    return patch


def call_inside_kernel(original: Callable) -> Callable:
    """A call from one interpreted function to another, preparing each of tl's modules only once.

    At each call the stock method patches those modules of triton.language that the function's file
    imports, some 10 ms, and never takes the patches back; once a file and launch is enough.
    """

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if not _prepared:
            return original(self, *args, **kwargs)
        scopes = _prepared[-1]
        file = id(self.fn.__globals__)
        if file not in scopes:
            scopes[file] = stock._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    return call


def noted_launch(original: Callable) -> Callable:
    """A launch that `call_inside_kernel` knows of, and that leaves no patch behind."""

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        _prepared.append({})
        try:
            original(self, *args, **kwargs)
        finally:
            for scope in reversed(_prepared.pop().values()):
                scope.restore()

    return launch


PATCHES = (
    (GridExecutor, "__call__", noted_launch),
    (InterpretedFunction, "__call__", call_inside_kernel),
    (stock, "_patch_lang_tensor", indexable_scalars),
    (InterpreterBuilder, "cast_impl", faithful_cast),
    (InterpreterBuilder, "create_fp_to_fp", faithful_fp_to_fp),
    (InterpreterBuilder, "binary_op", faithful_binary),
    (InterpreterBuilder, "unary_op", faithful_unary),
    (InterpreterBuilder, "ternary_op", faithful_ternary),
    (InterpreterBuilder, "create_fma", faithful_fma),
    (InterpreterBuilder, "create_dot", faithful_dot),
    (ReduceOps, "sum", faithful_sum),
    (ReduceOps, "min_max", faithful_min_max),
)
_prepared: list[dict[int, Any]] = []  # a launch's patched files and how to undo them
_originals: dict[tuple[Any, str], Callable] = {}


def install() -> None:
    """Replaces the stock operations, once; `uninstall` brings them back."""
    if _originals:
        return
    # The stock builder computes every integer sum twice to assert that it does not overflow, but
    # its assertions only speak in debug mode; without them a kernel takes half as long.
    builder = stock.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    InterpreterBuilder.get_bf16 = constant
    for owner, name, faithful in PATCHES:
        _originals[owner, name] = getattr(owner, name)
        setattr(owner, name, faithful(_originals[owner, name]))


def constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    """A bfloat16 literal, which the stock builder lacks."""
    return bfloat16(np.array([value]))


def uninstall() -> None:
    """The stock interpreter again, to show what it gets wrong."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()
