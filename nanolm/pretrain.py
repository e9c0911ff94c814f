"""Pretraining: `run_train` is the table of contents of a run, and each of its lines a chapter in a
module of its own."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from nanolm import build
from nanolm.checkpoint.checkpoints import Checkpoints, load_trunk, locate, read_trainer
from nanolm.checkpoint.container import write_json
from nanolm.checkpoint.run_folder import claim
from nanolm.config.load import dump
from nanolm.config.schema import Config
from nanolm.data.shards.directory import unigram_counts
from nanolm.data.stream import RowStream
from nanolm.data.tokenizer import MODEL_FILE, Tokenizer
from nanolm.distributed.world import World, close, launch, undivided
from nanolm.errors import require
from nanolm.objectives.base import Objective
from nanolm.peft.base import trainable_counts
from nanolm.peft.files import adapter_files, begin_adapter
from nanolm.training.evaluation import Evaluator, Yardstick
from nanolm.training.flops import train_flops_per_token
from nanolm.training.loader import MicroBatch, eval_batches, open_loader, steps
from nanolm.training.sinks import open_sinks
from nanolm.training.throughput import Throughput, peak_flops
from nanolm.training.trainer import Trainer


def run_train(config: Config) -> dict[str, Any]:
    """Trains as the config says; returns the summary, which is empty when a signal ended the run.

    Raises UserError for anything the user can mend.
    """
    started = time.perf_counter()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    world = launch(config.distributed, config.run.device)
    tokenizer = build.build_tokenizer(config)
    config = build.resolve(config, tokenizer)
    objective = build.build_objective(config, tokenizer)
    stream = build.build_stream(config, objective, "train")
    facts = {"data_hash": data_hash(stream), "tokenizer_hash": tokenizer.hash}
    start = claim(
        pathlib.Path(config.run.dir),
        config.resume,
        dump(config),
        facts,
        world,
        shared=config.run.shared,
    )
    meta = config.distributed.strategy != "ddp" and world.size > 1 and config.init_from is None
    learner = build.build_learner(config, objective, world.device, meta=meta)
    origin = start_from(config, learner, start.checkpoint)
    done = read_trainer(start.checkpoint)["step"] if start.checkpoint else 0
    sinks, note = open_sinks(config, world, done)
    for line in [*start.notes, *undivided(config.distributed, world), *origin]:
        note(line)
    try:
        trainer = Trainer(
            config,
            learner,
            world,
            functools.partial(steps, config, stream, objective, world),
            checkpoints=Checkpoints(
                pathlib.Path(config.run.dir),
                world,
                config.run.keep_last,
                shared=config.run.shared,
            ),
            evaluator=build_evaluator(config, objective, tokenizer, world, "val"),
            sinks=sinks,
            throughput=build_throughput(config, stream, objective, world, note),
            note=note,
            files={
                "config.yaml": dump(config).encode(),
                MODEL_FILE: tokenizer.model_bytes,
                **adapter_files(learner),
            },
            facts=facts,
        )
        if start.checkpoint:
            trainer.restore(start.checkpoint)
            note(f"resumed from {start.checkpoint} at step {trainer.done}")
        figures = trainer.fit()
        summary = {} if trainer.preempted else summarise(trainer, figures, facts, started)
    finally:
        for sink in sinks:
            sink.close()
    close(world)
    return summary


def data_hash(stream: RowStream) -> str:
    """One hash of all corpora with their weights."""
    parts = [
        f"{manifest.data_hash} {weight!r}"
        for manifest, (_, weight) in zip(stream.manifests, stream.corpora, strict=True)
    ]
    if len(parts) == 1:
        return stream.manifests[0].data_hash
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def start_from(
    config: Config, learner: nn.Module, checkpoint: pathlib.Path | None = None
) -> list[str]:
    """Fills the trunk and matching heads from config.init_from, and puts the adapter of config.peft
    on them; returns what to tell the user.

    A run that goes on from a checkpoint finds all weights there, unless it trains an adapter.
    """
    adapted = config.peft.name != "none"
    require(
        not adapted or config.init_from is not None,
        f"peft={config.peft.name} adapts trained weights; say which: --init_from RUN",
    )
    if config.init_from is None or (checkpoint is not None and not adapted):
        return []
    base = locate(config.init_from)
    fresh = load_trunk(base, learner)
    heads = f"; fresh heads: {', '.join(fresh)}" if fresh else ""
    notes = [f"weights from {config.init_from}{heads}"]
    if adapted:
        notes.append(begin_adapter(config, learner, fresh, base, checkpoint))
    return notes


def build_evaluator(
    config: Config, objective: Objective, tokenizer: Tokenizer, world: World, split: str
) -> Evaluator:
    """The evaluator of a split, with bytes and unigram costs of every token."""
    stream = build.build_stream(config, objective, split)
    counts = sum(
        unigram_counts(folder, manifest)
        for (folder, _), manifest in zip(stream.corpora, stream.manifests, strict=True)
    )
    rows = config.eval.batch or config.train.global_batch
    limit = config.eval.batches and config.eval.batches * rows
    # The rank's share in pieces no larger than a training micro-batch: memory that is known to do.
    piece = min(rows, config.train.micro_batch or config.train.global_batch)

    def batches() -> Iterator[MicroBatch]:
        return eval_batches(
            stream,
            objective,
            piece,
            world.rank,
            world.size,
            seed=config.run.seed,
            limit=limit,
            device=world.device,
        )

    return Evaluator(batches, world, Yardstick(tokenizer.byte_length, counts))


def build_throughput(
    config: Config,
    stream: RowStream,
    objective: Objective,
    world: World,
    note: Callable[[str], None],
) -> Throughput:
    """The clock, with model FLOPs by formula and the device's peak; says what it assumes."""
    train, length = config.train, config.data.row_length
    rows = min(train.global_batch, 16)
    probe = open_loader(config, stream, objective, world).build(range(rows))
    share = probe.counts[next(iter(objective.weights))] / (rows * length)
    tokens = train.global_batch * length
    flops = train_flops_per_token(config.model, length, predicted_share=share)
    peak, origin = peak_flops(world.device, train.precision)
    note(
        f"model FLOPs per token {flops:.4g} (forward and backward, {share:.1%} of positions "
        f"predicted); peak: {origin}"
    )
    return Throughput(tokens, flops * tokens, peak and peak * world.size)


def summarise(
    trainer: Trainer, figures: dict[str, float], facts: dict[str, Any], started: float
) -> dict[str, Any]:
    """The run in a dozen figures, written to summary.json by rank 0."""
    summary = {
        "steps": trainer.done,
        "tokens": trainer.done * trainer.tokens_per_step,
        "params": trainable_counts(trainer.engine.learner)[1],
        "trainable_params": trainable_counts(trainer.engine.learner)[0],
        "val_loss": figures.get("loss"),
        **{k: figures.get(k) for k in ("perplexity", "bits_per_byte", "unigram_bits_per_byte")},
        "accuracy": figures.get("accuracy"),
        "tokens_per_second": trainer.throughput.overall,
        "seconds": time.perf_counter() - started,
        **facts,
    }
    if trainer.world.is_main:
        write_json(trainer.snapshot.checkpoints.run / "summary.json", summary)
    return summary
