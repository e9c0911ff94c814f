"""Heads against their formulas; tying; the kernels that they refuse."""

import pytest
import torch
import torch.nn.functional as F

from nanolm.errors import UserError


def some_hidden():
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(1))


TARGETS = torch.tensor([3, 500, -100, 0, 7, 7, -100])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("transform", [True, False])
def test_token_logits_and_their_loss(make_learner, tied, softcap, transform):
    keys = {"trunk": "encoder", "tied": tied, "logit_softcap": softcap, "init_std": 0.2}
    learner = make_learner(keys, {"name": "mlm", "transform": transform})
    head = learner.heads["lm"]
    assert (head.weight is learner.trunk.embedding.weight) == tied
    x = some_hidden()
    if transform:
        torch.nn.init.normal_(head.bias)
        x = head.transform.norm(F.gelu(head.transform.dense(x)))
    logits = F.linear(x, head.weight, head.bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(head(some_hidden()), logits)
    out = head.cross_entropy(some_hidden(), TARGETS, label_smoothing=0.1, z_loss=0.0)
    expected = F.cross_entropy(logits, TARGETS, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(out.loss, expected)


def test_tied_weights_stand_once_among_the_parameters(make_learner):
    tied, untied = make_learner({"tied": True}), make_learner({"tied": False})
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 512 * 32


def test_pooled_reads_the_first_token(make_learner):
    learner = make_learner({"trunk": "encoder", "n_segments": 2}, {"name": "mlm_pair"})
    head, x = learner.heads["pair"], torch.randn(3, 5, 32)
    expected = head.out(torch.tanh(head.dense(x[:, 0])))
    assert torch.equal(head(x), expected) and expected.shape == (3, 2)


@pytest.mark.parametrize(
    ("model", "objective", "reason"),
    [
        ({"logit_softcap": 30.0}, {"name": "clm"}, "soft-cap"),
        ({}, {"name": "clm", "z_loss": 1e-4}, "z-loss"),
        ({}, {"name": "clm", "label_smoothing": 0.1}, "smooths"),
    ],
)
def test_a_loss_kernel_that_lacks_an_option_is_refused_at_build(
    make_learner, model, objective, reason
):
    with pytest.raises(UserError, match=f"linear_cross_entropy=torch .*{reason}"):
        make_learner(model, objective, kernels={"linear_cross_entropy": "torch"})
