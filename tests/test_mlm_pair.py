"""Pairs of segments: how they are built, and what is asked of the model."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanolm.data.rows import Row
from tests.objective_rows import ENCODER, T, examples, objective_and_stream, tensors


@pytest.fixture
def build(tokenizer, corpus):
    """build(objective keys, …) -> (objective, stream of the corpus)."""
    return functools.partial(objective_and_stream, tokenizer, corpus)


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs_are_built_as_described_and_half_are_broken(build, tokenizer, pair):
    objective, stream = build({"name": "mlm_pair", "pair": pair})
    broken, n_rows, cuts = 0, 1000, set()
    for row, example in examples(objective, stream, n_rows):
        tokens = example["tokens"].copy()
        tokens[example["masked_index"]] = example["masked_targets"]
        first_sep = len(tokens) - 1 - int(example["segments"].sum())
        a, b = tokens[1:first_sep], tokens[first_sep + 1 : -1]
        assert tokens[0] == tokenizer.cls and tokens[first_sep] == tokens[-1] == tokenizer.sep
        assert example["segments"][: first_sep + 1].sum() == 0 and len(tokens) == T
        cuts.add(len(a))
        is_broken = bool(example["broken"])
        broken += is_broken
        raw = row.tokens
        if not is_broken:
            assert np.array_equal(np.concatenate([a, b]), raw)
        elif pair == "sop":
            assert np.array_equal(np.concatenate([b, a]), raw)
        else:
            assert np.array_equal(a, raw[: len(a)])
            assert np.array_equal(b, stream.draw(row, 0).tokens[: len(b)])
    assert abs(broken - n_rows / 2) < 5 * math.sqrt(n_rows / 4)
    assert len(cuts) > T // 4


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_the_pair_term_has_its_own_denominator(build, make_learner, pair):
    options = {"name": "mlm_pair", "pair": pair}
    objective, stream = build(options)
    batch = objective.collate([e for _, e in examples(objective, stream, 6)])
    learner = make_learner(ENCODER, options, row_length=T)
    terms = learner(tensors(batch))
    assert objective.weights == {"mlm": 1.0, pair: 1.0}
    assert objective.counts(batch) == {"mlm": len(batch["masked_targets"]), pair: 6}
    assert terms[pair].count == 6 and terms["mlm"].count == len(batch["masked_targets"])
    logits = learner.heads["pair"](learner.trunk(objective.inputs(tensors(batch))))
    broken = torch.from_numpy(batch["broken"])
    torch.testing.assert_close(terms[pair].sum, F.cross_entropy(logits, broken, reduction="sum"))
    assert terms[f"{pair}_accuracy"].sum == (logits.argmax(-1) == broken).sum()


def test_short_rows_make_pairs_too(build):
    """The last row of an evaluation may hold very few tokens."""
    objective, stream = build({"name": "mlm_pair"})
    template = stream.row(0)
    for n_tokens, seed in itertools.product((1, 2, 3, 5), range(8)):
        row = Row(template.tokens[:n_tokens], np.array([0]), 0, 0, 0, 0)
        example = objective.example(
            row, np.random.default_rng(seed), lambda k: stream.draw(template, k)
        )
        assert objective.collate([example])["lengths"][0] == n_tokens + 3
