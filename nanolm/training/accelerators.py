"""GPUs by name: the dense matrix-product peak of each and its memory, from the makers' data sheets.

A device is found by the longest entry that stands in its name between word borders, so that "H100"
does not answer for an H100 NVL, nor "A100" for an RTX A1000. Slices of a GPU (MIG) and mobile
variants have other peaks than their name says, and are not found.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """`half`: dense TFLOP/s with 16-bit inputs and float32 sums; `single`: in float32 without TF32;
    `gibibytes`: memory, of the larger variant where there are two."""

    half: float
    single: float
    gibibytes: float

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in fp32, bf16 or fp16."""
        return (self.single if precision == "fp32" else self.half) * 1e12


ACCELERATORS: dict[str, Accelerator] = {
    "V100": Accelerator(125.0, 15.7, 32),
    "V100-PCIE": Accelerator(112.0, 14.0, 32),
    "T4": Accelerator(65.0, 8.1, 16),
    "A10": Accelerator(125.0, 31.2, 24),
    "A10G": Accelerator(70.0, 35.0, 24),
    "A100": Accelerator(312.0, 19.5, 80),
    "A6000": Accelerator(154.8, 38.7, 48),
    "RTX 3090": Accelerator(71.0, 35.6, 24),
    "RTX 3090 Ti": Accelerator(80.0, 40.0, 24),
    "L4": Accelerator(121.0, 30.3, 24),
    "L40": Accelerator(181.0, 90.5, 48),
    "L40S": Accelerator(362.0, 91.6, 48),
    "RTX 4090": Accelerator(165.2, 82.6, 24),
    "H100": Accelerator(989.0, 67.0, 80),
    "H100 PCIe": Accelerator(756.0, 51.0, 80),
    "H100 NVL": Accelerator(835.0, 60.0, 94),
    "GH200": Accelerator(989.0, 67.0, 144),
    "H800": Accelerator(989.0, 67.0, 80),
    "H800 PCIe": Accelerator(756.0, 51.0, 80),
    "H20": Accelerator(148.0, 44.0, 96),
    "H200": Accelerator(989.0, 67.0, 141),
    "H200 NVL": Accelerator(835.0, 60.0, 141),
    "B200": Accelerator(2250.0, 75.0, 192),
    "GB200": Accelerator(2500.0, 80.0, 186),
    "B300": Accelerator(2250.0, 75.0, 288),
    "GB300": Accelerator(2500.0, 80.0, 288),
    "RTX 5090": Accelerator(209.5, 104.8, 32),
    "MI250X": Accelerator(191.5, 47.9, 64),  # one of its two dies, which torch counts as a device
    "MI300X": Accelerator(1307.4, 163.4, 192),
    "MI325X": Accelerator(1307.4, 163.4, 256),
}
OTHERWISE = ("MIG", "Laptop", "Max-Q")
"""Words in a device's name that say that it is less than what it is named after."""


def stands_in(part: str, name: str) -> bool:
    """Whether `part` is in `name` as whole words."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", name) is not None


def find_accelerator(device_name: str) -> Accelerator | None:
    """The entry for a device as the driver names it ("NVIDIA H100 80GB HBM3"), or None."""
    if any(stands_in(word, device_name) for word in OTHERWISE):
        return None
    found = [part for part in ACCELERATORS if stands_in(part, device_name)]
    return ACCELERATORS[max(found, key=len)] if found else None
