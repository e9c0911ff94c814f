"""Learner: a batch in, terms out; keys of its state dict; weights that depend on the seed alone."""

import numpy as np
import torch
import torch.nn.functional as F

from nanolm.model.trunk import Inputs


def batch(length=16):
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, 512, (3, length)))
    targets = torch.from_numpy(rng.integers(0, 512, (3, length)))
    targets[0, 5:] = -100
    return {"tokens": tokens, "targets": targets}


def test_forward_gives_the_objectives_terms(make_learner):
    learner, b = make_learner(), batch()
    terms = learner(b)
    logits = learner.heads["lm"](learner.trunk(Inputs(tokens_BT=b["tokens"]))).flatten(0, 1)
    expected = F.cross_entropy(logits, b["targets"].flatten(), reduction="sum")
    assert set(terms) == {"clm", "nll", "accuracy"}
    torch.testing.assert_close(terms["clm"].sum, expected)
    torch.testing.assert_close(terms["nll"].sum, expected)
    right = (logits.argmax(-1) == b["targets"].flatten()).sum()
    assert terms["accuracy"].sum == right
    assert all(term.count == 5 + 16 + 16 for term in terms.values())
    assert learner.objective.counts({"targets": b["targets"].numpy()}) == {"clm": 37}


def test_state_dict_keys_are_trunk_and_heads(make_learner):
    learner = make_learner({"trunk": "encoder", "n_segments": 2}, {"name": "mlm_pair"})
    groups = {key.split(".")[0] for key in learner.state_dict()}
    heads = {key.split(".")[1] for key in learner.state_dict() if key.startswith("heads.")}
    assert groups == {"trunk", "heads"} and heads == {"lm", "pair"}


def test_initial_weights_depend_on_the_seed_alone(make_learner):
    torch.manual_seed(1)
    first = make_learner().state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = make_learner().state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # and the global generator is left alone
    assert all(torch.equal(first[key], second[key]) for key in first)
