"""The compile matrix: every kernel, as it is launched, for every GPU the project names.

    python -m nanolm.kernel_check.matrix sm_80,sm_90 [--sample]      (without TRITON_INTERPRET)

prints one JSON row per compiled kernel. `nanolm kernels compile` runs it and compares the rows with
kernels/compile_matrix.json. `faults` says what is wrong with a row: registers spilled to memory,
more shared memory than the GPU has, a 16-bit product without tensor cores, a float32 product that
would be computed in TF32.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Spills that are accepted: none, but for the widest heads and for sm_100, whose compiler is young.
SPILLS = {"sm_100": 16}
SPILLS_AT_256 = 16


@dataclasses.dataclass(frozen=True)
class Build:
    """One thing to compile: an op in one shape."""

    op: str
    dtype: str
    width: int
    causal: bool = False

    @property
    def name(self) -> str:
        """How its rows are called."""
        return f"{self.op}/{self.width}/{self.dtype}" + "/causal" * self.causal


BUILDS = (
    Build("attention", "bfloat16", 64, True),
    Build("attention", "bfloat16", 64),
    Build("attention", "float16", 64, True),
    Build("attention", "float32", 64, True),
    Build("attention", "bfloat16", 96, True),
    Build("attention", "bfloat16", 128, True),
    Build("attention", "bfloat16", 128),
    Build("attention", "float16", 128, True),
    Build("attention", "bfloat16", 256, True),
    Build("norm", "bfloat16", 1024),
    Build("rotary", "bfloat16", 64),
    Build("glu", "bfloat16", 4096),
    Build("linear_cross_entropy", "bfloat16", 50304),
    Build("symmetric_product", "bfloat16", 1024),
)
SAMPLE = (BUILDS[0], Build("norm", "bfloat16", 1024))


def launch(build: Build) -> None:
    """Calls the op, forward and backward, on CPU tensors (within `compile.collecting`)."""
    import torch  # noqa: PLC0415

    from nanolm.masks import Mask  # noqa: PLC0415

    dtype = getattr(torch, build.dtype)

    def leaf(*shape: int) -> Any:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def attention() -> None:
        from nanolm.kernels.attention_op import attention as run  # noqa: PLC0415

        q, k, v = (leaf(1, 256, 2, build.width) for _ in range(3))
        out, _ = run(q, k, v, Mask(causal=build.causal), scale=0.1)
        torch.autograd.grad(out, (q, k, v), out)

    def norm() -> None:
        from nanolm.kernels.norm import norm as run  # noqa: PLC0415

        x, weight, residual = leaf(64, build.width), leaf(build.width), leaf(64, build.width)
        out, _ = run(x, weight, None, kind="rmsnorm", eps=1e-5, residual=residual)
        torch.autograd.grad(out, (x, weight), out)

    def rotary() -> None:
        from nanolm.kernels.rotary import rotary as run  # noqa: PLC0415

        angle = torch.zeros(1, 64, build.width // 2)
        run(leaf(1, 64, 12, build.width), angle, angle)

    def glu() -> None:
        from nanolm.kernels.glu import glu as run  # noqa: PLC0415

        gate_up = leaf(64, 2 * build.width)
        out = run(gate_up, kind="swiglu")
        torch.autograd.grad(out, gate_up, out)

    def linear_cross_entropy() -> None:
        from nanolm.kernels.cross_entropy import linear_cross_entropy as run  # noqa: PLC0415

        run(leaf(16, 64), leaf(build.width, 64), None, torch.zeros(16, dtype=torch.int64))

    def symmetric_product() -> None:
        from nanolm.kernels.symmetric_product import symmetric_product as run  # noqa: PLC0415

        run(leaf(build.width, build.width))

    calls: dict[str, Callable[[], None]] = {
        "attention": attention,
        "norm": norm,
        "rotary": rotary,
        "glu": glu,
        "linear_cross_entropy": linear_cross_entropy,
        "symmetric_product": symmetric_product,
    }
    calls[build.op]()


def rows(arch: str, builds: tuple[Build, ...]) -> Iterator[dict[str, Any]]:
    """Compiles and reports, one row a kernel."""
    from nanolm.kernel_check.compile import collecting, report  # noqa: PLC0415

    for build in builds:
        start = time.perf_counter()
        with collecting(arch) as kernels:
            launch(build)
        seconds = round(time.perf_counter() - start, 1)
        for kernel in kernels:
            yield {"arch": arch, "build": build.name, **report(kernel, arch), "seconds": seconds}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    sixteen = "float32" not in row["build"]
    allowed = SPILLS_AT_256 if "/256/" in row["build"] else SPILLS.get(row["arch"], 0)
    if sixteen and row["spills"] > allowed:
        found.append(f"{row['spills']} spills, {allowed} allowed")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, {row['shared_limit']} exist")
    if row["precision"] and sixteen and not row["tensor_core"]:
        found.append("a product without tensor cores")
    if not sixteen and not set(row["precision"]) <= {"ieee", "tf32x3"}:
        found.append(f"a float32 product in {row['precision']}")
    return found


def compile_elsewhere(archs: list[str], *, sample: bool) -> Iterator[dict[str, Any]]:
    """The rows, compiled in a process of its own, where nothing is interpreted.

    Raises RuntimeError with the compiler's words when something does not compile.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanolm.kernel_check.matrix", ",".join(archs)]
    command += ["--sample"] * sample
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        words = process.stderr.read()
    if process.returncode != 0:
        raise RuntimeError(f"compiling for {', '.join(archs)} failed:\n{words}")


def key(row: dict[str, Any]) -> str:
    """What identifies a row."""
    return f"{row['arch']}/{row['build']}/{row['kernel']}"


def main() -> None:
    """Prints rows as JSON, one a line."""
    archs = sys.argv[1].split(",")
    for arch in archs:
        for row in rows(arch, SAMPLE if "--sample" in sys.argv else BUILDS):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
