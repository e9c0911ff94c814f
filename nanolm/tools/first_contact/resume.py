"""Real data, SIGKILL, resume: GPT-2 124M on real text goes on as if nothing had happened.

    python -m nanolm.tools.first_contact.resume [--device cpu] [--json FILE]

One run is left alone. A second one is killed as soon as its first checkpoint is there, somewhere in
the steps behind it, and started again with the same command. Every figure of theirs that the clock
does not decide must have the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from nanolm.distributed.devices import device_type
from nanolm.errors import require
from nanolm.terminal import say
from nanolm.tools import gpu_check
from nanolm.tools.first_contact.measurement import Figures, enter
from nanolm.training.throughput import TIMING

CONFIG = pathlib.Path(__file__).resolve().parents[3] / "configs" / "pretrain" / "gpt2_124m.yaml"
STEPS, EVERY = 60, 20
COMMON = [
    *(f"--train.steps={STEPS}", f"--run.checkpoint_every={EVERY}", "--resume=auto"),
    *("--train.global_batch=16", "--train.micro_batch=16", "--schedule.warmup=10"),
    *("--eval.every=0", "--eval.batches=2", "--run.log_every=5", "--run.wandb.mode=disabled"),
    "--run.checkpoint_async=true",  # the kill meets a run that goes on while it writes
]
TINY = [
    *("--model.d_model=32", "--model.n_layers=2", "--model.n_heads=2", "--model.vocab_size=512"),
    *("--model.max_length=64", "--data.row_length=64", "--train.global_batch=4"),
    *("--train.micro_batch=4", "--eval.batch=4", "--train.precision=fp32"),
]
"""On a CPU: the same run, tiny."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where."""

    device: str = "cuda"
    """Device type; on a CPU the model is tiny."""
    json: str | None = None
    """Also write the figures to this file."""


def start(run: pathlib.Path, data: pathlib.Path, device: str) -> subprocess.Popen:
    """The training process."""
    command = [sys.executable, "-m", "nanolm", "train", f"--config={CONFIG}", *COMMON]
    command += [f"--data.path={data}", f"--run.dir={run}", f"--run.device={device}"]
    command += TINY if device == "cpu" else []
    return subprocess.Popen(command, env=gpu_check.environment())


def finish(run: pathlib.Path, data: pathlib.Path, device: str) -> float:
    """Trains to the end; the seconds that it took. Raises UserError when training fails."""
    begin = time.monotonic()
    status = start(run, data, device).wait()
    require(status == 0, f"`nanolm train` ended with status {status}")
    return time.monotonic() - begin


def kill_after_checkpoint(run: pathlib.Path, data: pathlib.Path, device: str) -> None:
    """Trains until the first checkpoint is there, then kills the process with SIGKILL. Raises
    UserError when training ends before that."""
    job = start(run, data, device)
    checkpoint = run / "checkpoints" / f"step-{EVERY:08d}"
    while not checkpoint.is_dir():
        require(job.poll() is None, f"`nanolm train` ended before {checkpoint.name}")
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    status = job.wait()
    require(status == -signal.SIGKILL, f"the run ended with {status} before it could be killed")


def records(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what the clock decides."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def difference(calm: list[dict[str, Any]], hit: list[dict[str, Any]]) -> str:
    """The first thing in which two runs differ, in words; empty when they do not."""
    for expected, found in zip(calm, hit):
        for key in expected:
            if expected[key] != found.get(key):
                where = f"step {expected['step']} ({expected['kind']})"
                return f"{where}: {key} is {found.get(key)!r} and was {expected[key]!r}"
    return "" if len(calm) == len(hit) else f"{len(hit)} lines of metrics where {len(calm)} were"


def run(arguments: Arguments) -> int:
    """Prepares, trains, kills, resumes, compares; 1 when a figure differs."""
    device = device_type(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        data = gpu_check.small_corpus(folder)
        calm, hit = folder / "calm", folder / "hit"
        seconds = finish(calm, data, device)
        kill_after_checkpoint(hit, data, device)
        reached = len((hit / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        finish(hit, data, device)
        expected, found = records(calm), records(hit)
    apart = difference(expected, found)
    words = f"killed behind step {EVERY} of {STEPS} ({reached} lines of metrics written), resumed: "
    words += apart or f"all {len(expected)} lines of metrics bit-equal"
    losses = [record["loss"] for record in expected]
    words += f"; loss {losses[0]:.3f} to {losses[-1]:.3f}, {seconds:.0f} s undisturbed"
    Figures(arguments.json).add({"ok": not apart, "words": words, "losses": losses})
    say(f"{'FAIL' if apart else 'ok  '} {words}")
    return int(bool(apart))


if __name__ == "__main__":
    enter(Arguments, run, "resume")
