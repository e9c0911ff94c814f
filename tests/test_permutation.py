"""Keyed permutation: a bijection, uniform enough, the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.data.permutation import Permutation, fold_key

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
KEYS = st.tuples(st.integers(0, 2**63), st.integers(0, 1000), st.integers(0, 1000))


@PROPERTY
@given(size=st.integers(1, 5000), key=KEYS)
def test_is_a_bijection_with_an_inverse(size, key):
    permutation = Permutation(size, key)
    images = permutation(np.arange(size))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))
    assert np.array_equal(permutation.inverse(images), np.arange(size))


@PROPERTY
@given(size=st.integers(1, 2**62), key=KEYS, seed=st.integers(0, 2**32))
def test_large_sizes_stay_inside_and_invert(size, key, seed):
    indices = np.random.default_rng(seed).integers(0, size, 64)
    permutation = Permutation(size, key)
    images = permutation(indices)
    assert images.min() >= 0 and images.max() < size
    assert np.array_equal(permutation.inverse(images), indices)
    assert permutation(indices[5]) == images[5]  # a scalar takes the same way as an array


@PROPERTY
@given(size=st.integers(100, 10**13), key=KEYS, other=KEYS)
def test_another_key_is_another_order(size, key, other):
    indices = np.arange(100)
    same = np.array_equal(Permutation(size, key)(indices), Permutation(size, other)(indices))
    assert same == (key == other)


def test_every_order_of_three_occurs_about_equally_often():
    orders = [tuple(Permutation(3, (0, 0, epoch))(np.arange(3))) for epoch in range(1800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    # 300 expected of each, standard deviation 16.
    assert counts.min() > 220 and counts.max() < 380


def test_images_and_neighbour_distances_look_uniform():
    size, cells = 10**12 + 39, 64
    images = Permutation(size, (1, 2, 3))(np.arange(64_000))
    for values in (images, np.diff(images) % size):
        counts = np.bincount(values * cells // size, minlength=cells)
        chi_square = ((counts - 1000) ** 2 / 1000).sum()
        assert 25 < chi_square < 120  # 63 degrees of freedom: 63 +- 11.2, five deviations


def test_order_is_pinned_for_every_platform():
    # A changed order would silently break every resumed run, so the bytes are written down here.
    assert fold_key(1, 2, 3) == 0xB2569FBF4ADAE1B8
    assert Permutation(10, (7,))(np.arange(10)).tolist() == [3, 7, 9, 8, 0, 4, 2, 5, 1, 6]
    large = Permutation(10**12, (7, 1, 0))(np.arange(3))
    assert large.tolist() == [83628669528, 327805028021, 922673778126]


def test_refuses_what_it_cannot_permute():
    for size in (0, -1, 2**62 + 1):
        with pytest.raises(ValueError, match="size"):
            Permutation(size, (0,))
    with pytest.raises(IndexError):
        Permutation(10, (0,))(np.array([10]))
    with pytest.raises(IndexError):
        Permutation(10, (0,))(np.array([-1]))
