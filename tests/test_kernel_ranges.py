"""Which tiles are visited, and which of them without a mask: `key_range` and `query_range` by
themselves, against the mask written out."""

import pytest
import torch

from nanolm.ops.masks import Mask

if torch.cuda.is_available():
    pytest.skip("ranges are read in the interpreter", allow_module_level=True)

LENGTHS = {"key_lengths": torch.tensor([37])}
MASKS = {
    "none": Mask(),
    "causal": Mask(causal=True),
    "lengths": Mask(**LENGTHS),
    "prefix": Mask(causal=True, prefix_lengths=torch.tensor([21])),
    **{f"window of {n}": Mask(window=n) for n in (1, 8, 9, 17, 25, 26, 40)},
    **{f"causal window of {n}": Mask(causal=True, window=n) for n in (1, 9, 17, 25, 40)},
}
SIZES = [(64, 64), (41, 64), (64, 41)]


def tiles(mask, n_queries, n_keys, m, n):
    """(any pair of the tile is allowed, all are) [query tiles, key tiles]; a pair outside counts
    as forbidden on the side that is walked along, and not at all on the other."""
    allowed = mask.dense(n_queries, n_keys)[0, 0]
    queries, keys = -(-n_queries // m) * m, -(-n_keys // n) * n

    def padded(inside, outside):
        whole = torch.full((queries, keys), outside)
        whole[:n_queries, :n_keys] = inside
        return whole.view(queries // m, m, keys // n, n)

    some = padded(allowed, False).any(3).any(1)
    return some, padded(allowed, True).all(3).all(1)


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "queries"])
@pytest.mark.parametrize("name", MASKS)
def test_ranges_are_those_of_the_mask(name, of_keys):
    """No tile with a pair to compute is left out, none beyond is visited, and none that needs no
    mask is computed with one, but for those that stick out of the matrix."""
    from tests.kernel_tools.range_probe import ranges_of

    mask = MASKS[name]
    for (n_queries, n_keys), (m, n) in zip(SIZES, ((8, 8), (8, 16), (16, 8)), strict=True):
        some, whole = tiles(mask, n_queries, n_keys, m, n)
        step, length = (n, n_keys) if of_keys else (m, n_queries)
        own = n_queries // m if of_keys else n_keys // n  # the last one may stick out
        if not of_keys:
            some, whole = some.T, whole.T
        told = ranges_of(mask, n_queries, n_keys, m, n, of_keys=of_keys)
        for program, (begin, full_begin, full_end, end) in enumerate(told):
            seen = some[program].nonzero().flatten()
            where = (n_queries, n_keys, program, told[program])
            if len(seen):
                assert begin == seen[0] * step, where
                assert -(-end // step) == seen[-1] + 1, where
            else:
                assert begin >= end, where
            within = whole[program] & (torch.arange(len(whole[program])) < length // step)
            right = set((within.nonzero().flatten() * step).tolist())
            assert set(range(full_begin, full_end, step)) <= right, where
            if program < own:
                assert set(range(full_begin, full_end, step)) == right, where
