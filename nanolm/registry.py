"""Registry: names in a config become builders in code, and plug-ins add names of their own.

Each pluggable thing (objective, head, position encoding, optimizer, kernel, data source, …) has one
`Registry`. A decorator adds an entry together with its *options dataclass*, so that the keys of a
plug-in are typed, documented and refused exactly like the built-in ones:

    @OBJECTIVES.register("clm", options=CausalOptions)
    class CausalObjective: ...

Checkpoints and configs store these names, never import paths.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from nanolm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every options dataclass: the registered name that chooses it."""

    name: str
    """Which registered implementation to use."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a registry knows of one name: what builds it, and the dataclass of its options."""

    name: str
    build: Any
    """A function, or a class whose attributes are read too."""
    options: type[Options] | None
    variants: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What builds it instead in some cases, by the case's name; see `register_variant`."""

    def builder(self, case: str) -> Any:
        """What builds it in this case."""
        return self.variants.get(case, self.build)


class Registry:
    """A table of named builders of one kind; duplicates and unknown names raise.

    `kind` is the word that error messages use, e.g. "objective"; `opens` are modules that are
    imported when the registry is first asked, and that register what is built in.
    """

    def __init__(self, kind: str, opens: tuple[str, ...] = ()) -> None:
        self.kind, self.opens = kind, opens
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, options: type[Options] | None = None) -> Callable:
        """Decorator that adds a builder (class or function) under `name`.

        Raises ValueError when the name is taken or the options' default name differs from it.
        """

        def add(build: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                taken = self._entries[name].build
                raise ValueError(
                    f"{self.kind} {name!r} is registered already, by {taken.__module__}"
                )
            default = dataclasses.fields(options)[0].default if options else name
            if options and default != name:
                raise ValueError(f"{options.__name__}.name must default to {name!r}")
            self._entries[name] = Entry(name, build, options)
            return build

        return add

    def register_variant(self, name: str, case: str) -> Callable:
        """Decorator that adds the builder which takes over from that of `name` in one case; the
        case of an objective is its trunk.

        Raises ValueError when nothing is registered as `name`, or the case is taken.
        """

        def add(build: Callable[..., Any]) -> Callable[..., Any]:
            entry = self._entries.get(name)
            if entry is None or case in entry.variants:
                why = "is not registered" if entry is None else f"has a variant for {case} already"
                raise ValueError(f"{self.kind} {name!r} {why}")
            entry.variants[case] = build
            return build

        return add

    def holder(self, name: str) -> Entry | None:
        """Who has registered this name so far; nothing is imported for the answer."""
        return self._entries.get(name)

    def get(self, name: str) -> Entry:
        """The entry of `name`; raises UserError listing the choices when there is none."""
        if name not in self.names():
            raise UserError(
                f"unknown {self.kind} {name!r}; choose from {', '.join(self.names())}, "
                f"or name the plug-in that registers it under `plugins:`"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, in alphabetical order."""
        for module in self.opens:
            importlib.import_module(module)
        return sorted(self._entries)


BUILT_IN = ("nanolm.built_in",)
TRUNKS = Registry("trunk", opens=BUILT_IN)
POSITIONS = Registry("position encoding", opens=BUILT_IN)
OBJECTIVES = Registry("objective", opens=BUILT_IN)
HEADS = Registry("head", opens=BUILT_IN)
OPTIMIZERS = Registry("optimizer", opens=BUILT_IN)
SCHEDULES = Registry("learning-rate schedule", opens=BUILT_IN)
RULES = Registry("gradient rule", opens=BUILT_IN)
PEFT = Registry("PEFT method", opens=BUILT_IN)

OPS = (
    "attention",
    "linear",
    "linear_cross_entropy",
    "norm",
    "rotary",
    "glu",
    "symmetric_product",
)
"""What can be fused (see ops/contract.py)."""
TIMED = ("attention",)
"""Ops whose kernel `fastest` chooses by what was timed (see ops/chooser.py)."""
SIZED = ("symmetric_product",)
"""Ops of which `auto` takes, size by size, what was timed to be fastest (see ops/by_time.py)."""

# Apart from what is built in besides: they bring Triton, which only a model's kernels need.
KERNEL_MODULES = (
    "nanolm.ops.reference",
    "nanolm.ops.pytorch",
    "nanolm.ops.flex",
    "nanolm.ops.chunked_cross_entropy",
    "nanolm.ops.cpu_bf16",
    "nanolm.ops.cpu_by_length",
    "nanolm.kernels.candidates",
)
KERNELS = {op: Registry(f"{op} kernel", opens=KERNEL_MODULES) for op in OPS}
"""The kernels of each op."""
