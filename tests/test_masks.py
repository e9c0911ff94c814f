"""Mask.dense against the definition written as Python loops, and what it means for gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.ops.masks import KINDS, Mask


def may_see(mask, b, t, s, n_queries, n_keys):
    """The docstring of `nanolm.ops.masks`, condition by condition."""
    t_among_keys = t + n_keys - n_queries
    if mask.causal:
        in_prefix = mask.prefix_lengths is not None and s < int(mask.prefix_lengths[b])
        if not (s <= t_among_keys or in_prefix):
            return False
    if mask.window is not None and not abs(t_among_keys - s) < mask.window:
        return False
    if mask.key_lengths is not None and not s < int(mask.key_lengths[b]):
        return False
    if mask.documents is not None:
        keys = mask.documents if mask.key_documents is None else mask.key_documents
        if int(mask.documents[b, t]) != int(keys[b, s]):
            return False
    if mask.order is not None:
        keys = mask.order if mask.key_order is None else mask.key_order
        key, query = int(keys[b, s]), int(mask.order[b, t])
        if not (key < query if mask.strict else key <= query):
            return False
    return True


@st.composite
def masks(draw):
    batch, n_queries = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    n_keys = n_queries + draw(st.integers(0, 3))
    chosen = draw(st.sets(st.sampled_from(KINDS)))

    def integers(low, high, *shape):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        return torch.randint(low, high + 1, shape, generator=generator)

    keys_differ = n_keys != n_queries
    return Mask(
        causal="causal" in chosen,
        window=draw(st.integers(1, 5)) if "window" in chosen else None,
        key_lengths=integers(0, n_keys, batch) if "lengths" in chosen else None,
        documents=integers(0, 2, batch, n_queries) if "documents" in chosen else None,
        key_documents=integers(0, 2, batch, n_keys) if keys_differ else None,
        prefix_lengths=integers(0, n_keys, batch) if "prefix" in chosen else None,
        order=integers(0, 4, batch, n_queries) if "order" in chosen else None,
        key_order=integers(0, 4, batch, n_keys) if keys_differ else None,
        strict=draw(st.booleans()),
    ), (batch, n_queries, n_keys)


@given(masks())
@settings(deadline=None, derandomize=True, max_examples=150)
def test_dense_is_the_definition(case):
    mask, (batch, n_queries, n_keys) = case
    expected = torch.tensor(
        [
            [
                [may_see(mask, b, t, s, n_queries, n_keys) for s in range(n_keys)]
                for t in range(n_queries)
            ]
            for b in range(batch)
        ]
    )
    dense = mask.dense(n_queries, n_keys)
    assert dense.dtype == torch.bool
    assert torch.equal(dense.expand(batch, 1, n_queries, n_keys)[:, 0], expected)


def test_kinds_name_exactly_what_is_set():
    assert Mask().kinds() == frozenset()
    full = Mask(
        causal=True,
        window=3,
        key_lengths=torch.tensor([1]),
        documents=torch.zeros(1, 2),
        prefix_lengths=torch.tensor([1]),
        order=torch.zeros(1, 2),
    )
    assert full.kinds() == frozenset(KINDS)


def test_at_sets_what_a_layer_decides_and_keeps_what_the_batch_brings():
    lengths = torch.tensor([2])
    mask = Mask(key_lengths=lengths, strict=True).at(causal=True, window=4)
    assert (mask.causal, mask.window, mask.strict) == (True, 4, True)
    assert mask.key_lengths is lengths


@pytest.mark.parametrize("cached", [0, 3])
def test_queries_that_extend_a_cache_are_the_last_ones(cached):
    whole = Mask(causal=True, window=3).dense(5 + cached, 5 + cached)
    assert torch.equal(Mask(causal=True, window=3).dense(5, 5 + cached), whole[:, :, cached:])
