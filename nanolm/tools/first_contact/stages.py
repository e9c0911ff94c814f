"""The table of stages: what is done on the first machine with a GPU, in which order, and for how
long at most.

    part 1   the machine, a smoke test, every kernel's numerics, training in bfloat16 against
             float32, GPT-2's step, attention's speed
    part 2   BERT's step, kill and resume on real text, process groups
    part 3   nanolm on torch's kernels, small models, traces, `doctor --gpu`, the other ops' speed

A part is one call of under ten minutes. On a CPU the same table runs with tiny sizes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Mapping

PARTS = (1, 2, 3)
RESULT = r"^(ok  |FAIL)"
STEP = r" ms a step|^kernels: "


@dataclasses.dataclass(frozen=True)
class Stage:
    """One measurement: commands {name of the log: words} that run side by side, and the seconds
    that they get. A line of output that `tells` finds something in is worth the report."""

    name: str
    part: int
    limit: float
    commands: Mapping[str, list[str]]
    tells: str = RESULT
    needs: str | None = None
    """A package without which the stage is left out."""

    def why_not(self) -> str | None:
        """Why the stage cannot be begun here, or None."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed"


@dataclasses.dataclass(frozen=True)
class Table:
    """Makes the stages for a device type; figures of a log `name` go to logs/`name`.jsonl."""

    device: str
    jobs: int
    logs: pathlib.Path

    def call(self, name: str, module: str, *words: str) -> dict[str, list[str]]:
        """{name: the command of a measurement of this package}."""
        command = [sys.executable, "-m", f"{__package__}.{module}", "--device", self.device]
        return {name: [*command, "--json", str(self.logs / f"{name}.jsonl"), *words]}

    def training(self, name: str, shape: str, *words: str) -> dict[str, list[str]]:
        """{name: the command that measures a training step}; on a CPU every shape is tiny."""
        shape = "tiny" if self.device == "cpu" else shape
        return self.call(name, "training", "--shape", shape, *words)

    def contestants(self, part: int, size: str, objective: str, family: str) -> list[Stage]:
        """nanolm, a plain loop and transformers at one size, eager and compiled."""
        found = []
        for who, model in {
            objective: "nanolm",
            f"{objective}-plain": f"plain-{family.removesuffix('2')}",
            f"{objective}-transformers": f"transformers-{family}",
        }.items():
            for name, more, limit in ((who, (), 90), (f"{who}-compiled", ("--compile",), 150)):
                words = ("--model", model, "--objective", objective, *more)
                needs = "transformers" if "transformers" in model else None
                commands = self.training(name, size, *words)
                found.append(Stage(name, part, limit, commands, STEP, needs))
        return found

    def numerics(self, name: str, *words: str) -> dict[str, list[str]]:
        """Processes that share the checks; on a CPU of tiny sizes, the definitions among them."""
        tiny = ("--divide", "128", "--kernels", "sdpa", "chunked", "reference")
        words = (*(tiny if self.device == "cpu" else ()), *words)
        shares = [("--share", str(i), "--shares", str(self.jobs)) for i in range(self.jobs)]
        calls: dict[str, list[str]] = {}
        for number, share in enumerate(shares):
            calls |= self.call(f"{name}-{number}", "numerics", *share, *words)
        return calls

    def first_part(self) -> list[Stage]:
        """The machine, numerics, GPT-2, attention."""
        smoke = {
            **self.training("smoke-clm", "smoke"),
            **self.training("smoke-mlm", "smoke", "--objective", "mlm"),
            **self.training("smoke-compiled", "smoke", "--compile"),
        }
        checks, figures = r"^FAIL|checks,", r"^attention: |TFLOP/s|cannot"
        return [
            Stage("machine", 1, 60, self.call("machine", "machine"), "^this is"),
            Stage("smoke", 1, 180, smoke, STEP),
            Stage("numerics", 1, 240, self.numerics("numerics"), checks),
            Stage("bfloat16", 1, 120, self.call("bfloat16", "sixteen_bits")),
            *self.contestants(1, "gpt2", "clm", "gpt2"),
            Stage("attention", 1, 200, self.call("attention", "attention_speed"), figures),
        ]

    def second_part(self) -> list[Stage]:
        """BERT, real text, groups."""
        sharded = self.call("two-ranks-fsdp", "two_ranks", "--strategy", "fsdp")
        return [
            *self.contestants(2, "bert", "mlm", "bert"),
            Stage("resume", 2, 240, self.call("resume", "resume")),
            Stage("groups", 2, 150, self.call("groups", "groups")),
            Stage("two-ranks", 2, 120, self.call("two-ranks", "two_ranks")),
            Stage("two-ranks-fsdp", 2, 120, sharded),
        ]

    def third_part(self) -> list[Stage]:
        """What the first two have left."""
        torch, compiled = ("--kernels", "torch"), ("--compile",)
        trace = ("--trace", str(self.logs / "trace.chrome.json"))
        compiled_trace = ("--trace", str(self.logs / "trace-compiled.chrome.json"))
        nanolm = [sys.executable, "-m", "nanolm"]
        memory = [*nanolm, "kernels", "memory", "--device", self.device]
        memory += ["--json", str(self.logs / "loss-memory.json")]
        if self.device == "cpu":  # as a dry run; 8,192 tokens are three minutes' work
            memory += ["--tokens", "512"]
        doctor = [*nanolm, "doctor", "--gpu", "--device", self.device]
        doctor += ["--json", str(self.logs / "doctor.json")]

        def step(name: str, limit: float, shape: str, *words: str) -> Stage:
            return Stage(name, 3, limit, self.training(name, shape, *words), STEP)

        return [
            step("clm-torch", 90, "gpt2", *torch),
            step("clm-torch-compiled", 150, "gpt2", *torch, *compiled),
            step("small", 60, "small"),
            step("small-compiled", 90, "small", *compiled),
            step("small-plain", 60, "small", "--model", "plain-gpt"),
            step("trace", 90, "gpt2", *trace),
            step("trace-compiled", 150, "gpt2", *compiled, *compiled_trace),
            Stage("loss-memory", 3, 90, {"loss-memory": memory}, " of the plain"),
            Stage("doctor", 3, 300, {"doctor": doctor}, r"^\|| \d+ failed"),
            Stage("ops", 3, 90, self.call("ops", "op_speed"), "^[a-z]| ms |cannot"),
            Stage("flex", 3, 150, self.numerics("flex", "--kernels", "flex"), r"^FAIL|checks,"),
        ]

    def stages(self) -> list[Stage]:
        """All, in their order; a dry run on a CPU may take its time."""
        found = [*self.first_part(), *self.second_part(), *self.third_part()]
        slower = 4 if self.device == "cpu" else 1
        return [dataclasses.replace(stage, limit=slower * stage.limit) for stage in found]
