"""Span corruption: lengths that fill rows, places drawn evenly, and text that comes back."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nanolm.build import build_objective, build_stream, resolve
from nanolm.config.load import load_config
from nanolm.data.rows import Row
from nanolm.errors import UserError
from nanolm.objectives.base import IGNORED
from nanolm.objectives.span import Span, SpanOptions, cut

DENSITIES = st.floats(0.01, 0.9)
MEANS = st.floats(1.0, 12.0)


def options(density=0.15, mean=3.0):
    return SpanOptions(noise_density=density, mean_span=mean)


class Extras:
    """A tokenizer of 200 pieces: pad 0, eos 3, and sentinels of which the order does not matter."""

    def __init__(self, n_extras=100):
        self.pad, self.eos = 0, 3
        self.extra_ids = tuple(range(100, 100 + n_extras))


def objective_of(row_length, tokenizer=None, *, data=None, model=None, **keys):
    base = {
        "model": {"trunk": "encoder_decoder", "vocab_size": 512, **(model or {})},
        "objective": {"name": "span", **keys},
        "data": {"row_length": row_length, **(data or {})},
    }
    config = load_config([], base=base)
    return Span(config.objective, config, tokenizer or Extras())


def row_of(tokens):
    starts = np.zeros(1, dtype=np.int64)
    return Row(np.asarray(tokens, np.uint16), starts, corpus=0, block=0, epoch=0, row_id=0)


def corrupt(objective, tokens, seed=0):
    return objective.example(row_of(tokens), np.random.default_rng(seed), None)


def restored(source, targets, sentinels, eos):
    """The raw tokens: each sentinel of the source replaced by what the targets name after it."""
    assert source[-1] == targets[-1] == eos
    cut_out, now = {}, None
    for token in targets[:-1].tolist():
        if token in sentinels:
            now = token
            cut_out[now] = []
        else:
            cut_out[now].append(token)
    found = [cut_out.pop(token, [token]) for token in source[:-1].tolist()]
    assert not cut_out
    return [token for part in found for token in part]


@pytest.mark.parametrize(
    "row_length, raw, targets, spans",
    [(128, 141, 29, 7), (512, 568, 114, 28), (1024, 1137, 229, 57)],
)
def test_the_published_lengths(row_length, raw, targets, spans):
    objective = objective_of(row_length)
    assert (objective.stride, objective.span) == (raw, raw)
    assert objective.n_targets == targets
    assert objective.options.counts(raw)[1] == spans
    batch = objective.collate([corrupt(objective, np.arange(raw) % 90 + 4, s) for s in range(3)])
    assert batch["source"].shape == (3, row_length) and batch["targets"].shape == (3, targets)
    assert "lengths" not in batch and (batch["source"] != 0).all()
    assert (batch["targets"] != IGNORED).all()
    assert objective.counts(batch) == {"span": 3 * targets}


def test_halves_go_to_even():
    assert options(0.5, 1.0).counts(5) == (2, 2)  # 2.5
    assert options(0.5, 1.0).counts(7) == (4, 4)  # 3.5
    assert options(0.5, 2.0).counts(10) == (5, 2)  # 5 and 2.5


@given(DENSITIES, MEANS, st.integers(2, 400))
def test_every_source_length_is_met_exactly(density, mean, length):
    chosen = options(density, mean)
    assume(length >= chosen.lengths(2)[0])
    raw = chosen.raw_length(length)
    assert chosen.lengths(raw)[0] == length < chosen.lengths(raw + 1)[0]


@given(DENSITIES, MEANS, st.integers(1, 300))
def test_counts_are_clamped_and_lengths_add_up(density, mean, n):
    noise, spans = options(density, mean).counts(n)
    assert sum(options(density, mean).lengths(n)) == n + 2 * spans + 2
    if n > 1:
        assert 1 <= noise <= n - 1 and 1 <= spans <= noise


@given(st.integers(1, 200), st.floats(0.05, 0.4), st.floats(1.5, 8.0), st.integers(0, 99))
def test_the_text_comes_back_and_both_sides_are_in_order(n, density, mean, seed):
    objective = objective_of(64, noise_density=density, mean_span=mean)
    noise, spans = objective.options.counts(n)
    assume(spans <= n - noise)
    tokens = np.random.default_rng(seed).integers(4, 90, n)
    example = corrupt(objective, tokens, seed)
    source, targets = example["source"], example["targets"]
    assert (len(source), len(targets)) == objective.options.lengths(n)
    marks = [token for token in source.tolist() if token >= 100]
    assert marks == [token for token in targets.tolist() if token >= 100]
    assert marks == list(range(199, 199 - spans, -1))  # descending from the last extra piece
    assert restored(source, targets, set(marks), 3) == tokens.tolist()
    if n > 1:
        assert source[0] < 100  # text first,
        assert source[-2] == marks[-1] and targets[0] == marks[0]  # noise last, and no mark behind
    assert source.dtype == targets.dtype == np.int64


def test_all_ways_to_cut_are_equally_likely():
    rng, n, k, draws = np.random.default_rng(5), 6, 3, 12_000
    found = Counter(tuple(cut(n, k, rng).tolist()) for _ in range(draws))
    ways = [w for w in itertools.product(range(1, n), repeat=k) if sum(w) == n]
    assert set(found) == set(ways)
    expected = draws / len(ways)
    chi_squared = sum((found[way] - expected) ** 2 / expected for way in ways)
    assert chi_squared < 27.9  # 9 degrees of freedom, one in a thousand


def test_lengths_of_stretches_are_those_of_even_cuts():
    objective = objective_of(128)
    n = objective.span
    noise, spans = objective.options.counts(n)
    sizes = Counter()
    for seed in range(4000):
        targets = corrupt(objective, np.arange(n) % 90 + 4, seed)["targets"][:-1]
        marks = np.flatnonzero(targets >= 100)
        sizes.update(np.diff(marks, append=len(targets)) - 1)
    assert sum(sizes.values()) == 4000 * spans
    assert sum(size * count for size, count in sizes.items()) == 4000 * noise
    # A part of 21 tokens in 7 has length L in C(20 - L, 5) of C(20, 6) ways.
    for size in range(1, 8):
        share = math.comb(noise - 1 - size, spans - 2) / math.comb(noise - 1, spans - 1)
        assert sizes[size] / (4000 * spans) == pytest.approx(share, abs=0.01)


def test_the_decoder_reads_targets_one_place_later_behind_a_pad():
    objective = objective_of(32)
    examples = [corrupt(objective, np.arange(n) % 90 + 4) for n in (objective.span, 9, 1)]
    batch = objective.collate(examples)
    assert batch["lengths"].tolist() == [len(e["source"]) for e in examples]
    for row, example in enumerate(examples):
        n = len(example["targets"])
        assert batch["targets"][row, :n].tolist() == example["targets"].tolist()
        assert (batch["targets"][row, n:] == IGNORED).all()
        assert batch["tokens"][row, 0] == 0
        assert batch["tokens"][row, 1:n].tolist() == example["targets"][:-1].tolist()
    assert examples[2]["targets"].tolist() == [3]  # one token alone: nothing is cut out
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    inputs = objective.inputs(tensors)
    assert inputs.source_mask.kinds() == objective.masks  # padding is told, and so not seen
    assert inputs.source_mask.key_lengths is tensors["lengths"]
    assert len(objective.targets(tensors)) == objective.counts(batch)["span"]


def test_a_row_depends_on_its_key_alone(tokenizer, corpus):
    base = {
        "model": {"trunk": "encoder_decoder", "max_length": 64},
        "objective": {"name": "span"},
        "data": {"path": str(corpus), "row_length": 48},
    }
    config = resolve(load_config([], base=base), tokenizer)
    objective = build_objective(config, tokenizer)
    stream = build_stream(config, objective, "train")
    row, other = itertools.islice(stream.rows(0, 2), 2)

    def made(row, epoch):
        return objective.example(row, np.random.default_rng((7, epoch, row.row_id)), None)

    again = [made(row, 0)["source"], made(other, 0)["source"], made(row, 0)["source"]]
    assert np.array_equal(again[0], again[2]) and not np.array_equal(again[0], again[1])
    assert not np.array_equal(made(row, 1)["source"], again[0])
    text = restored(again[0], made(row, 0)["targets"], set(tokenizer.extra_ids), tokenizer.eos)
    assert text == row.tokens.tolist()


def test_the_unigram_model_knows_how_often_each_token_is_a_target():
    objective, rows = objective_of(64), 3000
    tokens = np.random.default_rng(1).integers(4, 12, (rows, objective.span))
    made = [corrupt(objective, row, seed)["targets"] for seed, row in enumerate(tokens)]
    seen = np.bincount(np.concatenate(made), minlength=200)
    expected = objective.target_counts(np.bincount(tokens.ravel(), minlength=200))
    assert expected.sum() == pytest.approx(seen.sum())
    assert np.allclose(expected[12:], seen[12:]) and expected[3] == seen[3] == rows
    assert np.allclose(expected[4:12], seen[4:12], rtol=0.05)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"row_length": 1024, "n_extras": 32}, "needs 57 sentinels for data.row_length=1024"),
        ({"row_length": 512, "n_extras": 0}, "and the tokenizer has 0"),
        ({"row_length": 2}, "use at least 3"),
        ({"row_length": 64, "noise_density": 0.9, "mean_span": 1.0}, "less than one token"),
        ({"row_length": 64, "data": {"document_mask": True}}, "set data.document_mask to false"),
        (
            {"row_length": 64, "noise_density": 0.7, "model": {"max_length": 64}},
            "more than model.max_length=64",
        ),
        ({"row_length": 64, "noise_density": 1.0}, "objective.noise_density=1.0 must lie in"),
        ({"row_length": 64, "mean_span": 0.5}, "objective.mean_span=0.5 must be at least 1"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(keys, words):
    keys = dict(keys)
    tokenizer = Extras(keys.pop("n_extras", 100))
    with pytest.raises(UserError) as caught:
        objective_of(keys.pop("row_length"), tokenizer, **keys)
    assert words in str(caught.value)
