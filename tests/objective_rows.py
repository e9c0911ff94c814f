"""Objectives on the tests' corpus: what stands between a config and a row that is made ready."""

import numpy as np
import torch

from nanolm.build import build_objective, resolve
from nanolm.config.load import load_config
from nanolm.data.stream import RowStream

ENCODER = {"trunk": "encoder", "n_segments": 2}
T = 48


def objective_and_stream(
    tokenizer, corpus, objective, model=None, *, row_length=T, document_mask=False, split="train"
):
    """(objective, stream of the corpus) of a config with these keys."""
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


def example_of(objective, stream, row, epoch=None):
    rng = np.random.default_rng((7, row.epoch if epoch is None else epoch, row.row_id))
    return objective.example(row, rng, lambda k: stream.draw(row, k))


def examples(objective, stream, count):
    return [(row, example_of(objective, stream, row)) for row in stream.rows(0, count)]


def tensors(batch):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in batch.items()}
