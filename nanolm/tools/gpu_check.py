"""What `nanolm doctor --gpu` does on the first machine with a GPU: kernels, losses twice, a kill.

    kernels   every kernel that serves the device against its reference (`nanolm kernels doctor`)
    losses    20 steps of a small decoder, float32, on the device and on the CPU
    bfloat16  20 steps with the device's kernels against float32 (first_contact/sixteen_bits.py)
    kill      torchrun with two ranks, over nccl where each has a GPU of its own; one is killed with
              SIGKILL, the job restarts from its checkpoint and must end as an undisturbed one does

Each is a function of a device, so that the same code runs in the tests with device=cpu.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

import torch

from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
from nanolm.errors import require
from nanolm.processes import python_path
from nanolm.tools.first_contact.sixteen_bits import MODELS, Setting, compare
from nanolm.tools.first_contact.verdict import Verdict
from nanolm.tools.kernel_check.survey import default_jobs, survey

STEPS, KILL_STEPS = 20, 120
MODULES = ("argparse.py", "textwrap.py", "statistics.py", "ast.py", "inspect.py", "typing.py")
RUN = [
    *("--model.d_model=64", "--model.n_layers=2", "--model.n_heads=2", "--model.max_length=64"),
    *("--data.row_length=64", "--train.global_batch=8", "--optim.lr=1e-3", "--schedule.warmup=5"),
    *("--eval.every=0", "--eval.batches=1", "--run.log_every=1", "--run.wandb.mode=disabled"),
]
LOSS_TOLERANCE = 2e-3
"""Largest difference of a loss of about 6, after 20 float32 steps with other orders of summing."""
KILL_TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
"""Of the last loss: on the CPU the restarted run is bit-equal."""
PATIENCE = 300.0
"""Seconds after which a run that should have ended counts as hanging."""


def check_device(device: str) -> list[Verdict]:
    """All checks, on "cuda" or "cpu"."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        data = small_corpus(folder)
        return [
            check_kernels(device, folder),
            check_losses(device, folder, data),
            check_bfloat16(device),
            check_kill(device, folder, data, KILL_STEPS),
        ]


def small_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Six modules of the standard library, prepared with 512 pieces."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    config = PrepareConfig(
        out=str(folder / "data"),
        sources=[str(library / name) for name in MODULES],
        vocab_size=512,
        val_fraction=0.2,
        workers=1,
    )
    prepare(config, Silent())
    return folder / "data"


def check_kernels(device: str, folder: pathlib.Path) -> Verdict:
    """The conformance suite of every kernel that serves the device."""
    rows = list(survey(device, quick=True, jobs=default_jobs(device)))
    told = [finding for _, found in rows for finding in found]
    wrong = [
        f"{patient.op} {patient.kernel}"
        for patient, found in rows
        if any(finding.verdict == "FAIL" for finding in found)
    ]
    passed = sum(finding.verdict == "pass" for finding in told)
    words = ", ".join([f"{passed} checks of {len(rows)} kernels", *(f"{w} wrong" for w in wrong)])
    return Verdict("kernels", "nanolm kernels doctor", not wrong and passed > 0, words)


def check_losses(device: str, folder: pathlib.Path, data: pathlib.Path) -> Verdict:
    """The same 20 steps on the device and on the CPU."""
    found: list[list[float]] = []
    for where in ("cpu", device):
        run = folder / f"losses-{where}-{len(found)}"
        words = [f"--train.steps={STEPS}", "--run.checkpoint_every=0"]
        subprocess.run([*train_command(run, data, where), *words], env=environment(), check=True)
        found.append(losses(run))
    require(len(found[0]) == STEPS, "the run on the CPU took other steps than it was told")
    far = max(abs(a - b) for a, b in zip(*found, strict=True))
    told = f"{STEPS} float32 losses from {found[1][0]:.3f} to {found[1][-1]:.3f}"
    told += f", at most {far:.1e} from the CPU's"
    passed = far <= LOSS_TOLERANCE and found[0][-1] < found[0][0]
    return Verdict("training", f"nanolm train --run.device {device}", passed, told)


def check_bfloat16(device: str) -> Verdict:
    """20 steps in bfloat16 with the device's kernels against float32, a model after the other."""
    rows = [compare(Setting(model=model, device=device), {}) for model in MODELS]
    told = "; ".join(row["words"] for row in rows)
    command = f"python -m nanolm.tools.first_contact.sixteen_bits --device {device}"
    return Verdict("bfloat16", command, all(row["ok"] for row in rows), told)


def check_kill(device: str, folder: pathlib.Path, data: pathlib.Path, steps: int) -> Verdict:
    """An undisturbed run under torchrun, and one of which a rank is killed half-way."""
    ranks, calm, hit = 2, folder / "calm", folder / "hit"
    backend = backend_of(device, ranks)
    words = [f"--train.steps={steps}", "--run.checkpoint_every=10", "--resume=auto"]
    words += [f"--distributed.backend={backend}"]
    calm_run, hit_run = (
        [*torchrun(ranks), *train_command(run, data, device)[2:], *words] for run in (calm, hit)
    )
    subprocess.run(calm_run, env=environment(), check=True, timeout=PATIENCE)
    job = subprocess.Popen(hit_run, env=environment())
    try:
        killed_at = kill_a_rank(job, hit, steps // 2)
        status = job.wait(PATIENCE)
    finally:
        job.kill()
    command = f"torchrun --nproc_per_node {ranks} --max-restarts 3 … --resume auto"
    far = abs(losses(calm)[-1] - losses(hit)[-1])
    told = f"{ranks} ranks ({backend}), one killed after step {killed_at} of {steps}; "
    told += "last loss bit-equal" if far == 0 else f"last loss {far:.1e} from the undisturbed one"
    told += f", torchrun ended with {status}"
    whole = status == 0 and killed_at is not None and len(losses(hit)) == steps
    return Verdict("kill and resume", command, whole and far <= KILL_TOLERANCE[device], told)


def backend_of(device: str, ranks: int) -> str:
    """nccl where every rank has a GPU of its own; gloo for ranks that share one, and on a CPU."""
    return "nccl" if device == "cuda" and torch.cuda.device_count() >= ranks else "gloo"


def kill_a_rank(job: subprocess.Popen, run: pathlib.Path, after: int) -> int | None:
    """Kills the last rank once the metrics have passed a step; returns the step, None for never."""
    give_up = time.monotonic() + PATIENCE
    while job.poll() is None and time.monotonic() < give_up:
        done = len(losses(run))
        workers = ranks_of(job.pid)
        if done >= after and workers:
            os.kill(workers[max(workers)], signal.SIGKILL)
            return done
        time.sleep(0.01)
    return None


def ranks_of(agent: int) -> dict[int, int]:
    """{rank: pid} of the workers that a torchrun agent has started (Linux)."""
    found = {}
    children = pathlib.Path(f"/proc/{agent}/task/{agent}/children")
    for pid in children.read_text().split() if children.exists() else []:
        try:
            words = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # gone since
            continue
        named = dict(word.split(b"=", 1) for word in words if b"=" in word)
        if b"RANK" in named:
            found[int(named[b"RANK"])] = int(pid)
    return found


def torchrun(ranks: int) -> list[str]:
    """Command line of an elastic agent on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["--local-addr=127.0.0.1"]  # a machine without a network may not know its name
    return [*command, "-m"]


def train_command(run: pathlib.Path, data: pathlib.Path, device: str) -> list[str]:
    """Command line of a small training run; from its third word on, for torchrun."""
    command = [sys.executable, "-m", "nanolm", "train", *RUN]
    return [*command, f"--data.path={data}", f"--run.dir={run}", f"--run.device={device}"]


def environment() -> dict[str, str]:
    """This checkout first; float32 products as exact as the CPU's."""
    return os.environ | {"PYTHONPATH": python_path(), "NVIDIA_TF32_OVERRIDE": "0"}


def losses(run: pathlib.Path) -> list[float]:
    """The losses of a run's training lines so far, in order."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the line that is being written
            break
        if record["kind"] == "train":
            found.append(record["loss"])
    return found
