"""Attention length by length: equal to the masked definition, and no product goes to padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanolm.data.tables.packing import rectangle
from nanolm.errors import UserError
from nanolm.ops.bias import AlibiBias, BucketBias
from nanolm.ops.contract import AttentionSpec, choose
from nanolm.ops.masks import Mask
from nanolm.peft.base import attach
from nanolm.registry import PEFT
from tests.test_objectives_tasks import CASES, build, tensors

HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
KEY_HEADS = [2, 4]
BOTH = frozenset({"documents", "length_groups"})
BIASES = {
    "none": None,
    "alibi": AlibiBias(torch.rand(4)),
    "bucket": BucketBias(torch.randn(8, 4), True, 16),
}


def kernel(name, **spec):
    return choose("attention", AttentionSpec(masks=BOTH, **HEADS, **spec), name).kernel


def one_row(lengths):
    """(documents [1, M], length_groups) of sequences end to end, ascending in length."""
    lengths = sorted(lengths)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    pairs = zip(*np.unique(lengths, return_counts=True))
    return documents, tuple((int(number), int(length)) for length, number in pairs)


def attend(name, lengths, bias, key_heads=2, **conditions):
    documents, length_groups = one_row(lengths)
    mask = Mask(documents=documents, length_groups=length_groups, **conditions)
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS["n_heads"], key_heads, key_heads)
    inputs = [
        torch.randn(1, documents.numel(), n, 8, generator=generator, requires_grad=True)
        for n in heads
    ]
    out = kernel(name).run(*inputs, mask, bias=BIASES[bias], scale=0.3)
    weight = torch.randn(out.shape, generator=generator)
    return out, *torch.autograd.grad((out.float() * weight).sum(), inputs)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    bias=st.sampled_from(list(BIASES)),
    causal=st.booleans(),
    window=st.sampled_from([None, 3]),
    key_heads=st.sampled_from(KEY_HEADS),
)
def test_it_is_the_masked_definition(lengths, bias, causal, window, key_heads):
    conditions = {"causal": causal, "window": window}
    found, expected = (
        attend(name, lengths, bias, key_heads, **conditions) for name in ("by_length", "reference")
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", KEY_HEADS)
def test_in_bfloat16_it_rounds_as_the_masked_kernel_does(key_heads):
    lengths = [3, 7, 3, 12, 5]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (
            attend(name, lengths, "none", key_heads) for name in ("by_length", "sdpa")
        )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.float(), right.float(), rtol=3e-2, atol=3e-2)


class Products(TorchDispatchMode):
    """(rows, queries, keys) of every call of the attention that sdpa is made of."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.calls.append((len(args[0]), args[0].shape[2], args[1].shape[2]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
def test_no_product_goes_to_padding(trunk):
    learner, split = build("classify", trunk)
    batch, arrays = tensors(learner.objective, split.items)
    lengths = np.array([len(item.sequences[0].tokens) for item in split.items])
    assert arrays["tokens"].shape == (1, lengths.sum())  # linear layers: tokens only
    with Products() as products:
        learner(batch)
    n_layers = len(learner.trunk.blocks)
    assert sum(rows * t * s for rows, t, s in products.calls) == n_layers * (lengths**2).sum()
    assert len(products.calls) == n_layers * len(set(lengths.tolist()))
    # The rectangle, which other kernels get, has padding and hidden pairs.
    learner.objective.in_line = False
    batch, arrays = tensors(learner.objective, split.items)
    assert "length_groups" not in arrays and arrays["tokens"].size >= lengths.sum()
    with Products() as products:
        learner(batch)
    assert sum(rows * t * s for rows, t, s in products.calls) > n_layers * (lengths**2).sum()


# Two streams add their relative term as a dense bias, which no kernel takes length by length.
IN_LINE = [(task, trunk) for task, trunk in CASES if trunk != "two_stream"]


@pytest.mark.parametrize(("task", "trunk"), IN_LINE)
def test_the_rectangle_gives_the_same(task, trunk):
    """One row or several: the same gradients (padded: test_objectives_tasks). In float64: `embed`
    multiplies similarities by 20, and what float32 then loses depends on the texts at hand."""
    learner, split = build(task, trunk, model={"window": [None, 5]})
    learner.double()
    results = []
    for in_line in (True, False):
        assert learner.objective.in_line or not in_line
        learner.objective.in_line = in_line
        learner.zero_grad()
        terms = learner(tensors(learner.objective, split.items)[0])
        sum(terms[n].sum for n in learner.objective.weights).backward()
        results.append({n: p.grad.clone() for n, p in learner.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-10, atol=1e-10)


def test_it_is_chosen_by_the_spec_and_says_why_not():
    spec = AttentionSpec(masks=BOTH, **HEADS)
    assert choose("attention", spec).kernel.name == "by_length"
    documents = AttentionSpec(masks=frozenset({"documents"}), **HEADS)
    assert choose("attention", documents).kernel.name != "by_length"
    refused = [
        (documents, "do not tell where sequences"),
        (AttentionSpec(masks=BOTH, device="cuda", **HEADS), "it is for a CPU"),
        (AttentionSpec(masks=BOTH, bias="dense", **HEADS), "places in the row"),
        (AttentionSpec(masks=BOTH, softcap=5.0, **HEADS), "no soft-cap"),
    ]
    for spec, sentence in refused:
        with pytest.raises(UserError, match=f"kernels.attention=by_length .*{sentence}"):
            choose("attention", spec, "by_length")
    # A model that another kernel serves, soft-capped or compiled, gets the rectangle.
    assert not build("classify", "encoder", model={"attention_softcap": 5.0})[0].objective.in_line
    assert not build("classify", "encoder", pack=False)[0].objective.in_line


def test_a_batch_without_classes_goes_through_its_mask():
    documents = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, -1]])
    inputs = [torch.randn(2, 5, n, 8) for n in (4, 2, 2)]
    mask = Mask(documents=documents)
    found, expected = (
        kernel(name).run(*inputs, mask, scale=0.3) for name in ("by_length", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_a_line_is_full_and_sorted():
    sequences = [np.arange(1, n + 1) for n in (3, 5, 2, 3)]
    arrays, index = rectangle(sequences, 0, packed=True, in_line=True)
    assert arrays["tokens"].tolist() == [[1, 2, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5]]
    assert arrays["documents"].tolist() == [[2, 2, 0, 0, 0, 3, 3, 3, 1, 1, 1, 1, 1]]
    assert arrays["positions"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]]
    assert arrays["tokens"].reshape(-1)[index].tolist() == np.concatenate(sequences).tolist()


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
def test_a_learned_prompt_stands_before_every_text(trunk):
    """Packed by length or one text a row: the same logits, the same gradient of the vectors."""
    results = []
    for pack in (True, False):
        learner, split = build("classify", trunk, pack=pack, model={"n_segments": 2})
        attach(learner, PEFT.get("prompt").options(length=3), heads=["classify"])
        objective = learner.objective
        batch, _ = tensors(objective, split.items)
        logits = objective.class_logits(
            learner.trunk(objective.inputs(batch)), learner.heads, batch
        )
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), learner.trunk.prompt.vectors_PD)
        results.append((logits.detach(), gradient))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
