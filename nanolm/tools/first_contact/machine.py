"""What machine this is: versions, the GPU as torch sees it, compilers, memory, disk.

python -m nanolm.tools.first_contact.machine [--device cpu] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from nanolm.distributed.devices import device_type
from nanolm.terminal import say
from nanolm.tools.bench.cells import cpu_name
from nanolm.tools.first_contact.measurement import Figures, enter
from nanolm.training.accelerators import find_accelerator

PACKAGES = ("torch", "triton", "numpy", "pyarrow", "sentencepiece", "safetensors", "rich", "PyYAML")
OPTIONAL = ("transformers", "jsonargparse", "wandb")
TOOLS = ("gcc", "g++", "nvcc", "ptxas", "nvidia-smi")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to look at."""

    device: str = "cuda"
    """Device type."""
    json: str | None = None
    """Also write the figures to this file."""


def package_versions() -> dict[str, str]:
    """Name -> version of what nanolm may use; "missing" where there is none."""
    found = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            module = {"PyYAML": "yaml"}.get(name, name)
            found[name] = "missing" if importlib.util.find_spec(module) is None else "unknown"
    return found


def gpu_facts() -> dict[str, Any]:
    """The first CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    found = find_accelerator(properties.name)
    left = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
    return {
        "device": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "peak_bf16_tflops": found and found.half,
        "a_product_works": bool((left @ left)[0, 0] == 1024),
    }


def facts(device: str) -> dict[str, Any]:
    """All that is to be known of a device type, cpu or cuda, and of its host."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    host = {
        "python": platform.python_version(),
        "packages": package_versions(),
        "tools": {name: shutil.which(name) or "missing" for name in TOOLS},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "host_memory_gb": pages * page / 1e9,
        "temporary_disk_gb": disk.free / 1e9,
        "platform": platform.platform(),
    }
    return ({"device": "CPU as stand-in"} if device == "cpu" else gpu_facts()) | host


def run(arguments: Arguments) -> int:
    """Prints and writes; 1 when a product on the device is wrong. Raises UserError without one."""
    row = facts(device_type(arguments.device))
    Figures(arguments.json).add(row)
    for key, value in row.items():
        say(f"{key}: {value}")
    packages = row["packages"]
    say(
        f"this is {row['device']}, Python {row['python']}, torch {packages['torch']}, triton "
        f"{packages['triton']}, {row['usable_cores']} cores"
    )
    if tool := shutil.which("nvidia-smi"):
        subprocess.run([tool], check=False)  # for the log: clocks, what else runs
    return int(not row.get("a_product_works", True))


if __name__ == "__main__":
    enter(Arguments, run, "machine")
