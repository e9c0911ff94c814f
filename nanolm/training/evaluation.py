"""Evaluation: loss, perplexity, bits per byte and accuracy of a split, in the loop and off line.

Every row of the split counts once, whatever the ranks and the batch size; sums are float64.

    loss           = sum over terms of weight * sum / count
    perplexity     = exp(nll / targets)
    bits per byte  = nll / (ln 2 * UTF-8 bytes of the targets' text)

A document's end is a target whose text has no bytes: its loss counts, so runs with different
tokenizers compare. For MLM the targets are the masked tokens. The unigram figure is what the train
split's token frequencies (add-one smoothed) achieve on the very same targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.objectives.base import Term
from nanolm.training.batch import MicroBatch
from nanolm.training.engine import Engine
from nanolm.training.gradient import total_loss


class UnigramBaseline:
    """Per token id: bytes of its text, and its cost in nats under the unigram model."""

    def __init__(self, byte_length: np.ndarray, unigram_counts: np.ndarray) -> None:
        counts = np.asarray(unigram_counts, dtype=np.float64) + 1.0
        self.nats = torch.from_numpy(-np.log(counts / counts.sum()))
        self.bytes = torch.from_numpy(np.asarray(byte_length, dtype=np.float64))

    def measure(self, targets: torch.Tensor) -> tuple[float, float]:
        """(bytes, unigram nats) of the target ids, summed."""
        ids = targets.cpu()
        return float(self.bytes[ids].sum()), float(self.nats[ids].sum())


class Sums(dict[str, tuple[float, float]]):
    """(sum, count) by name, added up in float64."""

    def add(self, name: str, value: float, count: float) -> None:
        """Adds to one of them, or begins it."""
        before = self.get(name, (0.0, 0.0))
        self[name] = (before[0] + value, before[1] + count)

    def add_terms(self, terms: Mapping[str, Term]) -> None:
        """Adds a micro-batch's terms; the host waits for them."""
        for name, term in terms.items():
            self.add(name, float(term.sum), float(term.count))


class Evaluate(Protocol):
    """What the trainer and a plan know of an evaluator."""

    def __call__(self, engine: Engine, stop: Callable[[], bool] = ...) -> dict[str, float] | None:
        """The figures, on every rank; None when `stop` said so on any of them. Collective."""


class Evaluator:
    """Evaluates the learner on one split; call it as often as needed.

    `batches()` yields this rank's micro-batches, each row of the split on exactly one rank.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[MicroBatch]],
        world: World,
        unigram_baseline: UnigramBaseline | None = None,
    ) -> None:
        self.batches = batches
        self.world = world
        self.unigram_baseline = unigram_baseline

    def __call__(
        self, engine: Engine, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The figures, on every rank; None when `stop` said so on any of them. Collective."""
        learner = engine.learner
        was_training = learner.training
        learner.eval()
        try:
            with torch.no_grad():
                sums, stopped = self._sums(engine, stop)
        finally:
            learner.train(was_training)
        engine.progress.enter("waiting")
        names = sorted({name for part in self.world.gather(sorted(sums)) for name in part})
        flat = [stopped] + [x for name in names for x in sums.get(name, (0.0, 0.0))]
        total = self.world.all_sum(flat)
        if total[0]:
            return None
        pairs = zip(total[1::2], total[2::2], strict=True)
        return figures(dict(zip(names, pairs, strict=True)), learner.objective.weights)

    def _sums(self, engine: Engine, stop: Callable[[], bool]) -> tuple[Sums, float]:
        sums = Sums()
        for batch in in_step(engine, iter(self.batches())):
            if stop() and not engine.sharded:
                return sums, 1.0
            terms = engine.local(batch)
            if not len(batch.row_ids):
                continue
            sums.add_terms(terms)
            if self.unigram_baseline is not None:
                targets = engine.learner.objective.targets(dict(batch.tensors))
                text_bytes, nats = self.unigram_baseline.measure(targets)
                sums.add("unigram bytes", nats, text_bytes)
        return sums, 0.0


def in_step(engine: Engine, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """A rank's batches; of sharded weights, as many as the rank with the most has.

    What is added, and comes first where a rank has none at all, repeats a batch without rows.
    """
    if not engine.sharded:
        yield from batches
        return
    last = None
    while True:
        batch = next(batches, None)
        if not engine.world.all_sum([batch is not None])[0]:
            return
        last = batch or last
        if last is None:
            raise UserError("the validation split has fewer rows than ranks; add to it")
        yield batch or last.blank()


def figures(
    sums: Mapping[str, tuple[float, float]], weights: Mapping[str, float]
) -> dict[str, float]:
    """Means and what follows from them, of global (sum, count) pairs."""
    sums = dict(sums)
    nats, text_bytes = sums.pop("unigram bytes", (0.0, 0.0))
    means = {name: value / max(count, 1) for name, (value, count) in sums.items()}
    found = {"loss": total_loss(means, weights), **means}
    if "nll" in sums:
        found["perplexity"] = math.exp(min(means["nll"], 700.0))
        if text_bytes:
            found["bits_per_byte"] = sums["nll"][0] / math.log(2) / text_bytes
            found["unigram_bits_per_byte"] = nats / math.log(2) / text_bytes
    return found
