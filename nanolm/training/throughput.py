"""What a run is measured by: tokens per second, model FLOPs utilisation, memory, data wait.

    MFU = model FLOPs per second / peak FLOPs per second of all devices

(Chowdhery et al. 2022, PaLM, appendix B).

Model FLOPs are those of forward and backward by formula (`flops.py`), without recomputation. The
peak is the device's dense matmul peak in the run's precision, from the makers' data sheets; on a
CPU it is the best rate of the model's own largest products, measured at the start with the run's
threads. Both are assumptions, and are logged as such: a CPU that other programs leave alone later
than at the start can be faster than its measured peak.
"""

from __future__ import annotations

import contextlib
import pathlib
import resource
import time
from collections.abc import Iterator, Sequence

import torch

from nanolm.ops.cpu_bf16 import multiplies_bf16
from nanolm.training.accelerators import find_accelerator
from nanolm.training.flops import Product
from nanolm.training.phases import PHASES

SQUARE: Product = (768, 768, 768)
SECONDS = 0.2
"""What a run on a CPU spends on measuring the peak of its products."""
TIMING = (
    *("tokens_per_second", "tflops", "mfu", "memory", "data_wait", "seconds"),
    *("straggler", "slowest_rank"),
    *(f"{phase}_seconds" for phase in PHASES),
)
"""Keys of a metrics line that depend on the clock and the machine, not on the run."""


def peak_flops(
    device: torch.device, precision: str, products: Sequence[Product] = (SQUARE,)
) -> tuple[float | None, str]:
    """(peak FLOP/s of one device or None when unknown, where the figure is from); on a CPU the best
    rate of the `products` (rows, inner, columns), in the arithmetic that it does them in."""
    if device.type == "cpu":
        wide = precision == "bf16" and not multiplies_bf16()  # ops/cpu_bf16.py: as float32
        dtype = torch.bfloat16 if precision == "bf16" and not wide else torch.float32
        seconds = SECONDS / len(products)
        rates = {product: matmul_flops(dtype, product, seconds) for product in products}
        best = max(products, key=rates.__getitem__)
        shape, threads = " x ".join(map(str, best)), torch.get_num_threads()
        told = f"{str(dtype).removeprefix('torch.')} product {shape} measured on this CPU"
        return rates[best], f"{rates[best] / 1e9:.0f} GFLOP/s, {told} with {threads} threads"
    name = torch.cuda.get_device_name(device)
    found = find_accelerator(name)
    if found is None:
        return (
            None,
            f"{name} is not in the table of peaks (nanolm/training/accelerators.py), so no MFU",
        )
    peak = found.peak(precision)
    return peak, f"{name}: {peak / 1e12:g} dense {precision} TFLOP/s by its data sheet"


def matmul_flops(dtype: torch.dtype, product: Product = SQUARE, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest matmul of this shape on the CPU among those that fit into the time.

    The first product of a process also starts its threads and is not counted, and a machine that is
    busy for a moment must not pass for its peak.
    """
    rows, inner, columns = product
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    left @ right
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best


def memory_bytes(device: torch.device) -> int:
    """Bytes in use: peak allocation on CUDA, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = pathlib.Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Clock of the training loop: rates over the steps since the last reading."""

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak: float | None) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak = peak
        self.total_seconds = 0.0
        self.total_steps = 0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._waited, self._excluded = 0, 0.0, 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside (checkpoints, evaluation) counts for no rate."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - start

    def add_step(self, waited: float) -> None:
        """One optimizer step is done, `waited` seconds of it spent waiting for data."""
        self._steps += 1
        self._waited += waited

    def resume(self, seconds: float, steps: int) -> None:
        """Goes on from an earlier start's total, which took `steps` steps."""
        self.total_seconds, self.total_steps = seconds, steps
        self._reset()

    @property
    def _unread(self) -> float:
        """Seconds since the last reading that count."""
        return max(time.perf_counter() - self._start - self._excluded, 1e-9)

    @property
    def seconds(self) -> float:
        """All seconds that count, those since the last reading included."""
        return self.total_seconds + self._unread

    def speeds(self, device: torch.device) -> dict[str, float | None]:
        """Figures since the last reading: rates, memory in bytes, share of time without data."""
        seconds = self._unread
        self.total_seconds += seconds
        self.total_steps += self._steps
        flops = self.flops_per_step * self._steps / seconds
        figures = {
            "tokens_per_second": self.tokens_per_step * self._steps / seconds,
            "tflops": flops / 1e12 if self.flops_per_step else None,
            "mfu": flops / self.peak if self.peak and self.flops_per_step else None,
            "memory": memory_bytes(device),
            "data_wait": self._waited / seconds,
        }
        self._reset()
        return figures

    @property
    def overall(self) -> float:
        """Tokens per second over all readings."""
        return self.tokens_per_step * self.total_steps / max(self.total_seconds, 1e-9)
