"""Which keys a query could match: found once a batch, right for any numbers, and never stale."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.model.trunk import Inputs
from nanolm.ops import matching
from nanolm.ops.masks import Mask, Ranges
from nanolm.ops.matching import ranges_of, with_ranges
from tests.test_compile import graphs

__all__ = ["graphs"]  # a fixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWEST, HIGHEST = -(2**31), 2**31 - 1
DOCUMENTS = (LOWEST, -1, 0, 1, 7, HIGHEST)
# With a strict order the place before LOWEST is asked for, and with the order turned round the one
# behind HIGHEST: a superset is promised there.
ORDER = (LOWEST + 1, -5, 0, 1, 2, HIGHEST - 1)


def written_out(allowed):
    """int32 [B, 2, T] of bool [B, T, S]: the first and one past the last key of each query."""
    n_keys = allowed.shape[2]
    at = torch.arange(n_keys)
    first = torch.where(allowed, at, n_keys).amin(2) if n_keys else allowed.sum(2)
    end = torch.where(allowed, at + 1, 0).amax(2) if n_keys else allowed.sum(2)
    return torch.stack([first, end], dim=1).int()


@st.composite
def masks(draw, documents=DOCUMENTS, order=ORDER):
    """(mask, queries, keys): numbers in any order, of one row for all or of each, 0 to 9 a side."""
    n_queries, n_keys = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    dtype = torch.int64 if max(documents) > HIGHEST else draw(st.sampled_from([torch.int32, None]))
    kinds = draw(st.sampled_from([{"documents"}, {"order"}, {"documents", "order"}]))
    same = draw(st.booleans())
    fields = {}
    for kind, numbers in (("documents", documents), ("order", order)):
        for name, n in ((kind, n_queries), (f"key_{kind}", n_keys)):
            rows = draw(st.sampled_from([1, 2]))
            drawn = st.lists(st.sampled_from(numbers), min_size=rows * n, max_size=rows * n)
            values = torch.tensor(draw(drawn), dtype=dtype or torch.int64).view(rows, n)
            if kind in kinds and not (same and name != kind):
                fields[name] = values
    return Mask(**fields, strict=draw(st.booleans())), n_queries, n_queries if same else n_keys


@given(masks())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_ranges_are_those_of_the_mask_written_out(case):
    mask, n_queries, n_keys = case
    allowed = mask.dense(n_queries, n_keys)[:, 0]
    found = ranges_of(mask)
    assert torch.equal(found.keys, written_out(allowed))
    assert torch.equal(found.queries, written_out(allowed.transpose(1, 2)))


WIDE = (-(2**63), -(2**32), 0, 1, 2**31, 2**32, 2**40, 2**63 - 1)


@given(masks(documents=WIDE, order=WIDE))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_numbers_wider_than_32_bits_never_make_a_range_too_narrow(case):
    mask, n_queries, n_keys = case
    allowed = mask.dense(n_queries, n_keys)[:, 0]
    found = ranges_of(mask)
    for ranges, right in (
        (found.keys, written_out(allowed)),
        (found.queries, written_out(allowed.transpose(1, 2))),
    ):
        assert (ranges[:, 0] <= right[:, 0]).all() and (ranges[:, 1] >= right[:, 1]).all()


def test_without_gradients_only_the_forward_passs_half_is_found():
    mask = Mask(documents=torch.tensor([[0, 0, 1]]))
    with torch.no_grad():
        found = with_ranges(mask).ranges
    assert found.queries is None and torch.equal(found.keys, ranges_of(mask).keys)


@pytest.fixture
def counted(monkeypatch):
    """The masks whose ranges were found, in order."""
    seen = []

    def watched(mask):
        seen.append(mask)
        return ranges_of(mask)

    monkeypatch.setattr(matching, "ranges_of", watched)
    return seen


TRITON = {"attention": "triton"}


def packed(n_rows=2, length=12):
    """Two documents a row, which end elsewhere in every row."""
    ends = torch.arange(5, 5 + n_rows, device=DEVICE)[:, None]
    return Mask(documents=(torch.arange(length, device=DEVICE)[None] >= ends).long())


def hidden(trunk, mask, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(512, tuple(mask.documents.shape), generator=generator)
    return trunk(Inputs(tokens_BT=tokens.to(DEVICE), mask=mask))


MODERN = {"trunk": "encoder", "n_layers": 6, "window": [None, 4, 4], "positions": {"name": "none"}}


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_they_are_found_once_for_all_layers_and_their_backward_passes(
    make_learner, counted, recompute
):
    trunk = make_learner(MODERN, {"name": "mlm"}, document_mask=True, kernels=TRITON).trunk.train()
    (stack,) = trunk.stacks
    stack.recompute = recompute
    out = hidden(trunk, packed())
    assert len(counted) == 1
    out.sum().backward()
    assert len(counted) == 1
    hidden(trunk, packed())
    assert len(counted) == 2


def test_compiled_blocks_share_them_in_one_graph_a_kind(make_learner, counted, graphs):
    trunk = make_learner(MODERN, {"name": "mlm"}, document_mask=True, kernels=TRITON).trunk.train()
    expected = hidden(trunk, packed())
    for block in trunk.blocks:
        block.compile()
    for n_rows in (2, 3):  # other sizes are no other graph
        out = hidden(trunk, packed(n_rows))
        out.sum().backward()
        if n_rows == 2:
            assert torch.equal(out, expected)
    assert len(counted) == 3  # with the one that was not compiled
    assert graphs.run == 2 * 6
    assert graphs.compiled <= 3 * 2, graphs.compiled


def test_other_kernels_do_not_pay_for_them(make_learner, counted):
    for kernel in ("reference", "sdpa"):
        kernels = {"attention": kernel}
        trunk = make_learner(MODERN, {"name": "mlm"}, document_mask=True, kernels=kernels).trunk
        hidden(trunk, packed())
    assert counted == []


def test_masks_without_numbers_have_none(make_learner, counted):
    trunk = make_learner(MODERN, {"name": "mlm"}, kernels=TRITON).trunk
    mask = Mask(key_lengths=torch.tensor([12, 5], device=DEVICE))
    trunk(Inputs(tokens_BT=torch.zeros(2, 12, dtype=torch.int64, device=DEVICE), mask=mask))
    assert counted == [] and with_ranges(mask) is mask


def test_a_layers_mask_takes_them_along_and_every_other_copy_drops_them():
    mask = with_ranges(packed())
    assert mask.at(causal=True, window=3).ranges is mask.ranges
    assert with_ranges(mask) is mask
    for field in dataclasses.fields(Mask):
        if field.init:
            changed = dataclasses.replace(mask, **{field.name: getattr(mask, field.name)})
            assert changed.ranges is None, field.name
    assert dataclasses.replace(mask).ranges is None
    with pytest.raises(TypeError):
        Mask(ranges=mask.ranges)


@pytest.mark.parametrize("name", ["triton", "triton_decode"])
def test_masks_made_from_one_with_ranges_are_attended_by_their_own_numbers(name):
    """Other documents, a slice of rows, more keys, another order, strict or not: the numbers are
    those of a mask that never had any."""
    from nanolm.ops.contract import candidates

    run = candidates("attention")[name].run
    n = 70  # several tiles of keys
    halves = (torch.arange(n, device=DEVICE) >= 40).long()
    old = Mask(documents=halves.expand(2, n), order=torch.arange(n, device=DEVICE).expand(2, n))
    old = with_ranges(old)
    other = torch.stack([1 - halves, halves.flip(0)])
    made = {
        "documents": dataclasses.replace(old, documents=other, key_documents=1 - other),
        "keys' documents": dataclasses.replace(old, key_documents=other),
        "order": dataclasses.replace(old, order=old.order.flip(1), key_order=old.order),
        "strict": dataclasses.replace(old, strict=True),
        "row": dataclasses.replace(old, documents=other[1:], order=old.order[1:]),
        "padded": dataclasses.replace(
            old,
            key_documents=torch.nn.functional.pad(old.documents, (6, 0)),
            key_order=torch.nn.functional.pad(old.order, (6, 0)),
        ),
    }
    for change, mask in made.items():
        n_keys = n if mask.key_order is None else mask.key_order.shape[1]
        generator = torch.Generator().manual_seed(1)
        shapes = [(1 if change == "row" else 2, m, 1, 16) for m in (n, n_keys, n_keys)]
        leaves = [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in shapes]
        wanted = {"scale": 0.25, "return_lse": True}
        every = Mask.keeping(mask, Ranges(None, None))  # nothing is skipped
        assert with_ranges(mask.at(causal=False, window=None)).ranges.keys is not None
        found, right = (run(*leaves, m, **wanted) for m in (mask, every))
        assert torch.equal(found.out, right.out) and torch.equal(found.lse, right.lse), change
        if name == "triton":
            gradients = [torch.autograd.grad(x.out.sum() + x.out.pow(2).sum(), leaves)
                         for x in (found, right)]  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), change
