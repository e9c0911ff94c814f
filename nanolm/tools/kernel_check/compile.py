"""Compiles the project's Triton kernels for GPUs that are not there, and reads what came out.

The kernels are not described a second time: the real launch code runs, on CPU tensors, while Triton
is told that the GPU is another one and stops after compiling. So every argument is specialised
exactly as on that GPU. Needs a process without TRITON_INTERPRET.

    with collecting("sm_90") as kernels:
        attention(q, k, v, …)
    report(kernels[0], "sm_90")
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

if os.environ.get("TRITON_INTERPRET") == "1":
    raise ImportError("TRITON_INTERPRET=1 is set: this process interprets kernels, start another")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Shared memory that one program may ask for, in bytes (CUDA C programming guide, table of compute
# capabilities; LDS size of the CDNA 3 white paper).
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself, a program
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Processor(NamedTuple):
    """What the programs of one multiprocessor share."""

    warps: int
    programs: int
    shared: int  # bytes


PROCESSORS = {
    "sm_80": Processor(64, 32, 167_936),
    "sm_86": Processor(48, 16, 102_400),
    "sm_89": Processor(48, 24, 102_400),
    "sm_90": Processor(64, 32, 233_472),
    "sm_100": Processor(64, 32, 233_472),
    "sm_120": Processor(48, 24, 102_400),
    "gfx942": Processor(32, 32, 65_536),
}
REGISTERS = 65_536  # 32-bit registers of an NVIDIA multiprocessor, on every architecture here


def target_of(arch: str) -> GPUTarget:
    """An architecture ("sm_90", "gfx942") as Triton names it."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


class AbsentDriver:
    """Stands where Triton's driver for a GPU would, for compiling only."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return target_of(self.arch)

    def get_current_device(self) -> str:
        """Triton keeps compiled kernels by device: the architecture's name serves as one."""
        return self.arch

    def get_current_stream(self, device: Any) -> int:
        """No stream."""
        return 0


@contextlib.contextmanager
def collecting(arch: str) -> Iterator[list[Any]]:
    """Launches within it compile for `arch`, append what they compiled to the list, and do not
    run: outputs stay uninitialised."""
    from nanolm.kernels.launch import forced_arch  # noqa: PLC0415  (imports Triton's runtime)

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    driver, previous = triton.runtime.driver, triton.runtime.driver._active
    driver.set_active(AbsentDriver(arch))
    try:
        with forced_arch(arch):
            yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(previous)


def report(kernel: Any, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory, tensor-core instructions and vector loads of a kernel;
    the products that it issues for one that is needed; the programs that a multiprocessor holds."""
    figures = {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "shared": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
    }
    read = nvidia_figures if arch.startswith("sm_") else amd_figures
    figures |= read(kernel) | {"precision": dot_precisions(kernel)}
    return figures | {"products": products(kernel), "programs": programs(figures, arch)}


def products(kernel: Any) -> float | None:
    """Multiplications that the tensor cores are told to do, for each that the source asks for.

    More than 1 says that warps repeat each other's work: of a tile with fewer rows than the warps
    take together, some compute the same rows again. Both are counted as they stand in the text,
    a loop's body once; a loop that the compiler proves empty, as that without masks is for
    documents, still stands in the source, and halves the figure. None where the text does not
    tell: without products or tensor cores, and on sm_100, whose instructions name their tile in a
    register.
    """
    dots = re.findall(
        r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>", kernel.asm["ttir"]
    )
    parts = 3 if "tf32x3" in dot_precisions(kernel) else 1
    needed = parts * sum(math.prod(map(int, sizes)) for sizes in dots)
    text, warps = kernel.asm.get("ptx") or kernel.asm["amdgcn"], kernel.metadata.num_warps
    issued = 0
    for pattern, width in (
        (r"\bmma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", 1),
        (r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", 4),
        (r"v_mfma_f32_(\d+)x(\d+)x(\d+)", 1),
    ):
        found = sum(math.prod(map(int, sizes)) for sizes in re.findall(pattern, text))
        issued += found * warps // width
    return round(issued / needed, 2) if issued and needed else None


def programs(figures: dict[str, Any], arch: str) -> int:
    """How many programs a multiprocessor holds at once: as many as its warps, registers and shared
    memory allow."""
    processor, warps = PROCESSORS[arch], figures["warps"]
    if arch.startswith("sm_"):
        taken = -(-figures["registers"] * 32 // 256) * 256  # a warp's, in steps of 256
        by_registers = REGISTERS // (taken * warps)
        by_shared = processor.shared // (figures["shared"] + RESERVED)
    else:  # four SIMD units with 512 vector registers a lane each, given out in steps of 8
        waves = min(8, 512 // (-(-figures["registers"] // 8) * 8))
        by_registers = 4 * waves // warps
        by_shared = processor.shared // max(figures["shared"], 1)
    return min(processor.programs, processor.warps // warps, by_registers, by_shared)


def nvidia_figures(kernel: Any) -> dict[str, Any]:
    """What cuobjdump and nvdisasm say of the machine code, and the PTX of itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    ptx = kernel.asm["ptx"]
    words = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.M)
    return {
        "registers": int(cast(re.Match, re.search(r"REG:(\d+)", usage)).group(1)),
        "spills": sum(word in ("STL", "LDL") for word in words),
        "tensor_core": {
            name: count
            for name, pattern in (
                ("mma", r"\bmma\.sync"),
                ("wgmma", r"wgmma\.mma_async"),
                ("tcgen05", r"tcgen05\.mma"),
            )
            if (count := len(re.findall(pattern, ptx)))
        },
        "wide_loads": len(re.findall(r"(?:ld\.global[\w.:]*\.v4|cp\.async\.cg)", ptx)),
    }


def amd_figures(kernel: Any) -> dict[str, Any]:
    """What the AMD assembly says of itself.

    A spilled vector register goes to memory (scratch), as NVIDIA's STL does. A spilled scalar
    register goes into the lanes of a vector register, which costs no memory: told apart.
    """
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        return int(cast(re.Match, re.search(rf"\.{key}:\s+(\d+)", text)).group(1))

    mfma = len(re.findall(r"v_mfma_", text))
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "scratch_bytes": number("private_segment_fixed_size"),
        "tensor_core": {"mfma": mfma} if mfma else {},
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
    }


def dot_precisions(kernel: Any) -> list[str]:
    """inputPrecision of every tt.dot in the compiler's own IR; no word there means IEEE."""
    found = []
    for line in kernel.asm["ttir"].splitlines():
        if "tt.dot " in line:
            word = re.search(r"inputPrecision = (\w+)", line)
            found.append(word.group(1) if word else "ieee")
    return sorted(set(found))


def tool(name: str, *arguments: str) -> str:
    """Output of one of the binaries inside the triton wheel."""
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
