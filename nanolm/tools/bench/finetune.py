"""A contestant of `nanolm bench finetune`, in a process of its own (see bench/contest.py).

    python -m nanolm.tools.bench.finetune '{"settings": …, "data": …, "shape": …}'

All contestants fine-tune the same model, BERT's block with a pooled first token and a classifier,
on the same sequences of token ids, `batch` of them a step. nanolm is measured as it trains: its
Loader, its Trainer's step. The others' batches are padded to their longest sequence, ready made and
on the device (their data phase costs nothing); `grouped` takes sequences of like length together,
as transformers' `group_by_length` does: it sorts within 50 batches of shuffled examples.

Tokens are real ones; padding is none of them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.data.tokenizer import Tokenizer
from nanolm.tools.bench.clock import Clock, clock_on
from nanolm.tools.bench.contest import serve
from nanolm.tools.bench.peers import CPU, bert_config
from nanolm.tools.bench.shape import Shape
from nanolm.tools.bench.step import chosen_kernels
from nanolm.tools.bench.texts import EXAMPLES, Examples
from nanolm.tools.stand_in import stand_in_tokenizer
from nanolm.training.engine import AUTOCAST

MEGABATCH = 50
"""Batches within which `grouped` sorts by length: transformers' own number."""

READY = 400
"""Batches that a peer has ready made, and goes through again and again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneShape(Shape):
    """One model and batch, the same for every contestant."""

    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 4
    row_length: int = 128
    batch: int = 32
    n_classes: int = 6


def stand_in(shape: TuneShape) -> Tokenizer:
    """The sequences' tokenizer: they come framed, so padding alone is special."""
    return stand_in_tokenizer(shape.vocab_size, specials=1, hash="bench finetune")


def nanolm_config(shape: TuneShape, job: dict[str, Any], folder: str, device: str = "cpu") -> Any:
    """The fine-tuning run's config: transformers' BERT."""
    from nanolm.config.load import load_config  # noqa: PLC0415
    from nanolm.finetune.config import TaskConfig  # noqa: PLC0415

    labels = [str(n) for n in range(shape.n_classes)]
    base = {
        "model": {
            "trunk": "encoder",
            "norm_position": "post",
            "embedding_norm": True,
            "norm_eps": 1e-12,
            "n_segments": 2,
            "d_model": shape.d_model,
            "n_layers": shape.n_layers,
            "n_heads": shape.n_heads,
            "max_length": shape.row_length,
            "vocab_size": shape.vocab_size,
        },
        "objective": {
            "name": "classify",
            "labels": labels,
            "pair": False,
            "pooling": "cls",
            "head_dropout": 0.0,
        },
        "data": {"path": folder, "row_length": shape.row_length},
        "optim": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.01},
        "schedule": {"name": "constant"},
        "train": {
            "steps": 1_000_000,
            "global_batch": shape.batch,
            "precision": job["precision"],
            "compile": job["settings"].get("compile", False),
        },
        "kernels": job["settings"].get("kernels", {}),
        "run": {"dir": f"{folder}/run", "device": device},
    }
    return load_config([], schema=TaskConfig, base=base, prog="nanolm bench finetune")


class NanolmTuning:
    """nanolm's own step: Loader over a TaskStream, then Trainer.step."""

    def __init__(
        self,
        shape: TuneShape,
        job: dict[str, Any],
        examples: Examples,
        device: torch.device = CPU,
    ) -> None:
        from nanolm import build  # noqa: PLC0415
        from nanolm.data.tables.stream import TaskStream  # noqa: PLC0415
        from nanolm.distributed.world import World  # noqa: PLC0415
        from nanolm.finetune.tasks.items import Item, Sequence  # noqa: PLC0415
        from nanolm.run import Plan, rehearse  # noqa: PLC0415

        self.folder = tempfile.TemporaryDirectory()
        config = nanolm_config(shape, job, self.folder.name, device.type)
        objective = build.build_objective(config, stand_in(shape))
        items = [
            Item(n, [Sequence(ids, len(ids))], label)
            for n, (ids, label) in enumerate(zip(examples.sequences, examples.labels))
        ]
        plan = Plan(config=config, objective=objective, stream=TaskStream(items, seed=0))
        run = pathlib.Path(self.folder.name) / "run"
        self.trainer = rehearse(plan, World(device=device), run)
        self.batches = self.trainer.loader_factory(0)
        learner = self.trainer.engine.learner
        self.n_parameters = sum(parameter.numel() for parameter in learner.parameters())
        self.kernels = chosen_kernels(learner)

    def __call__(self, clock: Clock) -> dict[str, float]:
        """One optimizer step: its loss, its real tokens, the places computed for."""
        micro_batches = next(self.batches)
        loss = self.trainer.step(micro_batches).loss
        tensors = [batch.tensors for batch in micro_batches]
        real = sum(len(batch["index"]) for batch in tensors)
        places = sum(batch["tokens"].numel() for batch in tensors)
        return {"loss": loss, "tokens": real, "places": places}


def peer_model(shape: TuneShape) -> torch.nn.Module:
    """BertForSequenceClassification at the shape, without dropout."""
    from transformers import BertForSequenceClassification  # noqa: PLC0415

    return BertForSequenceClassification(bert_config(shape, num_labels=shape.n_classes))


def peer_order(n: int, batch: int, lengths: np.ndarray, *, grouped: bool) -> Iterator[np.ndarray]:
    """The examples of each step, without end: shuffled, or shuffled and sorted within megabatches,
    whose batches then come in random order."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(n)[: n // batch * batch]
        if not grouped:
            yield from order.reshape(-1, batch)
            continue
        size = MEGABATCH * batch
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        whole = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
        yield from rng.permutation(whole.reshape(-1, batch))


class PeerTuning:
    """The loop as people write it around transformers' model, one step a call."""

    def __init__(
        self,
        shape: TuneShape,
        job: dict[str, Any],
        examples: Examples,
        device: torch.device = CPU,
    ) -> None:
        torch.manual_seed(0)
        self.model = peer_model(shape).to(device).train()
        if job["settings"]["compile"]:
            self.model.compile(dynamic=True)
        self.device, self.dtype = device, AUTOCAST.get(job["precision"])
        parameters = list(self.model.parameters())
        self.n_parameters = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.kernels: dict[str, str] = {}  # nothing is chosen
        self.scaler = torch.amp.GradScaler(device.type, enabled=job["precision"] == "fp16")
        self.examples = examples
        lengths = np.array([len(ids) for ids in examples.sequences])
        grouped = job["settings"]["model"] == "grouped"
        self.order = peer_order(len(lengths), shape.batch, lengths, grouped=grouped)
        self.ready = [self.batch(next(self.order)) for _ in range(READY)]

    def batch(self, chosen: np.ndarray) -> tuple[dict[str, Tensor], dict[str, int]]:
        """input_ids and attention_mask [B, T] and labels [B] on the device, padded to the longest,
        and how many real tokens and how many places there are."""
        sequences = [torch.from_numpy(self.examples.sequences[n]) for n in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        labels = torch.from_numpy(self.examples.labels[chosen])
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        counts = {"tokens": int(lengths.sum()), "places": ids.numel()}
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}, counts

    def __call__(self, clock: Clock) -> dict[str, Any]:
        """One optimizer step: its loss, its real tokens, the places computed for."""
        batch, counts = self.ready[clock.step % READY]
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            loss = self.model(**batch).loss
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **counts}


def build_tuning(
    job: dict[str, Any], examples: Examples, device: torch.device = CPU
) -> NanolmTuning | PeerTuning:
    """The contestant that the job names, on the device."""
    shape = TuneShape(**job["shape"])
    kind = NanolmTuning if job["settings"]["model"] == "nanolm" else PeerTuning
    return kind(shape, job, examples, device)


def enter(job: dict[str, Any]) -> None:
    """Builds the job's contestant, takes its warm-up steps, then serves turns of `steps` steps."""
    torch.set_num_threads(job["threads"])
    clock = clock_on(job.get("device", "cpu"))
    step = build_tuning(job, Examples.load(EXAMPLES / job["data"]), clock.device)

    for _ in range(job["warmup"]):
        clock.take(step)
    facts = {
        "parameters": step.n_parameters,
        "kernels": step.kernels,
        "host_waits": clock.count_waits(step),
    }
    clock.forget_peak()
    serve(facts, lambda: clock.turn(step, job["steps"]))


if __name__ == "__main__":
    enter(json.loads(sys.argv[1]))
