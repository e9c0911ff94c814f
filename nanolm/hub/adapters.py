"""Low-rank changes of weights as `peft` names them and as we do, one table for both directions.

A family that keeps queries, keys and values apart has a module for each of our parts. One that
fuses them (GPT-2's c_attn, ModernBERT's Wqkv) has one, with one A for all its rows; changes of
several parts become one of a higher rank, which computes the same:

    A = [A_q; A_v]        B = [[B_q, 0], [0, 0], [0, B_v]]        (rows of q, k, v)

The way back gives one change to the whole of our fused weight.

Shapes: A [r, n_in], B [n_out, r], a magnitude of DoRA [n_out].
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from nanolm.config.model import ModelConfig
from nanolm.errors import UserError, require
from nanolm.hub.families import Family
from nanolm.hub.families.base import attention_rows, gate_rows
from nanolm.hub.keys import Tensors
from nanolm.hub.published import shape, spellings

FUSED: dict[str, tuple[tuple[str, ...], Callable[[ModelConfig], list[int]]]] = {
    "qkv": (("q", "k", "v"), attention_rows),
    "gate_up": (("gate", "up"), gate_rows),
}
"""The parts of our fused weights, and how many rows each has."""
SUBLAYERS = ("attention", "feed_forward")
LINEARS = ("qkv", "out", "gate_up", "up", "down")


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of one weight: scale * B A, and with DoRA the length of each row of the sum."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def tensors(self) -> Tensors:
        """Its tensors by the letters that both sides know."""
        found = {"a": self.a, "b": self.b}
        return found if self.magnitude is None else found | {"magnitude": self.magnitude}


@dataclasses.dataclass(frozen=True)
class Place:
    """A weight of the blocks that an adapter may change: one of ours, one or several of theirs."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows of each of our parts, where there are several."""

    @property
    def linear(self) -> str:
        """What our weight is called in its sublayer."""
        return self.ours.rpartition(".")[2]

    @property
    def parts(self) -> tuple[str, ...]:
        """What our targets call the parts of it."""
        return FUSED[self.linear][0] if self.linear in FUSED else (self.linear,)

    @property
    def apart(self) -> bool:
        """Whether theirs are several modules, one for each of our parts."""
        return len(self.theirs) > 1


def places(family: Family, model: ModelConfig) -> Iterator[Place]:
    """Every weight of the blocks that our low-rank methods reach."""
    for rule in family.table.rules(model):
        sublayer, linear, kind = rule.ours.split(".")[-3:]
        if kind != "weight" or sublayer not in SUBLAYERS or linear not in LINEARS:
            continue
        rows = FUSED[linear][1](model) if linear in FUSED else ()
        modules = tuple(name.removesuffix(".weight") for name in rule.theirs)
        yield Place(rule.ours.removesuffix(".weight"), modules, tuple(rows))


def to_theirs(
    family: Family, model: ModelConfig, adapter: Mapping[str, Tensor], scale: float, base: Tensors
) -> dict[str, Change]:
    """Our adapter's tensors as changes by their modules; `base` are the learner's own weights."""
    found: dict[str, Change] = {}
    for place in places(family, model):
        own = own_changes(place, adapter, scale)
        if not own:
            continue
        if place.linear in own and place.apart:  # one A for rows that are three modules there
            own = dict(zip(place.parts, divided(own[place.linear], place.rows), strict=True))
        if place.apart:
            named = dict(zip(place.parts, place.theirs, strict=True))
            found |= {named[part]: change for part, change in own.items()}
        elif place.linear in own:
            found[place.theirs[0]] = own[place.linear]
        else:
            weight = base[f"{place.ours}.weight"]
            found[place.theirs[0]] = together(own, place, weight)
    return found


def own_changes(place: Place, adapter: Mapping[str, Tensor], scale: float) -> dict[str, Change]:
    """The changes that our adapter makes in one place, by part."""
    found = {}
    for part in dict.fromkeys((place.linear, *place.parts)):
        a = adapter.get(f"{place.ours}.lora.{part}.a")
        b = adapter.get(f"{place.ours}.lora.{part}.b")
        if a is not None and b is not None:
            found[part] = Change(a, b, scale, adapter.get(f"{place.ours}.magnitude.{part}"))
    return found


def divided(change: Change, rows: tuple[int, ...]) -> Iterator[Change]:
    """A change of several modules' rows as one of each module, all with the same A."""
    pieces = change.b.split(rows)
    whole = change.magnitude
    magnitudes = [None] * len(rows) if whole is None else whole.split(rows)
    for b, magnitude in zip(pieces, magnitudes, strict=True):
        yield dataclasses.replace(change, b=b, magnitude=magnitude)


def together(own: Mapping[str, Change], place: Place, weight: Tensor) -> Change:
    """Changes of parts as one of the whole weight, of the sum of their ranks."""
    chosen = [part for part in place.parts if part in own]
    rank = sum(len(own[part].a) for part in chosen)
    blocks, magnitudes, column = [], [], 0
    for part, rows_ND in zip(place.parts, weight.split(place.rows), strict=True):
        block = weight.new_zeros(len(rows_ND), rank)
        if part in own:
            width = own[part].b.shape[1]
            block[:, column : column + width] = own[part].b
            column += width
        blocks.append(block)
        # A row that is not changed keeps its length.
        length = own[part].magnitude if part in own else rows_ND.norm(dim=1)
        magnitudes.append(length)
    dora = own[chosen[0]].magnitude is not None
    return Change(
        torch.cat([own[part].a for part in chosen]),
        torch.cat(blocks),
        own[chosen[0]].scale,
        torch.cat([each for each in magnitudes if each is not None]) if dora else None,
    )


@dataclasses.dataclass(frozen=True)
class Ours:
    """An adapter of theirs as one of ours: what it changes, and its tensors under our names."""

    targets: tuple[str, ...]
    rank: int
    scale: float
    dora: bool
    tensors: Tensors


def to_ours(
    family: Family, model: ModelConfig, changes: Mapping[str, Change], base: Tensors, what: str
) -> Ours:
    """Changes by their modules as an adapter of ours; `base` are the learner's own weights, and
    `what` names the file.

    Raises UserError for a module that nanolm does not change, for one that is changed in some
    layers only, and for modules of different ranks or scales.
    """
    # A family's table has the rules of all its models: T5's feed-forward is gated or not.
    found = [place for place in places(family, model) if f"{place.ours}.weight" in base]
    known = {module: place for place in found for module in place.theirs}
    named = {by_name(module, known, family, what): change for module, change in changes.items()}
    tensors: Tensors = {}
    counted: Counter[str] = Counter()
    for place in found:
        names = place.parts if place.apart else (place.linear,)
        for part, module in zip(names, place.theirs, strict=True):
            if module in named:
                tensors |= our_names(place, part, named[module])
                counted[part] += 1
    every = Counter(
        part for place in found for part in (place.parts if place.apart else (place.linear,))
    )
    some = next((part for part in counted if counted[part] != every[part]), None)
    if some is not None:
        raise UserError(
            f"{what} changes {some} in {counted[some]} of {every[some]} layers, and nanolm changes "
            f"a weight in all layers or in none; choose an adapter without layers_to_transform"
        )
    first = next(iter(changes.values()))
    kinds = {(len(c.a), round(c.scale, 9), c.magnitude is not None) for c in changes.values()}
    require(
        len(kinds) == 1,
        f"{what} has changes of several ranks or scales (rank_pattern, alpha_pattern), and nanolm "
        f"has one of each for all weights; merge it into its base with peft (merge_and_unload) and "
        f"import that model",
    )
    dora = first.magnitude is not None
    return Ours(tuple(counted), len(first.a), first.scale, dora, tensors)


def by_name(module: str, known: Mapping[str, Place], family: Family, what: str) -> str:
    """The module under the family's own name; some files leave its prefix out."""
    for name in spellings(module, family.prefix):
        if name in known:
            return name
    raise UserError(
        f"{what} changes {module}, which nanolm does not change in a {family.name}; merge it into "
        f"its base with peft (merge_and_unload) and import that model"
    )


def our_names(place: Place, part: str, change: Change) -> Tensors:
    """A change's tensors as our adapter names them."""
    found = {f"{place.ours}.lora.{part}.{letter}": getattr(change, letter) for letter in "ab"}
    if change.magnitude is not None:
        found[f"{place.ours}.magnitude.{part}"] = change.magnitude
    return found


def require_shapes(wanted: Tensors, found: Tensors, what: str) -> None:
    """Raises UserError for a tensor that does not fit the base."""
    for name, tensor in found.items():
        require(
            name in wanted and wanted[name].shape == tensor.shape,
            f"{what} has {shape(tensor)} for {name}, and on this base it is "
            f"{shape(wanted[name]) if name in wanted else 'nothing'}; name the base that the "
            f"adapter was trained on",
        )


def suffixes(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest ends of the wanted modules' names that no other module's name has.

    `peft` changes every module whose name is one of them, or ends with a point and one of them.
    """
    wanted, others = list(wanted), set(others) - set(wanted)
    ends = Counter(end for name in others for end in ends_of(name))
    return sorted({next(end for end in ends_of(name) if not ends[end]) for name in wanted})


def ends_of(name: str) -> list[str]:
    """The ends of a name at its points, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
