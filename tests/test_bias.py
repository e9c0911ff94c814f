"""Attention biases against their formulas, written entry by entry."""

import math

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from nanolm.model.positions import alibi_slopes
from nanolm.ops.bias import AlibiBias, BucketBias, DenseBias, distances


def test_distances_count_back_from_the_query_also_behind_a_cache():
    assert distances(2, 4, "cpu").tolist() == [[2, 1, 0, -1], [3, 2, 1, 0]]


def test_alibi_is_minus_slope_times_distance():
    bias = AlibiBias(torch.tensor([0.5, 0.25])).dense(2, 3)
    for h, slope in enumerate((0.5, 0.25)):
        for t in range(2):
            for s in range(3):
                assert bias[h, t, s] == -slope * abs(t + 1 - s)


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == alibi_slopes(8) + alibi_slopes(16)[::2][:4]  # as its code does


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_buckets_are_t5s(bidirectional, n_buckets, max_distance):
    distance = torch.arange(-300, 301)
    ours = BucketBias(torch.zeros(n_buckets, 1), bidirectional, max_distance).buckets(distance)
    theirs = T5Attention._relative_position_bucket(
        -distance,  # T5 counts key minus query
        bidirectional=bidirectional,
        num_buckets=n_buckets,
        max_distance=max_distance,
    )
    assert torch.equal(ours, theirs)
    assert ours.min() >= 0 and ours.max() < n_buckets


def test_bucket_bias_reads_the_table_and_gives_it_gradient():
    table = torch.randn(8, 3, requires_grad=True)
    bias = BucketBias(table, False, 16)
    dense = bias.dense(4, 4)
    assert dense.shape == (3, 4, 4)
    assert math.isclose(dense[1, 3, 1].item(), table[2, 1].item())
    dense.sum().backward()
    # Causal buckets: keys at or after the query share bucket 0 (4 + 6 pairs here).
    assert table.grad[:4, 0].tolist() == [10.0, 3.0, 2.0, 1.0]


def test_dense_bias_is_itself():
    values = torch.randn(1, 2, 3, 3)
    assert torch.equal(DenseBias(values).dense(3, 3), values)
