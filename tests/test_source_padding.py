"""What fills a source up is seen by nobody, from the batch to the loss, whoever made the batch."""

import numpy as np
import pytest
import torch

from nanolm.data.rows import Row
from nanolm.finetune.tasks.write_from_source import WriteFromSource
from tests.test_objectives_tasks import build, tensors

POSITIONS = ["t5", "rotary", "learned"]


def spans(make_learner, positions):
    """(learner, batch) of span corruption, of rows of which the last ones are short."""
    keys = {"trunk": "encoder_decoder", "positions": {"name": positions}, "init_std": 0.3}
    learner = make_learner(keys, {"name": "span"}, row_length=32)
    objective, starts = learner.objective, np.zeros(1, dtype=np.int64)
    rows = [
        Row(np.arange(n) % 400 + 50, starts, corpus=0, block=0, epoch=0, row_id=i)
        for i, n in enumerate((objective.span, 20, 3))
    ]
    examples = [objective.example(row, np.random.default_rng(row.row_id), None) for row in rows]
    return learner, tensors(objective, examples)[0]


def answers(make_learner, positions):
    """(learner, batch) of the task that writes from a source."""
    model = {"positions": {"name": positions}, "init_std": 0.3}
    learner, split = build("write", "encoder_decoder", model=model)
    assert type(learner.objective) is WriteFromSource
    return learner.eval(), tensors(learner.objective, split.items)[0]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("made", [spans, answers])
@torch.no_grad()
def test_it_changes_no_loss_and_the_last_token_does(made, positions, make_learner):
    learner, batch = made(make_learner, positions)
    (name,) = learner.objective.weights
    places = torch.arange(batch["source"].shape[1])
    padding = places >= batch["lengths"][:, None]
    last = places == batch["lengths"][:, None] - 1
    assert padding.any() and not padding.all(dim=1).any()

    def loss(changed):
        source = torch.where(changed, (batch["source"] + 77) % 512, batch["source"])
        return learner(batch | {"source": source})[name].sum

    before = loss(torch.zeros_like(padding))
    assert torch.equal(loss(padding), before)
    assert not torch.equal(loss(last), before)
