"""One measurement of `nanolm bench train`: one contestant in a process of its own.

    python -m nanolm.bench_step '{"contestant": …, "shape": …, …}'   ->   one line of JSON

The process builds the contestant, takes warm-up steps (which compile, if it compiles), then the
measured ones. nanolm itself is measured as it trains: its Loader, its Trainer's `step`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any, Protocol

import numpy as np
import torch

from nanolm.bench_shape import PHASES, Clock, Shape, forget_peak, resident_bytes
from nanolm.metrics import matmul_flops


class Step(Protocol):
    """A contestant: called once a step, it marks the phases on the clock and returns the loss."""

    n_parameters: int

    def prepare(self, clock: Clock) -> None:
        """Last thing before the first step: compile, set marks."""

    def __call__(self, clock: Clock) -> float: ...


@dataclasses.dataclass(frozen=True)
class StandInTokenizer:
    """As much of a tokenizer as MLM's collate asks for: four specials, then ordinary tokens."""

    vocab_size: int
    pad: int = 0
    mask: int = 1
    cls: int = 2
    sep: int = 3
    hash: str = "random ids"

    @property
    def special_mask(self) -> np.ndarray:
        """bool[V]: the specials."""
        return np.arange(self.vocab_size) < 4


def write_random_shard(folder: pathlib.Path, shape: Shape, n_tokens: int = 1 << 18) -> None:
    """A prepared folder of random documents, about 300 tokens each, that the Loader reads."""
    from nanolm.data.shards import (  # noqa: PLC0415
        Manifest,
        ShardWriter,
        data_hash,
        split_totals,
    )

    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 600, n_tokens // 300)
    tokens = rng.integers(4, shape.vocab_size, lengths.sum())
    path, name = folder / "train-00000.arrow", "random ids"
    with ShardWriter(path, vocab_size=shape.vocab_size, tokenizer_hash=name) as writer:
        writer.write(tokens, lengths, len(tokens))
    splits = {"train": [writer.info]}
    Manifest(
        tokenizer="tokenizer.model",
        tokenizer_hash=name,
        vocab_size=shape.vocab_size,
        special_ids={"eos": 3},
        splits=splits,
        totals=split_totals(splits),
        inputs=[],
        cleaning={},
        unigram="unigram.npy",
        unigram_sha256="",
        data_hash=data_hash(name, splits),
        config={},
    ).save(folder)


def nanolm_config(settings: dict[str, Any], shape: Shape, precision: str, folder: str) -> Any:
    """The run's config: GPT-2's block for CLM, BERT's for MLM."""
    from nanolm.arguments import parse  # noqa: PLC0415
    from nanolm.build import DTYPES  # noqa: F401, PLC0415  (registers what is built in)
    from nanolm.choices import choose  # noqa: PLC0415

    model: dict[str, Any] = {
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "max_length": shape.row_length,
        "vocab_size": shape.vocab_size,
    }
    if settings["objective"] == "clm":
        model |= {"trunk": "decoder"}
    else:
        model |= {"trunk": "encoder", "norm_position": "post", "embedding_norm": True}
        model |= {"norm_eps": 1e-12, "n_segments": 2}
    base = {
        "model": model,
        "data": {"path": folder, "row_length": shape.row_length},
        "schedule": {"name": "constant"},
        "objective": {"name": settings["objective"]},
        "train": {
            "steps": 1_000_000,
            "global_batch": shape.batch,
            "precision": precision,
            "compile": settings.get("compile", False),
        },
        "kernels": settings.get("kernels", {}),
        "run": {"dir": f"{folder}/run", "device": "cpu"},
    }
    names = {"objective": settings["objective"], "schedule": "constant"}
    return parse(choose(names), [], base=base, prog="nanolm bench train")


class NanolmStep:
    """nanolm's own step: Loader, then Trainer.step, unchanged; only marks are set on the way."""

    def __init__(self, settings: dict[str, Any], shape: Shape, precision: str) -> None:
        from nanolm import build  # noqa: PLC0415
        from nanolm.checkpoint import Checkpoints  # noqa: PLC0415
        from nanolm.distributed import World  # noqa: PLC0415
        from nanolm.loader import Loader  # noqa: PLC0415
        from nanolm.trainer import Trainer  # noqa: PLC0415

        self.folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self.folder.name)
        write_random_shard(folder, shape)
        config = nanolm_config(settings, shape, precision, str(folder))
        objective = build.build_objective(config, StandInTokenizer(shape.vocab_size))
        learner = build.build_learner(config, objective)
        self.n_parameters = sum(parameter.numel() for parameter in learner.parameters())
        stream = build.build_stream(config, objective, "train")
        loader = Loader(stream, objective, global_batch=shape.batch, micro_batch=shape.batch)
        self.batches = iter(loader)
        self.trainer = Trainer(
            config,
            learner,
            World(),
            lambda step: self.batches,
            checkpoints=Checkpoints(folder / "run", World()),
        )

    def prepare(self, clock: Clock) -> None:
        """Marks after the trunk, after the learner (its loss included) and after the gradient."""
        learner, rule = self.trainer.engine.learner, self.trainer.update.rule

        def marked_rule(*arguments: Any) -> None:
            rule(*arguments)
            clock.mark("backward")

        learner.trunk.register_forward_hook(lambda *_: clock.mark("forward"))
        learner.register_forward_hook(lambda *_: clock.mark("loss"))
        self.trainer.update.rule = marked_rule

    def __call__(self, clock: Clock) -> float:
        """One optimizer step; the loss."""
        micro_batches = next(self.batches)
        clock.mark("data")
        result = self.trainer.step(micro_batches)
        clock.mark("optimizer")
        return result.loss


def build_step(job: dict[str, Any], shape: Shape) -> Step:
    """The contestant that the job names."""
    settings = job["settings"]
    if settings["model"] == "nanolm":
        return NanolmStep(settings, shape, job["precision"])
    from nanolm.bench_peers import PeerStep  # noqa: PLC0415

    return PeerStep(settings, shape, job["precision"])


def resident_after_a_toy(job: dict[str, Any]) -> int:
    """What the process holds before the model: libraries, and all that a first step loads."""
    toy = Shape(n_layers=1, d_model=32, n_heads=2, row_length=16, batch=2, vocab_size=64)
    settings = job["settings"] | {"compile": False}
    step, clock = build_step(job | {"settings": settings}, toy), Clock()
    clock.start()
    step(clock)
    return resident_bytes(peak=False)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and phases (medians over steps), peak memory in bytes, losses, parameters."""
    torch.set_num_threads(job["threads"])
    shape = Shape(**job["shape"])
    before = resident_after_a_toy(job)
    step, clock = build_step(job, shape), Clock()
    step.prepare(clock)
    losses = []
    for number in range(job["warmup"] + job["steps"]):
        if number == job["warmup"]:
            forget_peak()
        clock.start()
        losses.append(step(clock))
        clock.stop()
    measured = clock.phases[job["warmup"] :]
    phases = {
        phase: statistics.median(times[phase] for times in measured)
        for phase in PHASES
        if phase in measured[0]
    }
    return {
        "seconds": clock.seconds[job["warmup"] :],
        "cpu_seconds": clock.cpu_seconds[job["warmup"] :],
        "first_step_seconds": clock.seconds[0],
        "phases": phases,
        "peak_bytes": resident_bytes(peak=True),
        "before_bytes": before,
        "losses": losses,
        "parameters": step.n_parameters,
    }


def measure_peak(job: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of the machine's matrix product in the precision, the denominator of MFU."""
    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    return {"matmul_flops": matmul_flops(dtype, size=2048, seconds=3.0)}


def main() -> None:
    """Read the job, measure, print."""
    job = json.loads(sys.argv[1])
    result = measure_peak(job) if job["settings"]["model"] == "matmul" else measure(job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
