"""A tiny model, data and run for the tests of training, started in real processes.

The model has two terms with their own denominators, target counts that differ by row, dropout on
request and a tied weight; its rows are pure functions of their number, as the real ones are.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import socket
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.checkpoint.run_folder import cut_metrics, open_run_folder
from nanolm.config.schema import (
    Config,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    RunConfig,
    TrainConfig,
)
from nanolm.distributed.world import close, launch
from nanolm.errors import UserError
from nanolm.training.batch import MicroBatch
from nanolm.training.evaluation import Evaluator
from nanolm.training.gradient import PlainOptions
from nanolm.training.optim import AdamWOptions
from nanolm.training.schedules import CosineOptions
from nanolm.training.sinks import JsonLines
from nanolm.training.trainer import Trainer

T, V, D = 6, 17, 8
PRELOADED = [
    "pytest",
    "torch._dynamo",
    "nanolm.built_in",
    "nanolm.finetune.run",
    "tests.elastic",
    "tests.prepared",
    "tests.tiny_run",
]
"""What the fork server imports once, so that no rank has to: all that ranks of tests use."""


class Term(NamedTuple):
    sum: torch.Tensor
    count: torch.Tensor


class Objective:
    weights = {"token": 1.0, "row": 0.5}

    def targets(self, tensors):
        return tensors["targets"][tensors["targets"] >= 0]


class Trunk(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
            for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + self.dropout(block(x))
        return x


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(V))


class Learner(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.trunk = Trunk(dropout)
        self.heads = nn.ModuleDict(
            {"lm": Head(self.trunk.embedding.weight), "row": nn.Linear(D, 2)}
        )
        self.objective = Objective()

    def forward(self, batch):
        x = self.trunk(batch["tokens"])
        logits = F.linear(x, self.heads["lm"].weight, self.heads["lm"].bias)
        targets = batch["targets"]
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        right = ((logits.argmax(-1) == targets) & (targets >= 0)).sum()
        row = F.cross_entropy(self.heads["row"](x.mean(1)), batch["label"], reduction="sum")
        count = (targets >= 0).sum()
        return {
            "token": Term(nll, count),
            "nll": Term(nll.detach(), count),
            "accuracy": Term(right, count),
            "row": Term(row, torch.tensor(len(targets))),
        }


def build_learner(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(1)
    return Learner(dropout).to(dtype)


def batch_of(rows, empty=False):
    tokens, targets = [], []
    for row in rows:
        rng = np.random.default_rng((3, row))
        tokens.append(rng.integers(0, V, T))
        target = (tokens[-1] * 3 + 1) % V
        target[rng.permutation(T)[: rng.integers(0, T)]] = -100
        targets.append(target)
    tensors = {
        "tokens": torch.from_numpy(np.stack(tokens)),
        "targets": torch.from_numpy(np.stack(targets)),
        "label": torch.tensor([row % 2 for row in rows]),
    }
    counts = {"token": int((tensors["targets"] >= 0).sum()), "row": len(rows)}
    return MicroBatch(tensors, {} if empty else counts, np.array([] if empty else rows))


def loader(config, world, log=None):
    """Lists of micro-batches from a step on, as the real loader yields them."""

    def batches(start):
        step = start
        while True:
            rows = step * config.train.global_batch
            rows = range(rows, rows + config.train.global_batch)
            share = rows[slice(*bounds(len(rows), world))]
            size = config.train.micro_batch or max(len(share), 1)
            parts = [list(share[i : i + size]) for i in range(0, len(share), size)]
            if log is not None:
                log.append((step, [row for part in parts for row in part]))
            yield [batch_of(p) for p in parts] or [batch_of([0], empty=True)]
            step += 1

    return batches


def bounds(count, world):
    return world.rank * count // world.size, (world.rank + 1) * count // world.size


def tiny_config(run, **changes):
    """A config of the tiny run; `train__steps=3` changes `train.steps`."""
    config = Config(
        data=DataConfig(path="none", row_length=T),
        optim=AdamWOptions(lr=0.02),
        schedule=CosineOptions(warmup=3),
        train=TrainConfig(steps=40, global_batch=7, micro_batch=2, rule=PlainOptions()),
        eval=EvalConfig(every=10),
        run=RunConfig(dir=str(run), log_every=1, checkpoint_every=5, device="cpu", keep_last=3),
        distributed=DistributedConfig(timeout=60),
    )
    for key, value in changes.items():
        *path, last = key.split("__")
        if path:
            group = dataclasses.replace(getattr(config, path[0]), **{last: value})
            config = dataclasses.replace(config, **{path[0]: group})
        else:
            config = dataclasses.replace(config, **{last: value})
    return config


class Hook:
    """A sink that runs a function on each record: tests kill, signal or break things in it."""

    def __init__(self, function):
        self.write = function

    def close(self):
        pass


def build_trainer(config, world, *, learner=None, hook=None, log=None, notes=None):
    """The trainer of a tiny run, restored as `config.resume` says."""
    run = pathlib.Path(config.run.dir)
    text = yaml.safe_dump(dataclasses.asdict(config))
    start = open_run_folder(
        run, config.resume, config, {"data_hash": "d"}, world, shared=config.run.shared
    )
    if world.is_main:
        step = int(start.checkpoint.name[5:]) if start.checkpoint else 0
        cut_metrics(run / "metrics.jsonl", step)
    sinks = [JsonLines(run / "metrics.jsonl")] if world.is_main else []
    sinks += [Hook(hook)] if hook else []

    def evaluation():
        rows = range(1000, 1030)[slice(*bounds(30, world))]
        for first in range(0, len(rows), config.eval.batch or 4):
            yield batch_of(list(rows[first : first + (config.eval.batch or 4)]))

    trainer = Trainer(
        config,
        learner or build_learner(config.model.dropout),
        world,
        loader(config, world, log),
        checkpoints=Checkpoints(run, world, config.run.keep_last, shared=config.run.shared),
        evaluator=Evaluator(evaluation, world),
        sinks=sinks,
        note=(notes if notes is not None else []).append,
        files={"config.yaml": text.encode()},
        facts={"data_hash": "d"},
    )
    for line in start.messages:
        trainer.note(line)
    if start.checkpoint:
        trainer.restore(start.checkpoint, start.saved)
    return trainer


def in_ranks(size, function, *arguments, kill=False, survivors=None):
    """Calls function(world, *arguments) in `size` processes joined by gloo; returns their answers.

    With `kill` all ranks are expected to die by SIGKILL, with `survivors` all but so many.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, queue, function, arguments))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    answers: dict[int, Any] = {}
    expected = 0 if kill else size if survivors is None else survivors
    for _ in range(expected):
        rank, answer = queue.get()
        answers[rank] = answer
    for rank in ranks:
        rank.join(60)
    assert sum(rank.exitcode == -9 for rank in ranks) == size - expected
    for answer in answers.values():
        if isinstance(answer, str) and answer.startswith("Traceback"):
            raise AssertionError(answer)
    return [answers[rank] for rank in sorted(answers)]


def in_turn(world, *stages):
    """Calls function(world, *arguments) of each stage, one after the other in the same ranks, where
    a stage need not be a start of its own; returns their answers."""
    return [function(world, *arguments) for function, *arguments in stages]


def _rank(rank, size, port, queue, function, arguments):
    import traceback

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        world = launch(DistributedConfig(timeout=60), "cpu")
        answer = function(world, *arguments)
        close(world)
    except UserError as error:
        answer = f"UserError: {error}"
    except Exception:  # noqa: BLE001 (the parent raises it)
        answer = traceback.format_exc()
    queue.put((rank, answer))
