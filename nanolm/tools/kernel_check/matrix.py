"""The compile matrix: every kernel, as it is launched, for every GPU the project names.

    python -m nanolm.tools.kernel_check.matrix sm_80,sm_90 [--sample] [--only word]

prints one JSON row per compiled kernel, in a process without TRITON_INTERPRET. `nanolm kernels
compile` runs it and compares the rows with kernels/compile_matrix.json. `faults` says what is wrong
with a row: registers spilled to memory, more shared memory than the GPU has, a 16-bit product
without tensor cores, a float32 product in another precision than the one that was asked for
(Triton's own default is TF32).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

import nanolm.kernels
from nanolm.tools.kernel_check.builds import BUILDS, SAMPLE, Build, launch

RECORD = pathlib.Path(next(iter(nanolm.kernels.__path__))) / "compile_matrix.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Spills that are accepted: none, but for the widest heads and for sm_100, whose compiler is young …
SPILLS = {"sm_100": 16}
SPILLS_AT_256 = 16
# … and for these kernels of builds (docs/kernels_attention.md says what was tried).
KNOWN_SPILLS: dict[str, dict[str, int]] = {
    "attention/128/bfloat16/causal/grouped+window+bucket+dropout/attention_forward_kernel": {
        "sm_90": 2
    },
    "attention/128/bfloat16/causal/grouped+window+bucket+dropout/attention_key_value_kernel": {
        "gfx942": 2,
        "sm_100": 545,
        "sm_120": 34,
        "sm_80": 140,
        "sm_86": 28,
        "sm_89": 28,
        "sm_90": 99,
    },
    "attention/128/bfloat16/causal/grouped+window+bucket+dropout/attention_query_kernel": {
        "sm_100": 28,
        "sm_90": 56,
    },
    "attention/256/bfloat16/causal/grouped+window+bucket+dropout/attention_forward_kernel": {
        "sm_90": 59
    },
    "attention/256/bfloat16/causal/grouped+window+bucket+dropout/attention_key_value_kernel": {
        "sm_100": 30,
        "sm_80": 100,
        "sm_90": 40,
    },
    "attention/256/bfloat16/causal/grouped+window+bucket+dropout/attention_query_kernel": {
        "sm_100": 113
    },
    "attention/64/bfloat16/causal/grouped+window+bucket+dropout/attention_key_value_kernel": {
        "sm_120": 2,
        "sm_86": 4,
        "sm_89": 4,
        "sm_90": 4,
    },
    "attention/64/bfloat16/causal/grouped+window+bucket+dropout/attention_query_kernel": {
        "sm_90": 2
    },
    "norm/12288/bfloat16/layernorm+wide_stream/norm_backward_kernel": {
        "sm_100": 80,
        "sm_120": 87,
        "sm_80": 70,
        "sm_86": 60,
        "sm_89": 60,
        "sm_90": 71,
    },
    "norm/12288/bfloat16/norm_backward_kernel": {"sm_120": 2},
    "norm/16384/bfloat16/layernorm+wide_stream/norm_backward_kernel": {
        "sm_100": 278,
        "sm_120": 236,
        "sm_80": 1085,
        "sm_86": 302,
        "sm_89": 302,
        "sm_90": 312,
    },
    "norm/16384/bfloat16/norm_backward_kernel": {"sm_120": 6},
}


def read_record() -> list[dict[str, Any]]:
    """The rows of compile_matrix.json; none where there is no file yet."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []


def builds_for(arch: str, *, sample: bool = False, only: str = "") -> tuple[Build, ...]:
    """What is compiled for an architecture: all builds, or the sample, whose name has `only`."""
    builds: tuple[Build, ...] = SAMPLE if sample else BUILDS
    return tuple(build for build in builds if only in build.name and build.exists_on(arch))


def rows(arch: str, builds: tuple[Build, ...]) -> Iterator[dict[str, Any]]:
    """Compiles and reports, one row a kernel."""
    from nanolm.tools.kernel_check.compile import collecting, report  # noqa: PLC0415

    for build in builds:
        start = sum(os.times()[:4])  # of this process and of ptxas, on a machine that others use
        with collecting(arch) as kernels:
            launch(build)
        seconds = round(sum(os.times()[:4]) - start, 1)
        for kernel in kernels:
            yield {"arch": arch, "build": build.name, **report(kernel, arch), "seconds": seconds}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    sixteen = "float32" not in row["build"]
    allowed = SPILLS_AT_256 if "/256/" in row["build"] else SPILLS.get(row["arch"], 0)
    known = KNOWN_SPILLS.get(f"{row['build']}/{row['kernel']}", {})
    allowed = known.get(row["arch"], allowed)
    if sixteen and row["spills"] > allowed:
        found.append(f"{row['spills']} spills, {allowed} allowed")
    if sixteen and row.get("scratch_bytes", 0) and not row["spills"]:
        found.append(f"{row['scratch_bytes']} bytes of scratch memory, though nothing is spilled")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, {row['shared_limit']} exist")
    if row.get("programs") == 0:  # rows of before this column have none
        found.append("a multiprocessor has too few registers or too little memory for one program")
    if row["precision"] and (sixteen or "tf32x3" in row["build"]) and not row["tensor_core"]:
        found.append("a product without tensor cores")
    stated = "tf32x3" if "tf32x3" in row["build"] else "ieee"
    if not sixteen and row["precision"] not in ([], [stated]):
        found.append(f"a float32 product in {row['precision']}, {stated} was asked for")
    return found


def compile_elsewhere(
    archs: list[str], *, sample: bool, only: str = ""
) -> Iterator[dict[str, Any]]:
    """The rows, compiled in a process of its own, where nothing is interpreted; `only` those of
    builds whose name contains it.

    Raises RuntimeError with the compiler's words when something does not compile.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanolm.tools.kernel_check.matrix", ",".join(archs)]
    command += ["--sample"] * sample + ["--only", only] * bool(only)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in cast(IO[str], process.stdout):
            if line.startswith("{"):
                yield json.loads(line)
        words = cast(IO[str], process.stderr).read()
    if process.returncode != 0:
        raise RuntimeError(f"compiling for {', '.join(archs)} failed:\n{words}")


def key(row: dict[str, Any]) -> str:
    """What identifies a row."""
    return f"{row['arch']}/{row['build']}/{row['kernel']}"


def main() -> None:
    """Prints rows as JSON, one a line."""
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    for arch in sys.argv[1].split(","):
        for row in rows(arch, builds_for(arch, sample="--sample" in sys.argv, only=only)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
