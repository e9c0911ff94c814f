"""Dropout of the Triton attention: which entries it keeps, and the same ones in every kernel."""

import functools

import numpy as np
import pytest
import torch

from nanolm.ops.bias import BucketBias, DenseBias
from nanolm.ops.contract import candidates
from nanolm.ops.masks import Mask
from nanolm.tools.kernel_check.trial import distance, reference
from tests.kernel_tools.philox import decisions, keep_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 12345678901  # more than 32 bits


@pytest.fixture(autouse=True)
def tiles_of_every_shape(monkeypatch):
    """Every kernel in tiles of its own: what is kept must not depend on them."""
    from nanolm.kernels import launch

    shapes = {"forward": (16, 32), "key_value": (32, 16), "query": (16, 16), "bias": (16, 16)}
    for kind, shape in shapes.items():
        monkeypatch.setitem(launch.INTERPRETER, kind, launch.Launch(*shape))


def attend(*given, mask=None, **options):
    return candidates("attention")["triton"].run(*given, mask or Mask(), **options)


def seed_of(number):
    return torch.tensor([number], device=DEVICE)


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


def kept(p, n_rows, n_heads, n_queries, n_keys, seed=SEED):
    """bool [B, H, T, S], read out of the kernel: all weights are alike, and value s is the unit
    vector s, so that feature s of the output says whether the weight on key s was kept."""
    q = torch.zeros(n_rows, n_queries, n_heads, n_keys, device=DEVICE)
    k = torch.zeros(n_rows, n_keys, n_heads, n_keys, device=DEVICE)
    v = torch.eye(n_keys, device=DEVICE)[:, None].expand_as(k).contiguous()
    out = attend(q, k, v, scale=1.0, dropout=p, seed=seed_of(seed))
    scale = 0.0 if p == 1 else 1 / (1 - p) / n_keys
    assert torch.allclose(out[out != 0], torch.tensor(scale, device=DEVICE), rtol=1e-5)
    return (out != 0).permute(0, 2, 1, 3).cpu().numpy()


SHAPES = [(1, 1, 70, 19), (2, 3, 5, 100)]
SEEDS = [0, 2**32, SEED, 2**62 - 1]


@pytest.mark.parametrize(
    ("shape", "seed"),
    [*((shape, SEED) for shape in SHAPES), *(((1, 2, 33, 48), seed) for seed in SEEDS)],
)
def test_the_kernel_keeps_what_the_definition_says(shape, seed):
    """Bit for bit, past the first tiles of both axes, for rows and heads, and all 64 seed bits."""
    assert np.array_equal(kept(0.3, *shape, seed=seed), keep_mask(seed, 0.3, shape))


def test_the_threshold_itself_is_kept_and_what_is_below_it_is_not():
    """A decision of 16 bits is dropped when it is below p * 2^16, rounded: p is put beside one."""
    shape = (1, 1, 16, 32)
    numbers = decisions(SEED, shape)
    at = (0, 0, 9, 21)
    own = int(numbers[at])
    assert 0 < own < 2**16 - 1
    assert kept((own + 0.3) / 2**16, *shape)[at]
    assert not kept((own + 0.7) / 2**16, *shape)[at]


BIASES = {
    "none": lambda: None,
    "dense": lambda: DenseBias(normal(1, 1, 20, 24, seed=5)),
    "bucket": lambda: BucketBias(normal(12, 4, seed=5), True, 30),
}


@pytest.mark.parametrize("bias", BIASES)
def test_every_gradient_is_that_of_what_the_forward_pass_kept(bias):
    """Of q, k, v and the bias: each has a kernel of its own, in tiles of its own."""
    n_heads, n_groups = 4, 2
    q = normal(2, 20, n_heads, 16, seed=1)
    k, v = (normal(2, 24, n_groups, 16, seed=seed) for seed in (2, 3))
    added = BIASES[bias]()
    options = {"bias": added, "scale": 0.25}
    out = attend(q, k, v, mask=Mask(causal=True), dropout=0.3, seed=seed_of(SEED), **options)
    weights, _ = reference("attention").weights(
        q.double(), k.double(), Mask(causal=True), softcap=None, **options
    )
    keep = torch.from_numpy(keep_mask(SEED, 0.3, tuple(weights.shape))).to(DEVICE)
    dropped = torch.where(keep, weights / 0.7, 0.0)
    values = v.double().transpose(1, 2).repeat_interleave(n_heads // n_groups, dim=1)
    expected = (dropped @ values).transpose(1, 2)
    assert distance(out, expected) < 1e-5
    leaves = [q, k, v, *(x for x in vars(added or object).values() if torch.is_tensor(x))]
    assert len(leaves) == 3 + (bias != "none")
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    gradients = functools.partial(torch.autograd.grad, inputs=leaves)
    actual, wanted = gradients((out * incoming).sum()), gradients((expected * incoming).sum())
    assert max(map(distance, actual, wanted)) < 1e-5


def test_torch_seeds_it():
    q, k, v = (normal(1, 20, 1, 16, seed=seed) for seed in range(3))
    run = functools.partial(attend, q, k, v, scale=0.25, dropout=0.3)
    torch.manual_seed(3)
    once = run()
    torch.manual_seed(3)
    assert torch.equal(once, run()) and not torch.equal(once, run())


def alike(one, other):
    """By how many standard deviations two masks of a half agree more, or less, than by chance."""
    return abs((one == other).mean() - 0.5) / (0.25 / one.size) ** 0.5


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.1, 0.5, 0.999, 1.0])
def test_it_drops_as_many_as_it_should(p):
    keep = keep_mask(987654321, p, (2, 3, 64, 96)).astype(float)
    assert abs(keep.mean() - (1 - p)) <= 5 * (p * (1 - p) / keep.size) ** 0.5
    for axes in [(1, 2, 3), (0, 2, 3)]:  # of every row and head alone
        parts = keep.mean(axis=axes)
        deviation = (p * (1 - p) * parts.size / keep.size) ** 0.5
        assert (abs(parts - (1 - p)) <= 5 * deviation).all()


def test_no_two_entries_near_each_other_go_together():
    """Eight decisions come from one Philox call, and its counter has four parts: neighbours, other
    words, other halves, rows, heads and seeds must not share a decision."""
    keep = keep_mask(987654321, 0.5, (2, 3, 64, 96))
    steps = [(0, 1), (0, 2), (0, 8), (0, 9), (0, 16), (0, 32), (0, 64)]
    steps += [(1, 0), (8, 0), (16, 0), (32, 0), (8, 8), (8, 1), (16, 16)]
    for t, s in steps:
        assert alike(keep[:, :, t:, s:], keep[:, :, : 64 - t, : 96 - s]) <= 5, (t, s)
    assert alike(keep[0], keep[1]) <= 5
    assert alike(keep[:, 0], keep[:, 1]) <= 5 and alike(keep[:, 1], keep[:, 2]) <= 5
    assert alike(keep[1, 0], keep[0, 1]) <= 5
    assert alike(keep[0, 0, :, :64], keep[0, 0, :, :64].T) <= 6  # half of the pairs stand twice
    for other in (987654322, 987654321 + 2**32, 987654321 << 8):
        assert alike(keep, keep_mask(other, 0.5, (2, 3, 64, 96))) <= 5, other
