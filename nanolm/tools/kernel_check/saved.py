"""What a forward pass of attention keeps for the backward one, in bytes."""

from __future__ import annotations

from typing import Any

import torch

from nanolm.tools.kernel_check.attention_cases import Case
from nanolm.tools.kernel_check.attention_trials import trial_of


def what_is_saved(kernel: Any, case: Case, device: str) -> str:
    """A sentence: the bytes saved beside those of q, k, v, out and lse, and whether it keeps
    [T, S] weights."""
    trial = trial_of(case, device)
    leaves = {name: x.detach().requires_grad_() for name, x in trial.leaves.items()}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        trial.run(kernel, leaves)
    n_bytes = sum(saved.values())
    needed = sum(x.untyped_storage().nbytes() for x in leaves.values()) * 4 // 3
    needed += case.n_heads * case.n_queries * 4
    words = f"{n_bytes} bytes saved, {needed} for q, k, v, out and lse"
    quadratic = case.n_heads * case.n_queries * case.n_keys * 4
    return f"{words}: it keeps [T, S] weights" if n_bytes >= needed + quadratic else words
