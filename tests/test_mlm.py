"""Masked language modelling: what rows become, and what is asked of the model."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.objective_rows import ENCODER, T, example_of, examples, objective_and_stream, tensors


@pytest.fixture
def build(tokenizer, corpus):
    """build(objective keys, …) -> (objective, stream of the corpus)."""
    return functools.partial(objective_and_stream, tokenizer, corpus)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_mlm_rows_are_cls_tokens_sep_with_exact_counts(build, tokenizer, rate):
    objective, stream = build({"name": "mlm", "mask_rate": rate})
    for row, example in examples(objective, stream, 100):
        whole = np.concatenate([[tokenizer.cls], row.tokens, [tokenizer.sep]])
        index, targets = example["masked_index"], example["masked_targets"]
        maskable = np.count_nonzero(~tokenizer.special_mask[whole])
        assert len(index) == len(np.unique(index)) == max(1, round(rate * maskable))
        assert np.array_equal(targets, whole[index])
        assert not tokenizer.special_mask[targets].any()
        restored = example["tokens"].copy()
        restored[index] = targets
        assert np.array_equal(restored, whole) and len(whole) == T


def test_mlm_collate_places_masked_tokens_in_the_flat_batch(build):
    objective, stream = build({"name": "mlm"})
    some = [example for _, example in examples(objective, stream, 5)]
    batch = objective.collate(some)
    flat, at = batch["tokens"].reshape(-1), 0
    for b, example in enumerate(some):
        for index, target in zip(example["masked_index"], example["masked_targets"], strict=True):
            assert batch["masked_index"][at] == b * T + index
            assert flat[batch["masked_index"][at]] == example["tokens"][index]
            assert batch["masked_targets"][at] == target
            at += 1
    assert objective.counts(batch) == {"mlm": at}


def test_mlm_padding_is_never_selected_and_never_seen(build, make_learner, tokenizer):
    objective, stream = build({"name": "mlm"}, split="val")
    (*_, last) = stream.eval_rows()
    example = example_of(objective, stream, last)
    assert len(example["tokens"]) < T and example["masked_index"].max() < len(last.tokens) + 1
    batch = tensors(objective.collate([example, example]))
    assert (batch["tokens"][:, len(example["tokens"]) :] == tokenizer.pad).all()
    learner = make_learner(ENCODER, {"name": "mlm"}, row_length=T)
    before = learner(batch)["mlm"]
    batch["tokens"][:, len(example["tokens"]) :] = 100  # what stands in the padding cannot matter
    assert torch.equal(before.sum, learner(batch)["mlm"].sum)
    assert before.count == 2 * len(example["masked_index"])


def test_mlm_loss_is_at_the_masked_positions_only(build, make_learner):
    options = {"name": "mlm", "label_smoothing": 0.1, "z_loss": 0.01}
    objective, stream = build(options)
    batch = tensors(objective.collate([e for _, e in examples(objective, stream, 4)]))
    learner = make_learner({**ENCODER, "init_std": 0.2}, options, row_length=T)
    hidden = learner.trunk(objective.inputs(batch)).detach().requires_grad_()
    terms = objective.loss(hidden, learner.heads, batch)
    logits = learner.heads["lm"](hidden).flatten(0, 1)[batch["masked_index"]]
    nll = F.cross_entropy(logits, batch["masked_targets"], reduction="none")
    smooth = F.cross_entropy(logits, batch["masked_targets"], reduction="sum", label_smoothing=0.1)
    expected = smooth + 0.01 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(terms["mlm"].sum, expected)
    torch.testing.assert_close(terms["nll"].sum, nll.sum())
    assert terms["mlm"].count == terms["nll"].count == len(batch["masked_index"])
    (gradient,) = torch.autograd.grad(terms["mlm"].sum, hidden)
    touched = gradient.flatten(0, 1).abs().sum(-1) > 0
    expected_touched = torch.zeros(4 * T, dtype=torch.bool)
    expected_touched[batch["masked_index"]] = True
    assert torch.equal(touched, expected_touched)


def test_mlm_documents_do_not_see_each_other(build):
    objective, stream = build({"name": "mlm"}, document_mask=True)
    row = next(row for row in stream.rows(0, 10_000) if len(row.starts) > 1)
    batch = objective.collate([example_of(objective, stream, row)])
    start = int(row.starts[1]) + 1  # behind <cls>
    documents, positions = batch["documents"][0], batch["positions"][0]
    assert documents[start] != documents[start - 1] and positions[start] == 0
    assert np.array_equal(positions[:start], np.arange(start))
    assert documents[0] == documents[1] and documents[-1] == documents[-2]
