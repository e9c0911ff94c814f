"""`nanolm kernels bench`: all kernels of an op beside each other on the device at hand.

    ms        median over repetitions, the kernels taking turns, after one round of warming up
    host µs   of these, until the call returns: what launching costs, if the GPU is left to work
    device ms on a GPU, between two events, with the L2 cache written over before the call
    TFLOP/s   of the products that the op means (the visible half of a causal mask)
    GB/s      of the bytes that must move: inputs, outputs and their gradients, each once
    MB        the most that a call holds beside its inputs

On a CPU Triton kernels, anyone's, are left out: there they run in its interpreter or not at all.
"""

from __future__ import annotations

import dataclasses
import re

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.errors import UserError
from nanolm.ops.timings import save_timings
from nanolm.tables import open_console
from nanolm.terminal import say
from nanolm.tools.bench.kernels import measure, show, timings
from nanolm.tools.kernel_check.examination import silent
from nanolm.tools.kernel_check.interpreter import prepare_interpreter
from nanolm.tools.kernel_check.problems import PROBLEMS, Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Sizes):
    """What to measure."""

    op: str = "all"
    """One op, or all."""
    repetitions: Count = 7
    """Measurements of each kernel."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Modules with kernels of your own."""
    matrices: list[str] = dataclasses.field(default_factory=list)
    """Matrices of symmetric_product, such as 768x768 768x3072; none means width x ff_width."""
    save: str | None = None
    """Add the timings to this file, which kernels.timings of a config names; needs backward."""
    json: str | None = None
    """Also write the table here."""

    def of(self, op: str) -> list[Arguments]:
        """The sizes of each problem of an op: one, or one a matrix."""
        if op != "symmetric_product" or not self.matrices:
            return [self]
        sizes = map(matrix_size, self.matrices)
        return [dataclasses.replace(self, width=rows, ff_width=columns) for rows, columns in sizes]


def matrix_size(word: str) -> tuple[int, int]:
    """768x3072 or 3072x768 as Muon multiplies either: the shorter side first."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", word):
        raise UserError(f"--matrices {word}: write rows x columns without spaces, as 768x3072")
    rows, columns = sorted(map(int, word.split("x")))
    return rows, columns


def run(arguments: Arguments) -> None:
    """Measure and print, op by op."""
    prepare_interpreter()
    for sentence in silent(arguments.plugins):
        say(sentence)
    if arguments.op not in ("all", *PROBLEMS):
        raise UserError(f"--op {arguments.op}: choose from all, {', '.join(PROBLEMS)}")
    if arguments.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {arguments.dtype}: choose from float32, bfloat16, float16")
    if arguments.save and not arguments.backward:
        raise UserError("--save keeps forward and backward together; leave --backward false away")
    ops = list(PROBLEMS) if arguments.op == "all" else [arguments.op]
    problems = [(op, sizes) for op in ops for sizes in arguments.of(op)]
    table = []
    for op, sizes in problems:
        rows = measure(op, sizes, arguments.repetitions)
        say(f"{op}: {rows[-1].get('problem', '')}, {arguments.dtype}, {rows[-1].get('passes', '')}")
        show(rows, open_console())
        table += rows
        if arguments.save:  # problem by problem: who interrupts it keeps what was timed
            save_timings(arguments.save, timings(rows))
    write_json(arguments.json, table)
