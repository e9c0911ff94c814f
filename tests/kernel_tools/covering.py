"""A pairwise covering array of attention's features: every pair of two features' values occurs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from nanolm.tools.kernel_check.attention_cases import Case

AXES: dict[str, tuple] = {
    "causal": (False, True),
    "window": (None, 6),
    "lengths": (False, True),
    "documents": (False, True),
    "prefix": (False, True),
    "order": ("none", "loose", "strict"),
    "bias": ("none", "alibi", "bucket", "dense", "dense_by_head", "dense_by_row", "dense_all"),
    "softcap": (None, 3.0),
    "layout": ("contiguous", "heads_first", "sliced"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "sizes": ((29, 29), (13, 31), (31, 13)),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "width": (16, 24),
}


def pairwise(axes: dict[str, tuple], seed: int = 0) -> list[dict[str, Any]]:
    """A small set of rows in which every pair of values of every two axes occurs.

    Greedy: of some random completions of a pair not yet covered, the one that covers most others.
    """
    rng = np.random.default_rng(seed)
    names = list(axes)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    rows = []
    while missing:
        a, i, b, j = min(missing)
        best: list[int] = []
        covered: set = set()
        for _ in range(60):
            row = [int(rng.integers(len(axes[name]))) for name in names]
            row[a], row[b] = i, j
            pairs = {
                (x, row[x], y, row[y]) for x, y in itertools.combinations(range(len(row)), 2)
            } & missing
            if len(pairs) > len(covered):
                best, covered = row, pairs
        missing -= covered
        rows.append({name: axes[name][index] for name, index in zip(names, best, strict=True)})
    return rows


def covering_cases() -> list[Case]:
    """The pairwise covering array over AXES."""
    cases = []
    for row in pairwise(AXES):
        n_queries, n_keys = row.pop("sizes")
        n_heads, n_kv_heads = row.pop("heads")
        case = Case(
            n_queries=n_queries, n_keys=n_keys, n_heads=n_heads, n_kv_heads=n_kv_heads, **row
        )
        cases.append(case)
    return cases
