"""Mask leaks: what a query may not see must change neither its output nor its gradient.

For each kind of mask one query t is watched. Keys and values that the mask hides from it are
replaced by other numbers; then out_t, and the gradient of q_t when only out_t is asked for, must
stay what they were, bit by bit; and the hidden keys and values themselves must get no gradient.
(A kernel that says that its gradients vary keeps that of q_t to rounding: `varies_on`.)

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanolm.ops.contract import why_it_varies
from nanolm.tools.kernel_check.attention_cases import SINGLE, Case
from nanolm.tools.kernel_check.attention_trials import make_mask, random, spec_of, to_device
from nanolm.tools.kernel_check.trial import TOLERANCE, distance

KINDS = ("causal", "window", "lengths", "documents", "prefix", "order", "strict order")
NAMES = {"lengths": "key lengths (padding)", "prefix": "the prefix", "order": "the order"}


def watched(case: Case) -> tuple[int, int, Tensor]:
    """(row, query, bool [S] of the keys it may not see): the query that some keys are hidden from,
    and that sees some."""
    allowed = make_mask(case).dense(case.n_queries, case.n_keys)[:, 0]
    allowed = allowed.expand(case.n_rows, -1, -1)
    seen = allowed.sum(dim=-1)
    candidates = ((seen > 0) & (seen < case.n_keys)).nonzero()
    row, query = candidates[len(candidates) // 2].tolist()
    return row, query, ~allowed[row, query]


def probe(
    kernel: Any, case: Case, leaves: tuple[Tensor, Tensor, Tensor], at: tuple[int, int], device: str
) -> tuple[Tensor, ...]:
    """(out_t, and the gradients of q_t, k, v when out_t alone is summed)."""
    train = case.phase == "train" and kernel.why_not(spec_of(case, device)) is None
    q, k, v = (x.detach().to(device).requires_grad_(train) for x in leaves)
    mask = to_device(make_mask(case), device)
    out = kernel.run(q, k, v, mask, scale=case.width**-0.5)
    row, query = at
    if not train:
        return (out[row, query],)
    grads = torch.autograd.grad(out[row, query].square().sum(), (q, k, v))
    return out[row, query].detach(), grads[0][row, query], grads[1][row], grads[2][row]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order in which sums were taken."""
    return distance(a, b) < TOLERANCE[b.dtype]


def leak(kernel: Any, kind: str, device: str = "cpu", case: Case | None = None) -> str | None:
    """A sentence about how the kernel leaks through this kind of mask, or None; `case` is the
    kind's problem in a dtype and phase that the kernel serves."""
    case = case or SINGLE[kind]
    row, query, hidden = watched(case)
    sizes = (case.n_rows, case.n_keys, case.n_kv_heads, case.width)
    q = random((case.n_rows, case.n_queries, case.n_heads, case.width), case, 1)
    k, v = random(sizes, case, 2), random(sizes, case, 3)
    other_k, other_v = k.clone(), v.clone()
    other_k[row, hidden] += 3.0
    other_v[row, hidden] -= 2.0
    before = probe(kernel, case, (q, k, v), (row, query), device)
    after = probe(kernel, case, (q, other_k, other_v), (row, query), device)
    name = NAMES.get(kind, kind)
    if not torch.equal(before[0], after[0]):
        return f"it ignores {name}: keys that are hidden from a query change its output"
    if len(before) == 1:
        return None
    varies = why_it_varies(kernel, device) is not None
    if not (close if varies else torch.equal)(before[1], after[1]):
        return f"its backward pass ignores {name}: hidden keys change the gradient of a query"
    if any(grad[hidden].abs().max() > 0 for grad in before[2:]):
        return f"its backward pass ignores {name}: hidden keys get a gradient"
    return None
