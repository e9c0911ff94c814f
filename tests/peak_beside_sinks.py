"""What the peak of a CPU is measured to be before and after a run's metric sinks are opened.

    python -m tests.peak_beside_sinks runs/demo-data --turns 5

Each turn is a process: 40 steps of the demo with its W&B sink, whose package a thread imports
as the sink opens. The peak is measured four times within a second: of one 768 x 768 product and of
the model's own largest ones, just before the sinks and just after. Prints GFLOP/s of each and what
the run's MFU would be by it (docs/LOG.md, "MFU above 100 %").
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from unittest import mock

import torch

from nanolm import cli, pretrain, run
from nanolm.training.throughput import SQUARE, peak_flops

ROOT = pathlib.Path(__file__).parent.parent


def turn(data: str, number: int) -> dict[str, float]:
    """{where and of what: GFLOP/s}, and "steps": those that the run's steps reached."""
    found: dict[str, float] = {}
    products = [(SQUARE,)]

    def measure(place: str) -> None:
        kinds = {"one 768 x 768": (SQUARE,), "the model's own": products[-1]}
        for name in sorted(kinds, reverse=number % 2 == 1):  # each is the first in turn
            rate, _ = peak_flops(torch.device("cpu"), "fp32", kinds[name])
            found[f"{name}, {place} the sinks"] = rate / 1e9

    def peak(device, precision, own):
        products.append(own)
        return peak_flops(device, precision, own)

    @contextlib.contextmanager
    def sinks(*arguments):
        measure("before")
        with open_sinks(*arguments) as opened:
            measure("after")
            yield opened

    open_sinks = run.open_sinks
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--config={ROOT}/configs/pretrain/demo_clm.yaml", f"--data.path={data}"]
        words += [f"--run.dir={folder}/run", "--train.steps=40", "--run.log_every=10"]
        with (
            mock.patch.object(pretrain, "peak_flops", peak),
            mock.patch.object(run, "open_sinks", sinks),
        ):
            cli.main(["train", *words, "--eval.every=0"])
        lines = (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [line["tflops"] for line in map(json.loads, lines) if line.get("tflops")][1:]
    return found | {"steps": statistics.median(rates) * 1e3}


def main() -> None:
    """Prints the table of all turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the demo's prepared corpus")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn is not None:
        print(json.dumps(turn(arguments.data, arguments.turn)))
        return
    command = [sys.executable, "-m", "tests.peak_beside_sinks", arguments.data, "--turn"]
    turns = []
    for number in range(arguments.turns):
        printed = subprocess.check_output([*command, str(number)], cwd=ROOT, text=True)
        turns.append(json.loads(printed.splitlines()[-1]))
    for name in turns[0]:
        rates = [each[name] for each in turns]
        utilisation = [each["steps"] / each[name] for each in turns]
        print(f"{name:<36} GFLOP/s {' '.join(f'{rate:5.0f}' for rate in rates)}", end="   ")
        print(f"MFU {' '.join(f'{part:5.0%}' for part in utilisation)}")


if __name__ == "__main__":
    main()
