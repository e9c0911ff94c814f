"""Cells: measurements of a benchmark, kept on disk as they are finished.

Every contestant of every benchmark runs in the same environment. A finished cell stands in a JSON
file under a hash of all that decides it (jobs, turn, machine, environment), so an interrupted
benchmark goes on where it was.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nanolm.errors import UserError
from nanolm.files import Finished, key_of
from nanolm.processes import python_path

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""For every contestant: glibc keeps freed memory instead of returning it and faulting it in again
each step, asks for huge pages, and waiting threads sleep."""


class Cells:
    """Finished measurements on disk: hash of all that decides one -> what it gave."""

    def __init__(self, path: str, fresh: bool = False) -> None:
        self.finished = Finished(path, "a benchmark", "environment", fresh=fresh)
        self.finished.beside["environment"] = ENVIRONMENT

    def get(
        self, what: dict[str, Any], take: Callable[[], dict[str, Any]], device: str = "cpu"
    ) -> dict[str, Any]:
        """The measurement that `what` decides on cpu or cuda, taken now unless it is there."""
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}
        if device != "cpu":
            machine["device"] = device_name(device)
        key = key_of({**what, "machine": machine, "environment": ENVIRONMENT})
        if key not in self.finished.cells:
            begin = time.perf_counter()
            result = take()
            result["wall_seconds"] = time.perf_counter() - begin
            result["load_average"] = os.getloadavg()[0]  # above `cores`, others were running
            self.finished.put(key, {**what, "machine": machine, "result": result})
        return self.finished.cells[key]["result"]


def run_process(job: dict[str, Any], module: str) -> dict[str, Any]:
    """What `python -m module JOB` prints; raises UserError with its last line when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(job)],
        env=os.environ | ENVIRONMENT | thread_variables(job) | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = last_line(done.stderr, done.returncode)
        raise UserError(f"{module}: {job['settings']} failed: {words}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def last_line(said: str, status: int) -> str:
    """What a process that failed said last."""
    lines = said.strip().splitlines() or [f"exit status {status}"]
    return lines[-1]


def thread_variables(job: dict[str, Any]) -> dict[str, str]:
    """The environment that holds a process to its job's number of threads."""
    return {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}


def device_name(device: str) -> str:
    """The name of the processor, or of the first CUDA device."""
    return cpu_name() if device == "cpu" else torch.cuda.get_device_name(0)


def cpu_name() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
