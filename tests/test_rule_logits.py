"""What rules that compare probabilities are given: the logits of the loss's own pass, dropout and
all, each under the name of its term, and gradients through them."""

import pytest
import torch
from torch.nn import functional as F

from nanolm.objectives.base import IGNORED
from nanolm.registry import OBJECTIVES
from nanolm.rules.base import WithLogits, logits_in, only_terms
from tests.test_objectives_tasks import CASES, build, tensors

CHOICES = [case for case in CASES if hasattr(OBJECTIVES.get(case[0]).build, "logits")]


@pytest.mark.parametrize(("task", "trunk"), CHOICES)
def test_logits_beside_a_loss_are_those_of_its_own_dropout(task, trunk):
    options = OBJECTIVES.get(task).options.__dataclass_fields__
    given = {"head_dropout": 0.5} if "head_dropout" in options else {}
    learner, split = build(task, trunk, **given)
    objective, heads = learner.train().objective, learner.heads
    batch, _ = tensors(objective, split.items)
    hidden = learner.trunk(objective.inputs(batch)).detach().requires_grad_()

    def terms_of(asked):
        torch.manual_seed(0)
        return asked.loss(hidden, heads, batch)

    plain, beside = terms_of(objective), terms_of(WithLogits(objective))
    twice = terms_of(WithLogits(WithLogits(objective)))  # a rule around a rule
    labels = batch["labels"][batch["labels"] != IGNORED]
    for found in (beside, twice):
        assert set(only_terms(found)) == set(plain)
        assert all(torch.equal(found[name].sum, term.sum) for name, term in plain.items())
        assert list(logits_in(found)) == [objective.term]
        logits_NC = logits_in(found)[objective.term]
        expected = F.cross_entropy(logits_NC, labels, reduction="sum")
        torch.testing.assert_close(plain[objective.term].sum, expected, atol=1e-4, rtol=1e-5)
        slopes = [
            torch.autograd.grad(total, hidden, retain_graph=True)[0]
            for total in (expected, plain[objective.term].sum)
        ]
        torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)
        assert slopes[0].abs().max() > 0


def test_logits_stand_under_the_names_of_their_terms():
    terms = {"a": 1, "logits/b": 4, "b": 2, "logits/a": 3, "accuracy": 5}
    assert logits_in(terms) == {"a": 3, "b": 4}
    assert only_terms(terms) == {"a": 1, "b": 2, "accuracy": 5}
