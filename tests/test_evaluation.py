"""Evaluation gives one number, whatever the ranks and the batch size, and the formulas hold."""

import math

import numpy as np
import pytest
import torch

from nanolm.distributed.world import World
from nanolm.training.engine import Engine
from nanolm.training.evaluation import Evaluator, UnigramBaseline
from tests.tiny_run import V, batch_of, bounds, build_learner, in_ranks, tiny_config

ROWS = list(range(50, 73))
BYTES, COUNTS = np.arange(V) % 4, np.arange(V)[::-1] * 3


def evaluate(world, batch):
    engine = Engine(build_learner(0.5), world, tiny_config("none"))

    def batches():
        mine = ROWS[slice(*bounds(len(ROWS), world))]
        for first in range(0, len(mine), batch):
            yield batch_of(mine[first : first + batch])

    return Evaluator(batches, world, UnigramBaseline(BYTES, COUNTS))(engine)


def test_one_number_for_every_batch_size_and_world():
    figures = evaluate(World(), 1)
    for other in (evaluate(World(), 5), evaluate(World(), 23), *in_ranks(3, evaluate, 4)):
        assert other.keys() == figures.keys()
        for key, value in figures.items():
            assert other[key] == pytest.approx(value, rel=1e-6), key


def test_formulas_from_their_definition():
    learner = build_learner().eval()
    batch = batch_of(ROWS).tensors
    with torch.no_grad():
        terms = learner(batch)
    targets = batch["targets"][batch["targets"] >= 0].numpy()
    probability = (COUNTS + 1) / (COUNTS + 1).sum()
    nll, count = float(terms["nll"].sum), len(targets)
    row = float(terms["row"].sum) / len(ROWS)
    text_bytes = BYTES[targets].sum()
    expected = {
        "loss": nll / count + 0.5 * row,
        "perplexity": math.exp(nll / count),
        "bits_per_byte": nll / math.log(2) / text_bytes,
        "unigram_bits_per_byte": -np.log2(probability[targets]).sum() / text_bytes,
        "accuracy": float(terms["accuracy"].sum) / count,
    }
    found = evaluate(World(), 3)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_the_learner_is_left_as_it_was():
    engine = Engine(build_learner(0.5), World(), tiny_config("none"))
    Evaluator(lambda: [batch_of(ROWS)], World())(engine)
    assert engine.learner.training
    assert all(parameter.grad is None for parameter in engine.learner.parameters())
    assert Evaluator(lambda: [batch_of(ROWS)], World())(engine, stop=lambda: True) is None
