"""A published model's training, beside what it computes: it starts as its authors' does, and drops
features where theirs does.

Dropout is made a plain factor of its rate, in our modules and in those of `transformers`: then a
place too many, one too few, or one with another rate, is a difference of hidden states and logits,
which are compared as by the proof of an import.
"""

import dataclasses
import math

import pytest
import torch
import transformers

from nanolm.build import build_learner, build_objective
from nanolm.checkpoint.named_tensors import learner_tensors
from nanolm.config.schema import KernelsConfig
from nanolm.hub.configs import Published
from nanolm.hub.families import FAMILIES
from nanolm.hub.proof import PROOFS, differences_of_a_stack, their_model
from nanolm.hub.published import as_config, assembled, model_keys
from nanolm.inference.parity import CASES, VOCABULARY, NoTokenizer, randomise

RATES = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
    "qwen3": {"attention_dropout": 0.3},
    "bert, masked LM": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
    "roberta, masked LM": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
    "distilbert, masked LM": {"dropout": 0.2, "attention_dropout": 0.3},
    "albert, masked LM": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
    "modernbert, masked LM": {"mlp_dropout": 0.2},  # the only one with a place of its own in ours
    "t5, v1.0": {"dropout_rate": 0.2},
    "t5, v1.1": {"dropout_rate": 0.2},
    "xlnet": {"dropout": 0.2},
}
"""A case of the table of parity, and the rates of its config.json."""
OURS_ALONE = {
    "distilbert, masked LM": (".attention.out_lin", 0.2),
    "albert, masked LM": (".ffn_output", 0.2),
}
"""Modules of theirs whose results only our blocks drop, as they do behind every sublayer."""
BEHIND_ALL_DROPOUT = {"xlnet": slice(None, None, 3)}
"""Which differences are of what dropout has left at last: the hidden states of XLNet's two streams,
between the others, are handed out by `transformers` before its last place."""


def factor(x, p=0.5, training=True, inplace=False):
    """What dropout leaves of x on average, before it is made up for."""
    return x * (1 - p) if training else x


def published_by(case, **more):
    """(family, its config.json, a tokenizer, their new model)."""
    name, theirs, keys = CASES[case]
    family = FAMILIES[name]
    tokenizer = NoTokenizer(pad=1 if family.pad is None else family.pad)
    values = keys | {"vocab_size": VOCABULARY, "model_type": name} | more
    model = getattr(transformers, theirs)(getattr(transformers, family.classes.config)(**values))
    return family, Published(f"the config.json of {case}", values, name), tokenizer, model


def in_training(case):
    """(ours, theirs) with the same weights, as they are trained; our attention is the one that
    calls PyTorch's dropout."""
    family, published, tokenizer, model = published_by(case, **RATES[case])
    randomise(model)
    found = assembled(
        family, published, model_keys(family, published), model.state_dict(), tokenizer, case
    )
    config = dataclasses.replace(found.config, kernels=KernelsConfig(attention="reference"))
    learner = build_learner(config, build_objective(config, tokenizer))
    learner.load_state_dict(found.learner.state_dict())
    imported = dataclasses.replace(found, config=config, learner=learner.train())
    return imported, their_model(imported).train()


@pytest.mark.parametrize("case", RATES)
@torch.no_grad()
def test_ours_are_those_of_transformers(case, monkeypatch):
    imported, theirs = in_training(case)
    compare = PROOFS.get(imported.config.model.trunk, differences_of_a_stack)
    monkeypatch.setattr(torch.nn.functional, "dropout", factor)
    ending, rate = OURS_ALONE.get(case, ("nowhere", 0.0))
    for name, module in theirs.named_modules():
        if name.endswith(ending):
            module.register_forward_hook(lambda module, given, out: factor(out, rate))
    counted = BEHIND_ALL_DROPOUT.get(case, slice(None))

    def largest():
        return max(float(each.abs().max()) for each in compare(imported, theirs)[counted])

    assert largest() < 1e-5
    imported.learner.eval()  # the factor matters: without it on one side nothing is alike
    assert largest() > 1e-2


WIDE = {"t5, v1.0": {"d_model": 64, "d_ff": 160, "d_kv": 24}, "xlnet": {"d_model": 64}}
WIDE["t5, v1.1"] = WIDE["t5, v1.0"]
OUR_CHOICE = {"t5, v1.1": {"lm_head.weight"}}  # see `init_t5`


@pytest.mark.parametrize("case", WIDE)
@torch.no_grad()
def test_every_weight_starts_with_the_size_that_its_authors_gave_it(case):
    family, published, tokenizer, theirs = published_by(case, **WIDE[case])
    config = as_config(family, model_keys(family, published), frozenset(), tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        learner = build_learner(config, build_objective(config, tokenizer))
        theirs.init_weights()
    ours = family.table.to_theirs(learner_tensors(learner), config.model)
    expected = dict(theirs.named_parameters())
    assert set(ours) - {family.projection} == set(expected) - {family.projection}
    for name in set(expected) & set(ours) - OUR_CHOICE.get(case, set()):
        size, wanted = ours[name].std().item(), expected[name].std().item()
        # A standard deviation of n draws is off by a share of 1 / sqrt(2 n), here of both.
        assert size == pytest.approx(wanted, rel=6 / math.sqrt(ours[name].numel())), name
        assert ours[name].mean().item() == pytest.approx(
            expected[name].mean().item(), abs=6 * wanted / math.sqrt(ours[name].numel())
        ), name
