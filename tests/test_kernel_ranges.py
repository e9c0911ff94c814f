"""Which tiles are visited, and which of them without a mask: `key_range` and `query_range` by
themselves, against the mask written out."""

import pytest
import torch

from nanolm.ops.masks import Mask, Ranges

if torch.cuda.is_available():
    pytest.skip("ranges are read in the interpreter", allow_module_level=True)

LENGTHS = {"key_lengths": torch.tensor([37])}
PREFIXES = (15, 16, 17, 21)
PACKED = torch.tensor([3] * 14 + [1] * 2 + [2] * 20 + [-1] * 9 + [7] * 19)[None]
MIXED = torch.arange(64)[None] * 5 % 11 // 3
ORDER = (torch.arange(64)[None] * 37 + 11) % 64
SOME = torch.tensor([[5, 5, 0, 2] * 16])


def numbered(documents=None, order=None, **more):
    """A mask of so many queries and keys, each side the first so many of these numbers."""

    def of(n_queries, n_keys):
        fields = {}
        for name, numbers in (("documents", documents), ("order", order)):
            if numbers is not None:
                fields |= {name: numbers[:, :n_queries], f"key_{name}": numbers[:, :n_keys]}
        return Mask(**fields, **more)

    return of


MASKS = {
    "none": Mask(),
    "causal": Mask(causal=True),
    # On a tile's last place, on its boundary and behind it.
    **{f"lengths of {n}": Mask(key_lengths=torch.tensor([n])) for n in (31, 32, 33, 37)},
    **{f"prefix of {n}": Mask(causal=True, prefix_lengths=torch.tensor([n])) for n in PREFIXES},
    **{f"window of {n}": Mask(window=n) for n in (1, 8, 9, 17, 25, 26, 40)},
    **{f"causal window of {n}": Mask(causal=True, window=n) for n in (1, 9, 17, 25, 40)},
    "documents": numbered(PACKED),
    "interleaved documents": numbered(MIXED),
    "order": numbered(order=ORDER),
    "strict order": numbered(order=ORDER, strict=True),
    "order with equals, strict": numbered(order=SOME, strict=True),
    "documents and order": numbered(PACKED, ORDER),
    "interleaved documents and order, strict": numbered(MIXED, ORDER, strict=True),
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

    for (n_queries, n_keys), (m, n) in zip(SIZES, ((8, 8), (8, 16), (16, 8)), strict=True):
        mask = MASKS[name]
        mask = mask if isinstance(mask, Mask) else mask(n_queries, n_keys)
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
            if mask.documents is not None or mask.order is not None:
                right = set()  # of numbers no tile is known to need no mask
            assert set(range(full_begin, full_end, step)) <= right, where
            if program < own:
                assert set(range(full_begin, full_end, step)) == right, where


OTHERS = {
    "window": {"window": 9},
    "causal window": {"causal": True, "window": 9},
    "causal": {"causal": True},
    "prefix": {"causal": True, "prefix_lengths": torch.tensor([21])},
    "lengths": LENGTHS,
}


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "queries"])
@pytest.mark.parametrize("name", OTHERS)
def test_beside_other_conditions_no_more_is_visited_than_by_a_scan(name, of_keys):
    """Documents that lie in one piece each, whatever their numbers, beside windows, lengths and
    prefixes: no wider than a program found that scanned the other side for the smallest and the
    largest document of its tile."""
    from tests.kernel_tools.range_probe import ranges_of

    step = 8
    bare, mask = Mask(**OTHERS[name]), Mask(documents=PACKED, **OTHERS[name])
    some, _ = tiles(mask, 64, 64, step, step)
    some = some if of_keys else some.T
    sides = (64, 64, step, step)
    without = ranges_of(bare, *sides, of_keys=of_keys)
    for program, (begin, _, _, end) in enumerate(ranges_of(mask, *sides, of_keys=of_keys)):
        visited = set(range(begin, end, step))
        assert {int(tile) * step for tile in some[program].nonzero()} <= visited, program
        mine = PACKED[0, program * step : (program + 1) * step]
        low, high = without[program][0], without[program][3]
        theirs = PACKED[0, low:high]
        match = ((theirs >= mine.min()) & (theirs <= mine.max())).nonzero().flatten().tolist()
        scanned = range((low + match[0]) // step * step, low + match[-1] + 1, step) if match else ()
        assert visited <= set(scanned), program


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "queries"])
def test_ranges_of_a_row_beyond_32_bits(of_keys):
    """The third row's begin behind 2^32 numbers, in memory that is not there."""
    from tests.kernel_tools.range_probe import ranges_of
    from tests.test_kernel_far import untouched

    n = 2**30 + 2**20
    ranges = untouched(4 * 3 * 2 * n, torch.int32).view(3, 2, n)
    ranges[2, :, :16] = torch.tensor([24, 40])[:, None]
    number = torch.zeros(1, 1, dtype=torch.int32)
    given = (ranges, None) if of_keys else (None, ranges)
    mask = Mask(documents=number).keeping(Ranges(*given))
    sizes = (n, 64) if of_keys else (64, n)
    told = ranges_of(mask, *sizes, 16, 16, of_keys=of_keys, batch=2, n_programs=1)
    assert told == [[16, 16, 16, 40]]
