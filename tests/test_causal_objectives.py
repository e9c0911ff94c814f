"""Causal and prefix language modelling: what rows become, and what is asked of the model."""

import functools
import math

import numpy as np
import pytest
import torch

from nanolm.objectives.base import IGNORED
from tests.objective_rows import T, examples, objective_and_stream, tensors


@pytest.fixture
def build(tokenizer, corpus):
    """build(objective keys, …) -> (objective, stream of the corpus)."""
    return functools.partial(objective_and_stream, tokenizer, corpus)


def test_clm_every_token_of_the_stream_is_a_target_once(build):
    objective, stream = build({"name": "clm"})
    n_rows = len(stream)
    rows = sorted(stream.rows(0, n_rows), key=lambda row: row.row_id)
    batch = objective.collate(rows)
    flat = np.concatenate([rows[0].tokens[:1], batch["targets"].reshape(-1)])
    assert np.array_equal(flat[:-1], batch["tokens"].reshape(-1))
    assert batch["targets"].size == n_rows * T
    assert objective.counts(batch) == {"clm": n_rows * T}


def test_clm_documents_restart_positions_and_bring_the_mask(build):
    objective, stream = build({"name": "clm"}, document_mask=True)
    row = next(row for row in stream.rows(0, 10_000) if len(row.starts) > 1)
    batch = objective.collate([row])
    assert objective.masks == {"documents"}
    inputs = objective.inputs(tensors(batch))
    start = int(row.starts[1])
    assert inputs.positions_BT[0, :start].tolist() == list(range(start))
    assert inputs.positions_BT[0, start] == 0
    assert (inputs.mask.documents[0, :start] != inputs.mask.documents[0, start]).all()


def test_clm_padding_is_no_target(build):
    objective, stream = build({"name": "clm"}, split="val")
    (*_, last) = stream.eval_rows()
    batch = objective.collate([last])
    n_real = len(last.tokens) - 1
    assert 0 < n_real < T and objective.counts(batch) == {"clm": n_real}
    assert (batch["targets"][0, n_real:] == IGNORED).all()


def test_prefix_predicts_only_what_was_not_seen(build, make_learner):
    """No predicted position may have its own target, or anything after it, in its history."""
    objective, stream = build({"name": "prefix"})
    rows = stream.rows(0, 3)
    batch = tensors(objective.collate(list(zip(rows, (1, 20, T - 1), strict=True))))
    learner = make_learner({"n_layers": 2}, {"name": "prefix"}, row_length=T)
    inputs = objective.inputs(batch)
    x = learner.trunk.embedding(inputs.tokens_BT).detach().requires_grad_()
    hidden = learner.trunk(type(inputs)(embeddings_BTD=x, mask=inputs.mask))
    for b, prefix in enumerate((1, 20, T - 1)):
        predicted = (batch["targets"][b] != IGNORED).nonzero()[:, 0].tolist()
        assert predicted == list(range(prefix - 1, T))
        assert np.array_equal(batch["targets"][b, prefix - 1 :], rows[b].tokens[prefix:])
        for t in (predicted[0], predicted[-2]):
            upstream = torch.zeros_like(hidden)
            upstream[b, t] = torch.arange(32.0)
            (gradient,) = torch.autograd.grad(hidden, x, upstream, retain_graph=True)
            seen = gradient[b].abs().sum(-1) > 0
            assert seen[: t + 1].all() and not seen[t + 1 :].any()
    # Inside the prefix the first token sees the last one.
    upstream = torch.zeros_like(hidden)
    upstream[1, 0] = torch.arange(32.0)
    (gradient,) = torch.autograd.grad(hidden, x, upstream)
    assert gradient[1, 19].abs().sum() > 0 and gradient[1, 20].abs().sum() == 0


def test_prefix_lengths_are_uniform(build):
    objective, stream = build({"name": "prefix"})
    lengths = np.array([prefix for _, (_, prefix) in examples(objective, stream, 2000)])
    counts = np.bincount(lengths, minlength=T)
    assert counts[0] == 0 and len(counts) == T and (counts[1:] > 0).all()
    expected = 2000 / (T - 1)
    assert np.abs(counts[1:] - expected).max() < 5 * math.sqrt(expected)
