"""What holds for every objective: its contract, and on what alone a row's example depends."""

import functools

import numpy as np
import pytest

from nanolm.errors import UserError
from nanolm.training.loader import Loader
from tests.objective_rows import ENCODER, T, example_of, examples, objective_and_stream, tensors


@pytest.fixture
def build(tokenizer, corpus):
    """build(objective keys, …) -> (objective, stream of the corpus)."""
    return functools.partial(objective_and_stream, tokenizer, corpus)


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
