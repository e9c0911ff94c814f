"""Two ranks on one GPU over gloo: the losses of `nanolm train` alone.

    python -m nanolm.tools.first_contact.two_ranks [--strategy fsdp] [--device cpu] [--json FILE]

nccl refuses two ranks on one GPU; gloo carries their gradients through host memory. Real rows of
real text, torchrun, and the run's own metrics.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import tempfile
from typing import Literal

from nanolm.distributed.devices import device_type
from nanolm.errors import require
from nanolm.terminal import say
from nanolm.tools import gpu_check
from nanolm.tools.first_contact.measurement import Figures, enter

STEPS = 20
TOLERANCE = 1e-4
"""Largest difference of a float32 loss of about 6: two ranks sum a batch in another order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where, and how the model is held."""

    device: str = "cuda"
    """Device type."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """distributed.strategy of the two."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> int:
    """Trains alone and with two ranks, prints and writes; 1 when losses differ."""
    device = device_type(arguments.device)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = gpu_check.environment() | {"CUDA_VISIBLE_DEVICES": first}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        data = gpu_check.small_corpus(folder)
        options = [f"--train.steps={STEPS}", "--run.checkpoint_every=0"]
        alone = [*gpu_check.train_command(folder / "alone", data, device), *options]
        two = [*gpu_check.train_command(folder / "two", data, device)[2:], *options]
        two += ["--distributed.backend=gloo", f"--distributed.strategy={arguments.strategy}"]
        for command in (alone, [*gpu_check.torchrun(2), *two]):
            done = subprocess.run(command, env=environment, check=False)
            require(done.returncode == 0, f"`nanolm train` ended with {done.returncode}")
        expected, found = (gpu_check.losses(folder / name) for name in ("alone", "two"))
    require(len(expected) == len(found) == STEPS, "the runs took other steps than they were told")
    far = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    right = far <= TOLERANCE
    words = f"{arguments.strategy}, two ranks on one device over gloo: {STEPS} losses from "
    words += f"{found[0]:.3f} to {found[-1]:.3f}, at most {far:.1e} from one rank's, "
    words += f"{TOLERANCE:.0e} allowed"
    Figures(arguments.json).add({"ok": right, "words": words, "losses": found, "far": far})
    say(f"{'ok  ' if right else 'FAIL'} {words}")
    return int(not right)


if __name__ == "__main__":
    enter(Arguments, run, "two_ranks")
