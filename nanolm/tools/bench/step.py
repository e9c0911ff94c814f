"""A contestant of `nanolm bench train`, in a process of its own (see bench/contest.py).

    python -m nanolm.tools.bench.step '{"settings": …, "shape": …, …}'

The process builds the contestant and takes its warm-up steps (which compile, if it compiles); then
it answers each line of input with a turn and its figures, a line of JSON. nanolm itself is measured
as it trains: its Loader, its Trainer's `step`.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nanolm.tools.bench.clock import Clock, Step, clock_on, listed
from nanolm.tools.bench.contest import serve
from nanolm.tools.bench.shape import Shape
from nanolm.tools.stand_in import stand_in_tokenizer
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import AUTOCAST, RuleEngine
from nanolm.training.gradient import Backward
from nanolm.training.throughput import matmul_flops

CPU = torch.device("cpu")


class TrainStep(Step, Protocol):
    """A contestant of this benchmark."""

    kernels: dict[str, str]
    """Op -> the kernels that were chosen for it; none where nothing is chosen."""

    def prepare(self, clock: Clock) -> None:
        """Last thing before the first step: compile, set marks."""


def write_random_shard(folder: pathlib.Path, shape: Shape) -> None:
    """A prepared folder of random documents, about 300 tokens each, that the Loader reads: 64 steps
    of the shape, or 2^18 tokens if that is more."""
    from nanolm.data.shards.directory import (  # noqa: PLC0415
        Manifest,
        ShardWriter,
        data_hash,
        split_totals,
    )

    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 600, max(1 << 18, 64 * shape.tokens) // 300)
    tokens = rng.integers(4, shape.vocab_size, lengths.sum())
    path, name = folder / "train-00000.arrow", "random ids"
    with ShardWriter(
        path, tokens=len(tokens), vocab_size=shape.vocab_size, tokenizer_hash=name
    ) as writer:
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


def nanolm_config(
    settings: dict[str, Any], shape: Shape, precision: str, folder: str, device: str = "cpu"
) -> Any:
    """The run's config: GPT-2's block for CLM, BERT's for MLM."""
    from nanolm.config.choices import choose  # noqa: PLC0415
    from nanolm.config.load import parse  # noqa: PLC0415

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
        "run": {"dir": f"{folder}/run", "device": device},
    }
    names = {"objective": settings["objective"], "schedule": "constant"}
    return parse(choose(names), [], base=base, prog="nanolm bench train")


class NanolmStep:
    """nanolm's own step: Loader, then Trainer.step, unchanged; only marks are set on the way."""

    def __init__(
        self, settings: dict[str, Any], shape: Shape, precision: str, device: torch.device = CPU
    ) -> None:
        from nanolm import build  # noqa: PLC0415
        from nanolm.distributed.world import World  # noqa: PLC0415
        from nanolm.run import Plan, rehearse  # noqa: PLC0415

        self.folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self.folder.name)
        write_random_shard(folder, shape)
        config = nanolm_config(settings, shape, precision, str(folder), device.type)
        objective = build.build_objective(config, stand_in_tokenizer(shape.vocab_size))
        stream = build.build_stream(config, objective, "train")
        plan = Plan(config=config, objective=objective, stream=stream)
        self.trainer = rehearse(plan, World(device=device), folder / "run")
        self.batches = self.trainer.loader_factory(0)
        learner = self.trainer.engine.learner
        self.n_parameters = sum(parameter.numel() for parameter in learner.parameters())
        self.kernels = chosen_kernels(learner)

    def prepare(self, clock: Clock) -> None:
        """Marks after the trunk, after the learner (its loss included) and after the gradient."""
        learner, rule = self.trainer.engine.learner, self.trainer.update.rule

        def marked_rule(
            learner: RuleEngine, micro_batches: Sequence[MicroBatch], backward: Backward
        ) -> None:
            rule(learner, micro_batches, backward)
            clock.mark("backward")

        learner.trunk.register_forward_hook(lambda *_: clock.mark("forward"))
        learner.register_forward_hook(lambda *_: clock.mark("loss"))
        self.trainer.update.rule = marked_rule

    def __call__(self, clock: Clock) -> dict[str, float]:
        """One optimizer step; its loss."""
        micro_batches = next(self.batches)
        clock.mark("data")
        result = self.trainer.step(micro_batches)
        clock.mark("optimizer")
        return {"loss": result.loss}


def chosen_kernels(learner: Any) -> dict[str, str]:
    """Op -> the kernels that serve it in a learner of nanolm."""
    names: dict[str, set[str]] = {}
    for choice in learner.trunk.kernels.choices.values():
        names.setdefault(choice.op, set()).add(choice.kernel.name)
    return {op: " and ".join(sorted(found)) for op, found in sorted(names.items())}


def build_step(job: dict[str, Any], shape: Shape, device: torch.device = CPU) -> TrainStep:
    """The contestant that the job names, on the device."""
    settings = job["settings"]
    if settings["model"] == "nanolm":
        return NanolmStep(settings, shape, job["precision"], device)
    from nanolm.tools.bench.peers import PeerStep  # noqa: PLC0415

    return PeerStep(settings, shape, job["precision"], device)


def take_a_toy_step(job: dict[str, Any]) -> TrainStep:
    """One step of the job's contestant at a tiny shape, which loads all that a first step does."""
    toy = Shape(n_layers=1, d_model=32, n_heads=2, row_length=16, batch=2, vocab_size=64)
    settings = job["settings"] | {"compile": False}
    step = build_step(job | {"settings": settings}, toy)
    Clock().take(step)
    return step


def enter(job: dict[str, Any]) -> None:
    """Builds the job's contestant, takes its warm-up steps, then serves turns of `steps` steps."""
    torch.set_num_threads(job["threads"])
    clock = clock_on(job.get("device", "cpu"))
    before = clock.held_before(functools.partial(take_a_toy_step, job))
    step = build_step(job, Shape(**job["shape"]), clock.device)
    step.prepare(clock)

    losses = listed([clock.take(step) for _ in range(job["warmup"])])["loss"]
    facts = {
        "before_bytes": before,
        "parameters": step.n_parameters,
        "kernels": step.kernels,
        "first_loss": losses[0],
        "host_waits": clock.count_waits(step),
        "peak_flops": clock.data_sheet_peak(job["precision"]),
    }
    clock.forget_peak()
    serve(facts, lambda: clock.turn(step, job["steps"]))


def enter_matmul(job: dict[str, Any]) -> None:
    """The machine's matrix product in the job's precision: its rate is the denominator of MFU."""
    torch.set_num_threads(job["threads"])
    dtype = AUTOCAST.get(job["precision"], torch.float32)
    serve({}, lambda: {"matmul_flops": matmul_flops(dtype, (2048, 2048, 2048))})


def main() -> None:
    """Read the job, take part."""
    job = json.loads(sys.argv[1])
    contestant = enter_matmul if job["settings"]["model"] == "matmul" else enter
    contestant(job)


if __name__ == "__main__":
    main()
