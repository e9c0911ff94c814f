"""De-duplication against a set in memory, and splits that depend on nothing but the text."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.data.prepare.dedup import find_duplicates, kept, partition_count
from nanolm.data.prepare.split import TEST, TRAIN, VAL, choose_split, hash_range
from nanolm.data.prepare.spool import KEY, Unit


def write_units(folder, digests: list[list[int]]) -> list[Unit]:
    units = []
    for index, values in enumerate(digests):
        unit = Unit(index, folder / f"u{index}", (), 0)
        table = np.zeros(len(values), KEY)
        # The high half decides the partition; equal high halves must not make equal documents.
        table["high"] = np.array([v // 4 * (2**64 // 5) % 2**64 for v in values], np.uint64)
        table["low"] = np.array([v % 4 for v in values], np.uint64)
        table["document"] = np.arange(len(values))
        table["bytes"] = 10
        order = np.lexsort((table["document"], table["low"], table["high"]))
        np.save(unit.path(".keys.npy"), table[order])
        units.append(unit)
    return units


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    digests=st.lists(st.lists(st.integers(0, 19), max_size=15), min_size=1, max_size=4),
    partitions=st.integers(1, 7),
)
def test_the_first_in_input_order_stays_for_any_partitions(tmp_path_factory, digests, partitions):
    folder = tmp_path_factory.mktemp("dedup")
    units = write_units(folder, digests)
    files = [folder / f"d{index}.npy" for index in range(partitions)]
    results = [find_duplicates(units, i, partitions, file) for i, file in enumerate(files)]
    seen: set[int] = set()
    expected = [[not (v in seen or seen.add(v)) for v in values] for values in digests]
    found = [kept(unit, len(v), files).tolist() for unit, v in zip(units, digests, strict=True)]
    assert found == expected
    repeats = sum(not stays for unit in expected for stays in unit)
    assert sum(count for count, _ in results) == repeats
    assert sum(size for _, size in results) == 10 * repeats


def test_partitions_grow_with_the_corpus():
    assert partition_count(1000) == 1
    assert partition_count(10**10) * (1 << 28) >= 128 * 10**10


def test_splits_have_their_shares_and_follow_the_text():
    digests = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    split = choose_split([hash_range(digests, 7)], 0.1, 0.05, 7)
    where = split.of(digests)
    shares = [np.mean(where == name) for name in (TRAIN, VAL, TEST)]
    np.testing.assert_allclose(shares, [0.85, 0.1, 0.05], atol=0.005)
    order = np.random.default_rng(1).permutation(len(digests))
    np.testing.assert_array_equal(split.of(digests[order]), where[order])
    parts = [hash_range(part, 7) for part in np.array_split(digests, 9)]
    assert choose_split(parts, 0.1, 0.05, 7) == split
    other = choose_split([hash_range(digests, 8)], 0.1, 0.05, 8).of(digests)
    assert np.mean(other[where == VAL] == VAL) < 0.15


def test_a_split_that_was_asked_for_is_never_empty():
    for seed in range(20):
        digests = np.random.default_rng(seed).integers(0, 2**64, 5, dtype=np.uint64)
        where = choose_split([hash_range(digests, seed)], 0.01, 0.01, seed).of(digests)
        assert sorted(where.tolist()) == [TRAIN, TRAIN, TRAIN, VAL, TEST]
        where = choose_split([hash_range(digests, seed)], 0.0, 0.0, seed).of(digests)
        assert where.tolist() == [TRAIN] * 5
