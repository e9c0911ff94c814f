"""Pretraining: what is particular to it. The run itself is told in `run.py`, for all kinds."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from nanolm import build
from nanolm.checkpoint.checkpoints import load_trunk, locate
from nanolm.checkpoint.facts import facts_of, require_same_facts
from nanolm.checkpoint.fewer_layers import load_layers
from nanolm.config.schema import Config
from nanolm.data.shards.directory import unigram_counts
from nanolm.data.stream import RowStream
from nanolm.data.tokenizer import MODEL_FILE, Tokenizer
from nanolm.distributed.world import World
from nanolm.errors import require
from nanolm.hub.importing import base_of
from nanolm.learner import Learner
from nanolm.objectives.base import Objective
from nanolm.peft.base import trainable_counts
from nanolm.peft.files import begin_adapter, require_whole
from nanolm.run import Note, Plan, carry_out
from nanolm.training.batch import MicroBatch
from nanolm.training.evaluation import Evaluator, UnigramBaseline
from nanolm.training.flops import largest_products, train_flops_per_token
from nanolm.training.loader import eval_batches, open_loader
from nanolm.training.throughput import Throughput, peak_flops
from nanolm.training.trainer import Trainer

SUMMARISED = ("perplexity", "bits_per_byte", "unigram_bits_per_byte", "accuracy")
"""Figures of the last evaluation that stand in summary.json, beside the loss."""


def run_train(config: Config) -> dict[str, Any]:
    """Trains as the config says; returns the summary, which is empty when a signal ended the run.

    Raises UserError for anything the user can mend.
    """
    return carry_out(plan(config, build.build_tokenizer(config)))


def plan(config: Config, tokenizer: Tokenizer) -> Pretraining:
    """The run that the config describes, its data opened and checked."""
    config = dataclasses.replace(config, init_from=base_of(config.init_from))
    if config.init_from is not None:
        require_whole(locate(config.init_from), config.init_from)
    config = build.resolve(config, tokenizer)
    objective = build.build_objective(config, tokenizer)
    stream = build.build_stream(config, objective, "train")
    return Pretraining(
        config=config,
        objective=objective,
        stream=stream,
        tokenizer=tokenizer,
        facts=facts_of(stream),
    )


class Pretraining(Plan):
    """Trains on a token stream, from initial weights or those of another run."""

    stream: RowStream

    def start_weights(self, learner: Learner, checkpoint: pathlib.Path | None) -> list[str]:
        """Trunk and matching heads from config.init_from, and the adapter of config.peft."""
        return start_from(self.config, learner, checkpoint, self.facts["tokenizer_hash"])

    def evaluator(self, world: World) -> Evaluator:
        """That of the val split."""
        tokenizer = cast(Tokenizer, self.tokenizer)  # `plan` has given one
        return build_evaluator(self.config, self.objective, tokenizer, world, "val")

    def throughput(self, world: World, note: Note) -> Throughput:
        """With model FLOPs by formula and the device's peak."""
        return build_throughput(self.config, self.stream, self.objective, world, note)

    def summarise(self, trainer: Trainer, figures: Mapping[str, float]) -> dict[str, Any]:
        """How many weights were trained, and the last evaluation."""
        return {
            "trainable_params": trainable_counts(trainer.engine.learner)[0],
            "val_loss": figures.get("loss"),
            **{name: figures.get(name) for name in SUMMARISED},
        }


def start_from(
    config: Config, learner: Learner, checkpoint: pathlib.Path | None, tokenizer_hash: str
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
    require(
        config.init_layers is None or config.init_from is not None,
        "init_layers names layers of init_from, which is not set: --init_from RUN",
    )
    if config.init_from is None or (checkpoint is not None and not adapted):
        return []
    base = locate(config.init_from)
    require_same_facts(
        base,
        {"tokenizer_hash": tokenizer_hash},
        f"its weights mean other tokens: prepare the data with --tokenizer {base}/{MODEL_FILE}, or "
        f"leave out init_from",
    )
    fresh, left_out = base_weights(config, base, learner)
    heads = f"; fresh heads: {', '.join(fresh)}" if fresh else ""
    less = f"; left out: {', '.join(left_out)}" if left_out else ""
    notes = [f"weights from {config.init_from}{heads}{less}"]
    if adapted:
        notes.append(begin_adapter(config, learner, fresh, base, checkpoint))
    return notes


def base_weights(
    config: Config, base: pathlib.Path, learner: Learner
) -> tuple[list[str], list[str]]:
    """Fills the learner from its base, or from the layers of it that config.init_layers names;
    returns (heads that start fresh, weights that were left out)."""
    if config.init_layers is None:
        return load_trunk(base, learner), []
    require(
        config.peft.name == "none",
        f"peft={config.peft.name} adapts a base as a whole, and init_layers takes some of its "
        f"layers; leave init_layers out",
    )
    return load_layers(base, learner, config.init_layers)


def build_evaluator(
    config: Config, objective: Objective, tokenizer: Tokenizer, world: World, split: str
) -> Evaluator:
    """The evaluator of a split, with bytes and unigram costs of every token."""
    stream = build.build_stream(config, objective, split)
    return evaluator_of(stream, config, objective, tokenizer, world)


def evaluator_of(
    stream: RowStream, config: Config, objective: Objective, tokenizer: Tokenizer, world: World
) -> Evaluator:
    """The evaluator of the rows of a stream."""
    counts: Any = sum(
        unigram_counts(folder, manifest)
        for (folder, _), manifest in zip(stream.corpora, stream.manifests, strict=True)
    )
    if hasattr(objective, "target_counts"):
        counts = objective.target_counts(counts)
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

    return Evaluator(batches, world, UnigramBaseline(tokenizer.byte_length, counts))


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
    flops = train_flops_per_token(
        config.model,
        length,
        predicted_share=share,
        memory=getattr(objective, "memory", 0),
        recurrence=getattr(objective, "recurrence", 1),
    )
    together = min(train.micro_batch or train.global_batch, -(-train.global_batch // world.size))
    products = largest_products(config.model, together * length)
    peak, origin = peak_flops(world.device, train.precision, products)
    note(
        f"model FLOPs per token {flops:.4g} (forward and backward, {share:.1%} of positions "
        f"predicted); peak: {origin}"
    )
    return Throughput(tokens, flops * tokens, peak and peak * world.size)
