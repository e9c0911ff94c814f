"""Silent corruption: do all ranks still hold the same weights?

Replicated weights receive the same update on every rank, so their bits must agree; a flipped bit in
one rank's memory, or a kernel that is not deterministic, shows as another hash. Each tensor's hash
is the XOR of its bits (torch.hash_tensor), which any single flip changes.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from nanolm.distributed.world import World
from nanolm.errors import UserError


def compare_weights(learner: nn.Module, world: World, step: int) -> None:
    """Raises UserError, on every rank, naming the ranks that differ; collective."""
    with torch.no_grad():
        mine = {name: torch.hash_tensor(p).item() for name, p in learner.named_parameters()}
    ranks = world.gather(list(mine.values()))
    votes = Counter(map(tuple, ranks))
    if len(votes) == 1:
        return
    winner, count = votes.most_common(1)[0]
    odd = [rank for rank, hashes in enumerate(ranks) if tuple(hashes) != winner]
    names = list(mine)
    first = next(n for n, (a, b) in zip(names, zip(winner, ranks[odd[0]], strict=True)) if a != b)
    who = f"rank(s) {', '.join(map(str, odd))}" if count > 1 else "the ranks"
    raise UserError(
        f"after step {step} the weights of {who} differ from the others', {first} first: memory or "
        f"hardware is at fault; run again with --resume auto, on other machines if it comes back"
    )
