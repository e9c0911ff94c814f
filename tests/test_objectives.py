"""Objectives: what rows become, on what alone that depends, and what is asked of the model."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanolm.build import build_objective, resolve
from nanolm.config.load import load_config
from nanolm.data.rows import Row
from nanolm.data.stream import RowStream
from nanolm.errors import UserError
from nanolm.objectives.base import IGNORED
from nanolm.training.loader import Loader

ENCODER = {"trunk": "encoder", "n_segments": 2}
T = 48


@pytest.fixture
def build(tokenizer, corpus):
    """build(objective keys, …) -> (objective, stream of the corpus)."""

    def make(objective, model=None, *, row_length=T, document_mask=False, split="train"):
        base = {
            "model": {"d_model": 32, "n_heads": 4, "max_length": 64, "vocab_size": 512}
            | (model or ({} if objective["name"] in ("clm", "prefix") else ENCODER)),
            "objective": objective,
            "data": {"path": str(corpus), "row_length": row_length, "document_mask": document_mask},
        }
        config = resolve(load_config([], base=base), tokenizer)
        built = build_objective(config, tokenizer)
        partial = split != "train"
        stream = RowStream(
            config.data.mixture,
            split,
            stride=built.stride,
            span=built.span,
            seed=7,
            partial=partial,
        )
        return built, stream

    return make


def example_of(objective, stream, row, epoch=None):
    rng = np.random.default_rng((7, row.epoch if epoch is None else epoch, row.row_id))
    return objective.example(row, rng, lambda k: stream.draw(row, k))


def examples(objective, stream, count):
    return [(row, example_of(objective, stream, row)) for row in stream.rows(0, count)]


def tensors(batch):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in batch.items()}


# ---- causal ------------------------------------------------------------------------------------


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


# ---- masked ------------------------------------------------------------------------------------


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


def test_masks_change_with_the_epoch_and_nothing_else(build):
    objective, stream = build({"name": "mlm"})
    same = 0
    for row in stream.rows(0, 50):
        first, again, next_epoch = (example_of(objective, stream, row, epoch=e) for e in (0, 0, 1))
        assert all(np.array_equal(first[key], again[key]) for key in first)
        same += np.array_equal(first["masked_index"], next_epoch["masked_index"])
    assert same == 0


@pytest.mark.parametrize("name", ["mlm", "mlm_pair", "prefix"])
def test_examples_do_not_depend_on_ranks_workers_or_batches(build, name):
    objective, stream = build({"name": name})
    rows = {}
    layouts = [(1, 24, 0), (2, 5, 0), (3, 1, 0), (1, 24, 2)]  # world, micro-batch, workers
    for world, micro_batch, workers in layouts:
        for rank in range(world):
            loader = Loader(
                stream,
                objective,
                global_batch=24,
                micro_batch=micro_batch,
                rank=rank,
                world=world,
                workers=workers,
            )
            for batch in next(iter(loader)):
                for b, row_id in enumerate(batch.row_ids):
                    rows.setdefault((world, micro_batch, workers), {})[row_id] = fingerprint(
                        batch.tensors, b
                    )
            loader.close()
    first, *others = rows.values()
    assert len(first) == 24 and all(other == first for other in others)


def fingerprint(batch, b):
    """All that a batch holds of its row b, as comparable bytes."""
    parts = []
    for key, value in batch.items():
        if key == "masked_index":
            mine = (value // T) == b
            parts += [(value[mine] - b * T).tolist(), batch["masked_targets"][mine].tolist()]
        elif key != "masked_targets":
            parts.append(value[b].tolist())
    return parts


# ---- pairs -------------------------------------------------------------------------------------


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


# ---- prefix ------------------------------------------------------------------------------------


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


# ---- all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clm", "mlm", "mlm_pair", "prefix"])
def test_the_contract_holds(build, make_learner, name):
    """Weights name terms; counts are known before the forward pass and equal the terms' own."""
    objective, stream = build({"name": name})
    model = {} if name in ("clm", "prefix") else ENCODER
    learner = make_learner(model, {"name": name}, row_length=T)
    batch = objective.collate([e for _, e in examples(objective, stream, 3)])
    terms = learner(tensors(batch))
    assert set(objective.weights) <= set(terms) and {"nll", "accuracy"} <= set(terms)
    for term, count in objective.counts(batch).items():
        assert terms[term].count == count
    assert len(objective.targets(tensors(batch))) == terms["nll"].count
    kinds = objective.inputs(tensors(batch)).mask.kinds()
    assert kinds | ({"prefix"} if name == "prefix" else set()) <= objective.masks | {"lengths"}
    main = next(iter(objective.weights))
    terms[main].sum.backward()
    unused = [key for key, p in learner.named_parameters() if p.grad is None]
    assert all(key.startswith("heads.pair") for key in unused)


@pytest.mark.parametrize(
    ("objective", "model", "data", "key"),
    [
        ({"name": "mlm"}, {"trunk": "decoder"}, {}, "model.trunk=decoder"),
        ({"name": "clm"}, {"trunk": "encoder"}, {}, "model.trunk=encoder"),
        ({"name": "mlm_pair"}, {"trunk": "encoder"}, {}, "model.n_segments=2"),
        ({"name": "mlm_pair"}, ENCODER, {"document_mask": True}, "data.document_mask=true"),
        ({"name": "prefix"}, {}, {"document_mask": True}, "data.document_mask=true"),
        ({"name": "mlm"}, ENCODER, {"row_length": 2}, "data.row_length=2"),
        ({"name": "clm"}, {}, {"row_length": 65}, "data.row_length=65"),
    ],
)
def test_impossible_combinations_are_refused_by_key(build, objective, model, data, key):
    with pytest.raises(UserError, match=key):
        build(objective, model or None, **data)


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
