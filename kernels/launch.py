"""How kernels are launched: tile sizes, warps and pipeline stages by (architecture, width, dtype).

Nothing is tuned at run time: a wrong choice costs registers spilled to memory, and those can be
counted without a GPU. The tables here are what `nanolm kernels compile` has compiled for each
architecture and found to fit (see compile_matrix.json); a GPU that they do not name takes the
entry of its nearest older relative.

In a batch's journey: every Triton op asks here once per launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # The stock interpreter computes bfloat16 on bit patterns; no kernel may run before this.
    from nanolm.kernels.interpreter import install

    install()

ACCUMULATORS = {torch.float64: tl.float64}
_forced_arch: list[str] = []


@dataclasses.dataclass(frozen=True)
class Launch:
    """m queries by n keys a tile, and how many warps and pipeline stages a program gets."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, int]:
        """Keyword arguments of a Triton launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def tiled(self) -> dict[str, int]:
        """The same with the tile's sizes."""
        return {"M": self.m, "N": self.n} | self.options()


# Why these tiles: a program keeps running sums [M, K] in float32 and a tile of scores [M, N] in
# registers, of which a thread has 255. The larger M, the more queries each loaded key serves; the
# limit is the registers, so wider heads get smaller tiles, and dK and dV, two sums at once, the
# smallest. Stages are tiles loaded ahead: two hide the latency of memory where shared memory holds
# them (100 KB a processor on sm_86, 228 KB on sm_90). A warp takes 16 rows of a product: tiles with
# fewer rows than their warps take together are computed twice.
# (architecture, COLUMNS) -> launches of 16-bit attention: forward, dK and dV, dQ.
HALF = {
    ("sm_80", 64): (Launch(128, 64, 8, 2), Launch(32, 64, 4, 2), Launch(128, 64, 8, 2)),
    ("sm_80", 128): (Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    ("sm_80", 256): (Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(64, 32, 8, 1)),
    ("sm_86", 64): (Launch(128, 64, 8, 2), Launch(32, 64, 4, 2), Launch(128, 64, 8, 2)),
    ("sm_86", 128): (Launch(64, 32, 4, 2), Launch(64, 32, 8, 2), Launch(128, 32, 8, 2)),
    ("sm_86", 256): (Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    ("sm_90", 64): (Launch(128, 64, 8, 2), Launch(64, 64, 4, 3), Launch(128, 64, 8, 2)),
    ("sm_90", 128): (Launch(128, 64, 8, 2), Launch(32, 128, 8, 2), Launch(128, 64, 8, 2)),
    ("sm_90", 256): (Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(32, 32, 8, 1)),
    ("sm_100", 64): (Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(128, 64, 8, 2)),
    ("sm_100", 128): (Launch(128, 64, 8, 2), Launch(64, 64, 8, 2), Launch(128, 64, 8, 2)),
    ("sm_100", 256): (Launch(64, 64, 8, 1), Launch(64, 64, 8, 1), Launch(64, 64, 8, 1)),
    ("gfx942", 64): (Launch(64, 32, 4, 1), Launch(32, 32, 4, 1), Launch(64, 32, 4, 1)),
    ("gfx942", 128): (Launch(64, 32, 4, 1), Launch(32, 32, 4, 1), Launch(64, 32, 4, 1)),
    ("gfx942", 256): (Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
}
# Instead of these where a call has words besides: "grouped", several query heads to one of keys,
# over which dK and dV loop; "window"; "numbers", a mask that is compared to numbers in memory
# (lengths, documents, prefixes, an order); "ranges", documents or an order, whose ranges are read.
# Each takes registers: tiles are smaller, or not loaded ahead. Of a place's entries the first all
# of whose words the call has is taken.
LIGHT = {
    ("sm_80", 64, "key_value"): {
        "window numbers": Launch(64, 32, 4, 2),
        "grouped numbers": Launch(64, 32, 4, 2),
    },
    ("sm_80", 64, "query"): {"window numbers": Launch(128, 32, 8, 2)},
    ("sm_80", 128, "key_value"): {
        "grouped": Launch(64, 64, 8, 1),
        "ranges": Launch(64, 64, 8, 1),
    },
    ("sm_86", 64, "key_value"): {"grouped numbers": Launch(32, 64, 4, 1)},
    ("sm_86", 128, "forward"): {"window": Launch(128, 32, 8, 2)},
    ("sm_90", 64, "key_value"): {
        "window numbers": Launch(32, 64, 4, 2),
        "grouped": Launch(32, 64, 4, 2),
    },
    ("sm_90", 128, "key_value"): {
        "grouped window": Launch(16, 128, 8, 2),
        "grouped numbers": Launch(16, 128, 8, 2),
        "grouped": Launch(32, 128, 8, 1),
        "ranges": Launch(32, 128, 8, 1),
    },
    ("sm_100", 64, "key_value"): {
        "window numbers": Launch(64, 64, 8, 2),
        "grouped": Launch(64, 64, 8, 2),
    },
    ("sm_100", 128, "key_value"): {"grouped": Launch(64, 64, 8, 1)},
    ("sm_100", 256, "key_value"): {"grouped": Launch(64, 32, 8, 1)},
}
# The same beside a bias, dropout or a soft-cap, which take most. Their words: the bias's kind,
# "dropout", "softcap". Heads of 64 take what stands for 128, but for dK and dV.
HEAVY = {
    ("sm_80", 64, "forward"): {"": Launch(64, 64, 4, 2)},
    ("sm_80", 64, "key_value"): {"dense dropout": Launch(32, 32, 4, 1)},
    ("sm_80", 64, "query"): {"": Launch(64, 32, 4, 2)},
    ("sm_80", 128, "key_value"): {"": Launch(32, 64, 8, 2)},
    ("sm_80", 256, "bias"): {"": Launch(16, 32, 4, 1)},
    ("sm_86", 64, "forward"): {"": Launch(64, 32, 4, 2)},
    ("sm_86", 64, "key_value"): {"dense dropout": Launch(32, 32, 4, 1)},
    ("sm_86", 64, "query"): {"bucket dropout": Launch(64, 32, 4, 1)},
    ("sm_86", 128, "forward"): {"": Launch(64, 32, 8, 2)},
    ("sm_86", 128, "query"): {"": Launch(64, 32, 4, 2)},
    ("sm_86", 256, "bias"): {"": Launch(16, 32, 4, 1)},
    ("sm_90", 64, "key_value"): {"dense": Launch(32, 32, 4, 1)},
    ("sm_90", 128, "key_value"): {"": Launch(32, 64, 8, 2)},
    ("sm_90", 256, "bias"): {"": Launch(16, 32, 2, 1)},
    ("sm_100", 128, "forward"): {"": Launch(64, 64, 8, 2)},
    ("sm_100", 256, "key_value"): {"": Launch(64, 32, 8, 1)},
    ("sm_100", 256, "bias"): {"bucket": Launch(16, 32, 2, 1)},
    ("gfx942", 256, "key_value"): {"": Launch(16, 32, 4, 1)},
}
WEIGHTS = frozenset({"alibi", "bucket", "dense", "dropout", "softcap"})
# Of an older Triton, which takes more registers for the same: where that would spill.
BEFORE_3_7 = {("sm_90", 128, "key_value"): Launch(32, 128, 8, 1)}
TRITON = tuple(int(word) for word in triton.__version__.split(".")[:2])
KINDS = ("forward", "key_value", "query", "bias")


@functools.cache
def device_arch(index: int) -> str:
    """The architecture of a CUDA or ROCm device: "sm_90", "gfx942", …"""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch_of(device: torch.device) -> str:
    """The architecture that a launch on this device is for; "cpu" in the interpreter."""
    if _forced_arch:
        return _forced_arch[-1]
    if device.type == "cpu":
        return "cpu"
    return device_arch(torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def forced_arch(arch: str) -> Iterator[None]:
    """Within it every launch is for `arch`, whatever the device: for compiling without a GPU."""
    _forced_arch.append(arch)
    try:
        yield
    finally:
        _forced_arch.pop()


def relative(arch: str) -> str:
    """The architecture of the tables whose entries fit `arch`: itself or an older relative.

    Compute capabilities 8.6, 8.9 and 12.x have little shared memory and share a column.
    """
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    if number >= 120 or 86 <= number < 90:
        return "sm_86"
    return f"sm_{max(known for known in (80, 90, 100) if known <= max(number, 80))}"


# Few large tiles are fast in the interpreter; tests replace this to see several per axis.
INTERPRETER = dict.fromkeys(KINDS, Launch(32, 32))


def attention_launch(
    kind: str, device: torch.device, columns: int, dtype: torch.dtype, words: frozenset[str]
) -> Launch:
    """The launch of one attention kernel ("forward", "key_value", "query" or "bias") for a call
    that has these words of LIGHT and HEAVY."""
    arch = arch_of(device)
    if arch == "cpu":
        return INTERPRETER[kind]
    columns = max(columns, 64)
    if dtype.itemsize > 2:
        # `ieee` has no tensor cores and tf32x3 three operands for one: small tiles, for registers.
        return Launch(32, 32, 4 if columns == 64 else 8, 1)
    family = relative(arch)
    if words & WEIGHTS or kind == "bias":
        return heavy_launch(kind, family, columns, words)
    place = family, columns, kind
    usual = BEFORE_3_7.get(place) if TRITON < (3, 7) else None
    return first_fitting(LIGHT.get(place), words) or usual or half_launch(*place)


def half_launch(family: str, columns: int, kind: str) -> Launch:
    """The launch of a 16-bit kernel that has no words."""
    return HALF[family, columns][KINDS.index(kind)]


def first_fitting(entries: dict[str, Launch] | None, words: frozenset[str]) -> Launch | None:
    """The first of a place's launches whose words are all there."""
    found = (launch for names, launch in (entries or {}).items() if words.issuperset(names.split()))
    return next(found, None)


def heavy_launch(kind: str, family: str, columns: int, words: frozenset[str]) -> Launch:
    """The launch of a 16-bit kernel that is short of registers."""
    narrow = columns == 64
    like = 128 if narrow else columns
    own = first_fitting(HEAVY.get((family, columns, kind)), words)
    if own:
        return own
    query = half_launch(family, like, "query")
    if kind == "bias":  # beside its scores it holds their sum
        m, n = min(query.m, 32 if family == "sm_86" else 64), min(query.n, 32)
        return dataclasses.replace(query, m=m, n=n)
    if kind == "key_value" and narrow:
        return Launch(32, 32, 4, query.stages)
    shared = first_fitting(HEAVY.get((family, like, kind)), words)
    return shared or half_launch(family, like, kind)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums are kept in: float32, and float64 for float64 inputs (gradient checks)."""
    return ACCUMULATORS.get(dtype, tl.float32)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same as a torch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class RowLaunch:
    """How a kernel that holds whole rows takes them: so many at a time, this many columns."""

    rows: int
    columns: int
    warps: int


def row_launch(width: int) -> RowLaunch:
    """About 2,048 numbers a program; wide rows come alone, with more warps."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(16, 2048 // columns))
    return RowLaunch(rows, columns, min(16, max(4, columns // 1024)))


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 in the interpreter."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def product_launch(device: torch.device, dtype: torch.dtype) -> Launch:
    """Tiles of the symmetric product: m rows on either side, n columns a step."""
    if arch_of(device) == "cpu":
        return Launch(32, 32)
    if dtype.itemsize > 2:
        return Launch(32, 32, 4, 2)
    return Launch(64, 32, 8, 2) if relative(arch_of(device)) == "sm_86" else Launch(64, 32, 4, 3)


def columns_of(width: int) -> int:
    """A head width rounded up to what tl.dot takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
