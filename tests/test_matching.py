"""Which keys a query could match: found once a batch, right for any numbers, and never stale."""

import dataclasses

import numpy as np
import pytest
import torch

from nanolm.model.trunk import Inputs
from nanolm.ops import matching
from nanolm.ops.contract import candidates
from nanolm.ops.masks import Mask
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


def drawn_masks(count, documents=DOCUMENTS, order=ORDER):
    """(mask, queries, keys): numbers in any order, of one row for all or of each, 0 to 9 a side."""
    rng = np.random.default_rng(0)
    for number in range(count):
        n_queries, n_keys = rng.integers(0, 10, 2).tolist()
        same = bool(rng.integers(2))
        kinds = (("documents",), ("order",), ("documents", "order"))[number % 3]
        narrow = bool(rng.integers(2)) and max(documents) <= HIGHEST
        fields = {}
        for kind in kinds:
            numbers = np.array(documents if kind == "documents" else order)
            for name, n in ((kind, n_queries), (f"key_{kind}", n_keys)):
                values = torch.from_numpy(rng.choice(numbers, (rng.integers(1, 3), n)))
                fields[name] = values.int() if narrow else values
            if same:
                del fields[f"key_{kind}"]
        mask = Mask(**fields, strict=bool(rng.integers(2)))
        yield mask, n_queries, n_queries if same else n_keys


def test_ranges_are_those_of_the_mask_written_out():
    for mask, n_queries, n_keys in drawn_masks(300):
        allowed = mask.dense(n_queries, n_keys)[:, 0]
        found = ranges_of(mask)
        assert torch.equal(found.keys, written_out(allowed)), mask
        assert torch.equal(found.queries, written_out(allowed.transpose(1, 2))), mask


WIDE = (-(2**63), -(2**32), 0, 1, 2**31, 2**32, 2**40, 2**63 - 1)


def test_numbers_wider_than_32_bits_never_make_a_range_too_narrow():
    for mask, n_queries, n_keys in drawn_masks(300, WIDE, WIDE):
        allowed = mask.dense(n_queries, n_keys)[:, 0]
        found = ranges_of(mask)
        for ranges, right in (
            (found.keys, written_out(allowed)),
            (found.queries, written_out(allowed.transpose(1, 2))),
        ):
            assert (ranges[:, 0] <= right[:, 0]).all(), mask
            assert (ranges[:, 1] >= right[:, 1]).all(), mask


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


@pytest.fixture
def reader(monkeypatch):
    """The reference as a kernel that reads ranges; those that it was given, layer by layer."""
    kernel, given = candidates("attention")["reference"], []
    run = kernel.run

    def watched(q, k, v, mask, **options):
        given.append(mask.ranges)
        return run(q, k, v, mask, **options)

    monkeypatch.setattr(type(kernel), "reads_ranges", True, raising=False)
    monkeypatch.setattr(kernel, "run", watched)
    return given


REFERENCE = {"attention": "reference"}


def packed(n_rows=2, length=12):
    """Two documents a row, which end elsewhere in every row."""
    ends = torch.arange(5, 5 + n_rows, device=DEVICE)[:, None]
    return Mask(documents=(torch.arange(length, device=DEVICE)[None] >= ends).long())


def hidden(trunk, mask, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(512, tuple(mask.documents.shape), generator=generator)
    return trunk(Inputs(tokens_BT=tokens.to(DEVICE), mask=mask))


MODERN = {"trunk": "encoder", "n_layers": 6, "window": [None, 4, 4], "positions": {"name": "none"}}


def trunk_of(make_learner, **model):
    model, objective = MODERN | model, {"name": "mlm"}
    learner = make_learner(model, objective, document_mask=True, kernels=REFERENCE)
    return learner.trunk.train()


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_they_are_found_once_for_all_layers_and_their_backward_passes(
    make_learner, counted, reader, recompute
):
    trunk = trunk_of(make_learner)
    (stack,) = trunk.stacks
    stack.recompute = recompute
    out = hidden(trunk, packed())
    assert len(counted) == 1
    assert len(reader) == 6 and all(ranges is reader[0] for ranges in reader)
    assert torch.equal(reader[0].queries, ranges_of(packed()).queries)
    out.sum().backward()
    assert len(counted) == 1 and all(ranges is reader[0] for ranges in reader)
    assert len(reader) == (6 if recompute == "none" else 12)
    hidden(trunk, packed())
    assert len(counted) == 2 and reader[-1] is not reader[0]


@pytest.mark.parametrize("share", [False, True])
def test_every_batch_finds_its_own(make_learner, counted, reader, share):
    trunk = trunk_of(make_learner, share_layers=share, window=[4])
    for seed, n_rows in enumerate((2, 3)):
        mask = packed(n_rows)
        hidden(trunk, mask, seed)
        assert torch.equal(reader[-1].keys, ranges_of(mask).keys)
        assert mask.ranges is None and len(counted) == seed + 1


def test_compiled_blocks_share_them_in_one_graph_a_kind(make_learner, counted, monkeypatch, graphs):
    kernel = candidates("attention")["reference"]
    monkeypatch.setattr(type(kernel), "reads_ranges", True, raising=False)
    trunk = trunk_of(make_learner)
    expected = hidden(trunk, packed())
    for block in trunk.blocks:
        block.compile()
    out = hidden(trunk, packed())
    out.sum().backward()
    assert torch.equal(out, expected)
    hidden(trunk, packed(), seed=1)
    assert len(counted) == 3  # with the one that was not compiled
    # Blocks that see all tokens and blocks with a window; each graph ran for every such block.
    assert (graphs.compiled, graphs.run) == (2, 2 * 6)


@pytest.mark.parametrize("field", ["documents", "key_documents", "order", "key_order"])
def test_numbers_that_change_in_place_bring_ranges_of_their_own(field):
    """As those of a buffer that every batch is copied into."""
    numbers = torch.arange(6).view(1, 6) // 4
    fields = {name: numbers for name in {field, field.removeprefix("key_")}}
    fields[field] = numbers.clone()
    before = with_ranges(Mask(**fields)).ranges
    fields[field].copy_(numbers.flip(1))
    found = with_ranges(Mask(**fields)).ranges
    allowed = Mask(**fields).dense(6, 6)[:, 0]
    assert torch.equal(found.keys, written_out(allowed))
    assert torch.equal(found.queries, written_out(allowed.transpose(1, 2)))
    assert not torch.equal(found.keys, before.keys)


def test_other_kernels_do_not_pay_for_them(make_learner, counted):
    hidden(trunk_of(make_learner), packed())
    assert counted == []


def test_the_kernels_that_read_them_say_so():
    readers = {n for n, k in candidates("attention").items() if getattr(k, "reads_ranges", False)}
    assert readers == {"triton", "triton_decode", "triton_tf32x3"}


def test_masks_without_numbers_have_none(make_learner, counted, reader):
    trunk = trunk_of(make_learner)
    mask = Mask(key_lengths=torch.tensor([12, 5], device=DEVICE))
    trunk(Inputs(tokens_BT=torch.zeros(2, 12, dtype=torch.int64, device=DEVICE), mask=mask))
    assert counted == [] and set(reader) == {None} and with_ranges(mask) is mask


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


def test_a_mask_made_from_one_with_ranges_brings_its_own_to_the_kernels():
    """Other documents, a slice of rows, more keys, another order, strict or not."""
    from nanolm.kernels.attention.call import Tensors, flatten

    n = 20
    halves = (torch.arange(n, device=DEVICE) >= 12).long()
    old = Mask(documents=halves.expand(2, n), order=torch.arange(n, device=DEVICE).expand(2, n))
    old = with_ranges(old)
    other = torch.stack([1 - halves, halves.flip(0)])
    made = (
        dataclasses.replace(old, documents=other, key_documents=1 - other),
        dataclasses.replace(old, key_documents=other),
        dataclasses.replace(old, order=old.order.flip(1), key_order=old.order),
        dataclasses.replace(old, strict=True),
        dataclasses.replace(old, documents=other[1:], order=old.order[1:]),
        dataclasses.replace(
            old,
            key_documents=torch.nn.functional.pad(old.documents, (6, 0)),
            key_order=torch.nn.functional.pad(old.order, (6, 0)),
        ),
    )
    for number, mask in enumerate(made):
        n_keys = n if mask.key_order is None else mask.key_order.shape[1]
        n_rows = mask.order.shape[0]
        q, k = (torch.zeros(n_rows, m, 1, 16, device=DEVICE) for m in (n, n_keys))
        layers_own = mask.at(causal=True, window=5)
        flat = flatten(q, k, k, layers_own, None, scale=0.25, softcap=None)
        given = Tensors(*flat[3 : 3 + len(Tensors._fields)])
        allowed = mask.dense(n, n_keys, DEVICE)[:, 0].cpu()
        assert torch.equal(given.key_ranges.cpu(), written_out(allowed)), number
        right = written_out(allowed.transpose(1, 2))
        assert torch.equal(given.query_ranges.cpu(), right), number
