"""A GGUF file as it lies there: its values by key, its tensors de-quantised.

The package `gguf`, by the format's authors, reads it. It checks little, so whatever it stumbles
over in a damaged file is told here in one sentence.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.errors import UserError, require

MAGIC = b"GGUF"
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
"""The kinds of tensors that come in."""
STUMBLES = (ValueError, LookupError, OverflowError, TypeError, ArithmeticError, MemoryError)
"""What the package raises of bytes that make no sense, and numpy with it."""


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file that was read whole."""

    path: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """By the file's own names, float32, rows first as in torch."""
    kinds: Mapping[str, int]
    """How many tensors are of which kind."""


def gguf_package() -> Any:
    """The package `gguf`; raises UserError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            "a GGUF file is read and written with the package gguf, which is not installed; "
            "install it: pip install gguf"
        ) from error


def read_file(path: pathlib.Path) -> GgufFile:
    """Raises UserError for a file that is no GGUF, is damaged, or holds a kind that is not read."""
    package = gguf_package()
    reader, values = opened(package, path)
    return GgufFile(str(path), values, read_tensors(package, reader, path), counted(reader))


def read_values(path: pathlib.Path) -> dict[str, Any]:
    """A file's values alone, by their keys; raises UserError as `read_file`."""
    return opened(gguf_package(), path)[1]


def opened(package: Any, path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """(the package's reader of a file, the file's values); raises UserError as `read_file`."""
    try:
        with open(path, "rb") as file:
            begin = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); name a GGUF file") from error
    require(
        begin == MAGIC,
        f"{path} is no GGUF file, since it begins with {begin!r}; name one, or the folder of a "
        f"published model",
    )
    with np.errstate(over="ignore"):  # sizes in a damaged file may be any number
        try:
            reader = package.GGUFReader(path)
            values = {name: field.contents() for name, field in reader.fields.items()}
        except STUMBLES as error:
            raise UserError(
                f"{path} is damaged or not whole ({said(error)}); fetch it again"
            ) from error
    return reader, values


def read_tensors(package: Any, reader: Any, path: pathlib.Path) -> dict[str, Tensor]:
    """All tensors in float32; raises UserError for a kind that is not read."""
    found = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        require(
            kind in KINDS,
            f"{path} holds {tensor.name} as {kind}, and nanolm reads {', '.join(KINDS)}; fetch "
            f"the model in one of these",
        )
        try:
            numbers = package.quants.dequantize(tensor.data, tensor.tensor_type)
        except STUMBLES as error:
            raise UserError(
                f"{path} holds {tensor.name} in a damaged form ({said(error)}); fetch it again"
            ) from error
        found[tensor.name] = torch.from_numpy(np.array(numbers, np.float32))
    return found


def counted(reader: Any) -> dict[str, int]:
    """How many tensors are of which kind."""
    kinds: dict[str, int] = {}
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    return kinds


def said(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
