"""Parameter-efficient fine-tuning (PEFT): a pass over the built learner, before it is wrapped.

    build learner -> load the base's weights -> attach(learner, options) -> Engine, optimizers

The pass freezes every weight, then puts small trainable ones in: it replaces named modules (a
Linear by one with low-rank matrices beside it), or adds hooks. The layers know nothing of it. Names
of the base's weights do not change, because a replacement takes them over. What the pass did is
written down in `learner.adapter`, from which follow checkpoints (only the small weights are saved),
`detach` (another adapter on the same base) and `merge`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanolm.errors import UserError
from nanolm.learner import Adapter, Learner
from nanolm.model.layers import Linear
from nanolm.registry import PEFT, Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftOptions(Options):
    """What every PEFT method has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPeftOptions(Options):
    """No adapter: the weights themselves are trained."""

    name: str = "none"


@PEFT.register("none", options=NoPeftOptions)
def no_peft(options: NoPeftOptions, learner: Learner, adapter: Adapter) -> None:
    """Nothing to do; `attach` is never called with it."""


def attach(
    learner: Learner,
    options: Options,
    *,
    heads: Iterable[str] = (),
    seed: int = 0,
    base: str | None = None,
) -> Adapter:
    """Freezes the learner, puts the named method's weights in, and trains these heads whole.

    New weights are drawn from `seed` on the CPU; `base` is where the frozen weights came from.
    Raises UserError when the method cannot go with the model, or an adapter is attached already.
    """
    if learner.adapter is not None:
        raise UserError(f"an adapter ({learner.adapter.options.name}) is attached; detach it first")
    adapter = Adapter(options, heads, base, base_hash(learner))
    before = {name for name, _ in learner.named_buffers()}
    trainable = [p for p in learner.parameters() if p.requires_grad]
    adapter.undo.append(lambda: [p.requires_grad_(True) for p in trainable])
    learner.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        PEFT.get(options.name).build(options, learner, adapter)
    trunk = {id(p) for p in learner.trunk.parameters()}
    for name in adapter.heads:
        adapter.train(p for p in learner.heads[name].parameters() if id(p) not in trunk)
    like = learner.trunk.embedding.weight
    learner.to(like.device, like.dtype).train(learner.training)
    persistent = set(learner.state_dict())
    buffers = [n for n, _ in learner.named_buffers() if n not in before and n in persistent]
    adapter.names = (*(n for n, p in learner.named_parameters() if p.requires_grad), *buffers)
    learner.adapter = adapter
    return adapter


def detach(learner: Learner) -> None:
    """Takes the adapter out: the learner is the base again, bit by bit, all of it trainable."""
    adapter = learner.adapter
    if adapter is None:
        return
    for parent, name, module in reversed(adapter.replaced):
        setattr(parent, name, module)
    for undo in reversed(adapter.undo):
        undo()
    remove_added(adapter)
    learner.adapter = None


def remove_added(adapter: Adapter) -> None:
    """Takes away the modules that the pass gave to others."""
    for parent, name in adapter.added:
        delattr(parent, name)


def merge(learner: Learner) -> None:
    """Folds the adapter into the base's weights: the same function, without an adapter.

    Raises UserError for a method that is no change of weights.
    """
    adapter = learner.adapter
    if adapter is None:
        raise UserError("there is no adapter to merge")
    name = adapter.options.name
    stays = bool(adapter.names) and (adapter.replaced or name == "bitfit")
    if not stays or not all(hasattr(getattr(p, n), "merged") for p, n, _ in adapter.replaced):
        raise UserError(f"peft={name} is no change of weights: it cannot be merged, keep the base")
    for parent, attribute, _ in adapter.replaced:
        setattr(parent, attribute, getattr(parent, attribute).merged())
    remove_added(adapter)
    learner.requires_grad_(True)
    learner.adapter = None


def base_hash(learner: Learner) -> str:
    """SHA-256 of the trunk's weights, by name: which base an adapter belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(learner.trunk.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def trainable_counts(learner: nn.Module) -> tuple[int, int]:
    """(numbers that are trained, numbers in all)."""
    sizes = [(p.requires_grad, p.numel()) for p in learner.parameters()]
    return sum(n for trained, n in sizes if trained), sum(n for _, n in sizes)


# What most methods share: places in the blocks, and taking over a Linear.


class Adopted(Linear):
    """A Linear that took over another's weight, bias and kernel: same names, same result."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.kernel = cast(Linear, base).kernel
        self.base = (base,)  # in a tuple, so that it is no child of this module

    def fold(self, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
        """The plain Linear again, with this weight, and this bias when one is given."""
        base = self.base[0]
        with torch.no_grad():
            base.weight.copy_(weight)
            if bias is not None:
                base.bias.copy_(bias)
        return base


def rows_of(block: Any) -> dict[tuple[str, str], dict[str, int]]:
    """{(sub-layer, its Linear): {part: number of output rows}} of one block, in their order.

    Queries, keys and values share one Linear, and so do a gate and what it gates.
    """
    attention, forward = block.attention, block.feed_forward
    n_query = attention.n_heads * attention.head_dim
    n_kv = attention.n_kv_heads * attention.head_dim
    rows = {
        ("attention", "qkv"): {"q": n_query, "k": n_kv, "v": n_kv},
        ("attention", "out"): {"out": attention.out.out_features},
    }
    if hasattr(forward, "gate_up"):
        half = forward.gate_up.out_features // 2
        rows["feed_forward", "gate_up"] = {"gate": half, "up": half}
    else:
        rows["feed_forward", "up"] = {"up": forward.up.out_features}
    rows["feed_forward", "down"] = {"down": forward.down.out_features}
    return rows


def linears(
    learner: Learner, targets: Iterable[str]
) -> Iterator[tuple[nn.Module, str, dict[str, int], list[str]]]:
    """(parent, name, parts, chosen parts) of every Linear of the blocks that `targets` names.

    A target is a part (q, k, v, out, gate, up, down) or a whole fused Linear (qkv, gate_up), whose
    rows then count as one part. Raises UserError for a target that the model lacks.
    """
    targets = list(targets)
    known: set[str] = set()
    found = []
    for block in learner.trunk.blocks:
        for (sublayer, name), parts in rows_of(block).items():
            known |= {name, *parts}
            if name in targets:
                parts = {name: sum(parts.values())}
            chosen = [part for part in parts if part in targets]
            if chosen:
                found.append((getattr(block, sublayer), name, parts, chosen))
    for target in targets:
        if target not in known:
            raise UserError(
                f"peft.targets has {target}, which this model lacks; there are "
                f"{', '.join(sorted(known))}"
            )
    yield from found
