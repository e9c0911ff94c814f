"""Multiple choice by likelihood: the scores against the plain way, what is cut, what may move."""

import numpy as np
import pytest
import torch

from nanolm.errors import UserError
from nanolm.finetune.augment import Augmented
from nanolm.finetune.config import AugmentConfig
from nanolm.model.trunk import Inputs
from tests.test_objectives_tasks import RECORDS, build, tensors


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
def test_a_candidate_scores_its_mean_log_probability(trunk):
    """Against the plain way: one candidate, one token at a time, no batch."""
    learner, split = build("choose_lm", trunk, length=48)
    objective, tokenizer = learner.objective, learner.objective.tokenizer
    batch, _ = tensors(objective, split.items)
    with torch.no_grad():
        hidden = learner.trunk(objective.inputs(batch))
        logits_NC = objective.logits(hidden, learner.heads, batch)["choose"]
    for record, scores_C in zip(split.table.records, logits_NC, strict=True):
        for text_, score in zip(record["choices"], scores_C, strict=False):
            question = tokenizer.encode(record["question"]).tolist()
            candidate = tokenizer.encode(" " + text_).tolist()
            if trunk == "encoder":
                ids = [tokenizer.cls, *question, *[tokenizer.mask] * len(candidate), tokenizer.sep]
            else:
                ids = [tokenizer.eos, *question, *candidate]
            inputs = Inputs(tokens_BT=torch.tensor([ids]))
            with torch.no_grad():
                log_p_TV = learner.heads["lm"](learner.trunk(inputs))[0].log_softmax(-1)
            first = 1 + len(question) - (trunk == "decoder")
            wanted = np.mean([float(log_p_TV[first + i, c]) for i, c in enumerate(candidate)])
            assert float(score) == pytest.approx(wanted, abs=1e-5)


def test_a_long_question_loses_its_beginning_and_keeps_room_for_the_candidates():
    old = RECORDS["choose_lm"]
    long = {"question": "x y " * 40, "choices": ["the list of names " * 9, "a"], "label": 1}
    RECORDS["choose_lm"] = [long] * 12
    try:
        learner, split = build("choose_lm", "decoder", length=24)
    finally:
        RECORDS["choose_lm"] = old
    item, tokenizer = split.items[0], learner.objective.tokenizer
    assert len(item.extra[0]) == 12 and item.cut > 0
    assert all(len(s.tokens) <= 24 for s in item.sequences)
    for sequence, ids in zip(item.sequences, item.extra, strict=True):
        assert sequence.tokens[sequence.second :].tolist() == ids.tolist()
        assert tokenizer.decode(sequence.tokens[1 : sequence.second]).endswith("x y")


def test_noise_leaves_the_candidates_alone():
    learner, split = build("choose_lm", "encoder", length=48)
    tokenizer = learner.objective.tokenizer
    noisy = Augmented(learner.objective, AugmentConfig(dropout=0.5, swap=0.4), tokenizer)
    rng = np.random.default_rng(0)
    for item in split.items:
        for sequence, ids in zip(item.sequences, item.extra, strict=True):
            found = noisy.sequence(sequence, rng)
            assert found.tokens[found.second : -1].tolist() == [tokenizer.mask] * len(ids)
    decoder, _ = build("choose_lm", "decoder")
    with pytest.raises(UserError, match="objective=choose_lm has targets at single tokens"):
        Augmented(decoder.objective, AugmentConfig(dropout=0.1), tokenizer)
