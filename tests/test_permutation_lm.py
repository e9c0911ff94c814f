"""Permutation language modelling: how many tokens are predicted, where and in which order; a
run with a memory resumes to the bit."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from nanolm.build import build_learner, build_objective, build_stream, resolve
from nanolm.config.load import load_config
from nanolm.data.rows import Row
from nanolm.errors import UserError
from nanolm.objectives.base import IGNORED
from nanolm.objectives.permutation import PermutationOptions
from nanolm.tools.estimate import Sizes, activation_bytes, of_streams
from nanolm.training.flops import forward_flops_per_token, memory_flops, train_flops_per_token
from nanolm.training.loader import eval_batches
from tests.prepared import train
from tests.test_estimate import kept_bytes

MODEL = {
    "trunk": "two_stream",
    "positions": {"name": "relative"},
    "n_segments": 3,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_length": 128,
    "vocab_size": 512,
}


def config_of(tokenizer, *, row_length=32, model=None, data=None, **keys):
    base = {
        "model": MODEL | (model or {}),
        "objective": {"name": "permutation", **keys},
        "data": {"row_length": row_length, **(data or {})},
    }
    return resolve(load_config([], base=base), tokenizer)


def examples_of(objective, sizes):
    """Examples of rows of so many tokens, the memory among them."""
    rows = [
        Row(np.arange(size) % 400 + 50, np.zeros(1, np.int64), corpus=0, block=0, epoch=0, row_id=i)
        for i, size in enumerate(sizes)
    ]
    return [objective.example(row, np.random.default_rng(row.row_id), None) for row in rows]


def tensors_of(objective, sizes):
    batch = objective.collate(examples_of(objective, sizes))
    return {name: torch.from_numpy(values) for name, values in batch.items()}


@given(st.integers(0, 300), st.integers(2, 9), st.integers(1, 7), st.integers(0, 99))
def test_one_token_in_k_is_predicted_in_stretches(n, one_in, longest, seed):
    options = PermutationOptions(one_in=one_in, longest_span=longest)
    places = options.places(n, np.random.default_rng(seed))
    assert len(places) == options.n_predicted(n) == max(n // one_in, min(n, 1))
    assert (np.diff(places) > 0).all() and (places >= 0).all() and (places < n).all()


def test_lengths_of_stretches_and_places_are_even():
    options, n, draws = PermutationOptions(), 600, 1500
    hits, lengths = np.zeros(n), Counter()
    for seed in range(draws):
        places = options.places(n, np.random.default_rng(seed))
        hits[places] += 1
    assert hits.sum() == draws * n // 6
    inner = hits[30:-30].reshape(-1, 30).sum(axis=1) / (30 * draws)
    assert inner == pytest.approx(1 / 6, abs=0.012)
    one = PermutationOptions(one_in=100)  # contexts so wide that stretches hardly ever touch
    for seed in range(400):
        places = one.places(10_000, np.random.default_rng(seed))
        parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        lengths.update(map(len, parts[:-1]))  # the last is cut where the number is reached
    total = sum(lengths.values())
    for length in range(1, 6):
        assert lengths[length] / total == pytest.approx(0.2, abs=0.02)


def test_every_order_is_equally_likely(tokenizer):
    objective = build_objective(config_of(tokenizer, row_length=20), tokenizer)
    row = Row(np.arange(18) + 50, np.zeros(1, np.int64), corpus=0, block=0, epoch=0, row_id=0)
    found, rng = Counter(), np.random.default_rng(3)
    for _ in range(3000):
        (segment,) = objective.example(row, rng, None)["segments"]
        found[tuple(segment["order"][segment["places"]])] += 1
    ways = list(itertools.permutations((1, 2, 3)))
    assert set(found) == set(ways)
    assert sum((found[way] - 500) ** 2 / 500 for way in ways) < 20.5  # 5 degrees of freedom


def test_a_batch_tells_orders_padding_memory_and_segments(tokenizer):
    objective = build_objective(config_of(tokenizer, memory=7), tokenizer)
    assert (objective.stride, objective.span, objective.n_places) == (30, 37, 5)
    sizes = (37, 20, 8)
    examples = examples_of(objective, sizes)
    batch = objective.collate(examples)
    order, keys = batch["order"], batch["key_order"]
    assert order.shape == (3, 32 + 5) and keys.shape == (3, 7 + 32)
    for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
        n = size - 7
        tokens = batch["tokens"][row]
        assert tokens[:n].tolist() == (np.arange(7, size) % 400 + 50).tolist()
        assert tokens[n : n + 2].tolist() == [tokenizer.sep, tokenizer.cls]
        assert (tokens[n + 2 :] == tokenizer.pad).all()
        assert batch["memory"][row].tolist() == (np.arange(7) + 50).tolist()
        assert batch["segments"][row, n] == 0 and batch["segments"][row, n + 1] == 2
        (segment,) = example["segments"]
        places, k = segment["places"], len(segment["places"])
        assert k == max(n // 6, 1) and (places < n).all()  # neither <sep> nor <cls>
        assert batch["targets"][row, :k].tolist() == tokens[places].tolist()
        assert (batch["targets"][row, k:] == IGNORED).all()
        assert sorted(order[row, places]) == list(range(1, k + 1))
        assert (order[row, 32 : 32 + k] == order[row, places] - 1).all()
        assert (keys[row, :7] == 0).all() and (
            keys[row, 7 : 7 + n + 2] == order[row, : n + 2]
        ).all()
        blind = np.concatenate([order[row, n + 2 : 32], order[row, 32 + k :]])
        assert (blind[:, None] < keys[row]).all()  # padding sees nothing
        assert (order[row].max() < keys[row, 7 + n + 2 :]).all()  # and nobody sees it
    assert objective.counts(batch) == {"permutation": 5 + 2 + 1}


def test_padding_changes_nothing(tokenizer):
    objective = build_objective(config_of(tokenizer, memory=7), tokenizer)
    learner = build_learner(config_of(tokenizer, memory=7), objective).eval()
    batch = tensors_of(objective, (37, 20))
    with torch.no_grad():
        before = learner(batch)["permutation"].sum
        batch["tokens"] = torch.where(batch["tokens"] == tokenizer.pad, 77, batch["tokens"])
        assert torch.equal(learner(batch)["permutation"].sum, before)


@torch.no_grad()
def test_a_prediction_reads_all_that_came_before_it_and_nothing_else(tokenizer):
    """From the batch to the loss: neither its own token nor a later one changes a term."""
    config = config_of(tokenizer, memory=7, model={"init_std": 0.3})
    objective = build_objective(config, tokenizer)
    learner = build_learner(config, objective).eval()
    batch = tensors_of(objective, (37, 26, 37))
    order, ranks = batch["order"][:, :32], 1 + batch["order"][:, 32:]

    def term(rank, changed):
        targets = torch.where(ranks == rank, batch["targets"], IGNORED)
        tokens = torch.where(changed, (batch["tokens"] + 1) % 512, batch["tokens"])
        found = learner(batch | {"targets": targets, "tokens": tokens})["permutation"]
        assert found.count == (ranks == rank).sum() > 0
        return found.sum

    nothing = torch.zeros_like(order, dtype=torch.bool)
    for rank in range(1, objective.n_places + 1):
        before = term(rank, nothing)
        assert torch.equal(term(rank, order >= rank), before)
        assert not torch.equal(term(rank, order == rank - 1), before)


@torch.no_grad()
def test_logits_of_predictions_are_those_of_the_loss(tokenizer):
    config = config_of(tokenizer, memory=7, model={"init_std": 0.3})
    objective = build_objective(config, tokenizer)
    learner = build_learner(config, objective).eval()
    batch = tensors_of(objective, (37, 20, 8))
    hidden = learner.trunk(objective.inputs(batch))
    logits = objective.logits(hidden, learner.heads, batch)["permutation"]
    term = objective.loss(hidden, learner.heads, batch)["permutation"]
    expected = torch.nn.functional.cross_entropy(logits, objective.targets(batch), reduction="sum")
    torch.testing.assert_close(term.sum, expected, atol=1e-4, rtol=1e-5)
    assert len(logits) == term.count == 5 + 2 + 1


def test_rows_of_an_evaluation_read_what_stands_before_them(tokenizer, corpus):
    config = config_of(tokenizer, memory=11, data={"path": str(corpus)})
    objective = build_objective(config, tokenizer)
    stream = build_stream(config, objective, "val")
    batches = list(eval_batches(stream, objective, 64))
    memory = torch.cat([batch.tensors["memory"] for batch in batches])
    tokens = torch.cat([batch.tensors["tokens"] for batch in batches])
    assert len(tokens) == len(stream) > 64
    assert torch.equal(memory[1:], tokens[:-1, 30 - 11 : 30])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": {"document_mask": True}}, r"data\.document_mask=true"),
        ({"row_length": 2}, r"data\.row_length=2 leaves no room"),
        ({"model": {"n_segments": 2}}, r"model\.n_segments=2 is too few"),
        ({"one_in": 1}, r"objective\.one_in=1"),
        ({"longest_span": 0}, r"objective\.longest_span=0"),
        ({"memory": -1}, r"objective\.memory=-1"),
        ({"model": {"trunk": "encoder"}}, r"two_stream trunks, but model\.trunk=encoder"),
    ],
)
def test_what_cannot_be_trained_is_refused(tokenizer, keys, message):
    with pytest.raises(UserError, match=message):
        build_objective(config_of(tokenizer, **keys), tokenizer)


@pytest.mark.parametrize(("memory", "segments"), [(0, 0), (7, 3)])
def test_flops_are_what_pytorch_counts(make_learner, memory, segments):
    model = {**MODEL, "n_segments": segments, "d_ff": 40, "n_kv_heads": 2}
    options = {"name": "permutation", "memory": memory}
    reference = {"attention": "reference"}  # the counter does not know the fused CPU kernel
    learner = make_learner(model, options, row_length=32, kernels=reference)
    objective, rows = learner.requires_grad_(False).objective, 2
    batch = tensors_of(objective, [objective.span] * rows)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.heads["lm"](learner.trunk(objective.inputs(batch))[:, 32:])
    shape = load_config([], base={"model": model}).model
    share = objective.predicted_share
    row = 32 * forward_flops_per_token(shape, 32, predicted_share=share, memory=memory)
    row += memory_flops(shape, memory)
    projected = shape.n_layers * (memory + 2 * 32 - 1) + (2 * memory - 1 if memory else 0)
    once = 2 * projected * shape.d_model * shape.d_model  # of distances, for all rows
    assert counter.get_total_flops() == pytest.approx(rows * row + once)
    trained = 32 * train_flops_per_token(shape, 32, predicted_share=share, memory=memory)
    assert trained == pytest.approx(3 * row - 2 * memory_flops(shape, memory))


def test_activations_are_those_that_autograd_keeps(tokenizer):
    config = config_of(tokenizer, row_length=96, memory=32, model={"d_model": 96, "n_layers": 4})
    objective = build_objective(config, tokenizer)
    learner = build_learner(config, objective)
    batch = tensors_of(objective, [objective.span] * 8)
    n_tokens = 8 * 96
    head = 4 * 512 * 96 + 4 * 8 * objective.n_places * 96
    read = of_streams(n_tokens, objective.predicted_share, 96, 32)
    expected = activation_bytes(config.model, "fp32", "none", *read) + head
    assert kept_bytes(learner, batch) == pytest.approx(expected, rel=0.06)
    sizes = Sizes.of(learner)
    deeper = config_of(tokenizer, row_length=96, memory=32, model={"d_model": 96, "n_layers": 5})
    assert sizes.deeper(5) == Sizes.of(build_learner(deeper, objective))


WORDS = [
    "--model.trunk=two_stream", "--model.positions.name=relative", "--model.n_segments=3",
    "--model.norm_position=post", "--model.dropout=0.1", "--model.attention_dropout=0.1",
    "--model.final_dropout=0.1", "--objective.name=permutation", "--objective.memory=24",
    "--schedule.name=constant", "--run.log_every=1", "--eval.every=3",
]  # fmt: skip


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"], line["loss"]) for line in lines if "loss" in line]


def weights(run):
    return load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")


def same_runs(one, other):
    assert losses(one) == losses(other) and len(losses(one)) == 8
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(weights(one)[name], weights(other)[name]) for name in weights(one))


def test_a_resumed_run_with_a_memory_ends_bit_equal(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *WORDS, "--train.steps=6")
    train(halves, *WORDS, "--train.steps=3")
    train(halves, *WORDS, "--train.steps=6", "--resume=auto")
    same_runs(whole, halves)
