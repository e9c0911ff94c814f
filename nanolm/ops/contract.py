"""The ops: what can be fused, as contracts that several kernels fulfil, and how one is chosen.

An op is a name (`registry.OPS` lists them). A *kernel* fulfils it: an object with

    name                      its registered name
    why_not(spec) -> str|None a reason in words why it cannot serve this spec, or None
    only_by_name_on           (optional) device types on which `auto` passes it over
    reads_ranges              (optional, attention) True: it wants Mask.ranges found once a batch
    varies_on                 (optional) {device type: why its gradients may differ from run to run}
    run(...)                  the computation, with the op's signature (see `ops/reference.py`)

A *spec* is what is known when the model is built: widths, masks that may occur, dtype, device and
phase. `choose` asks `why_not` once per layer kind and phase. A named kernel that cannot serve
raises with its reason; `auto` takes the first that can and logs which, and why the others could
not. Nothing falls back at run time, and no forward pass branches on a name.

Kernels register themselves; this module imports none of them. The registries of `KERNELS` do,
those of `kernels/` included, when a config or `auto` first asks for a kernel.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch

from nanolm.errors import UserError
from nanolm.registry import KERNELS, OPS

log = logging.getLogger(__name__)

Phase = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What every op knows at build time."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # a device type
    phase: Phase = "train"

    @property
    def size(self) -> str:
        """In words, of ops whose kernel is chosen size by size; else empty."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec(Spec):
    """One kind of attention layer in one phase."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    causal: bool = False
    window: int | None = None
    # Mask kinds that batches may bring (nanolm.ops.masks.KINDS); "length_groups" where they can
    # also tell documents by length (Mask.length_groups).
    masks: frozenset[str] = frozenset()
    bias: Literal["alibi", "learned_alibi", "bucket", "dense"] | None = None
    softcap: float | None = None
    dropout: float = 0.0
    cross: bool = False  # queries and keys come from different sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSpec(Spec):
    """x W^T + b."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropySpec(Spec):
    """The vocabulary projection with its loss."""

    width: int
    vocab_size: int
    bias: bool = False
    softcap: float | None = None
    z_loss: bool = False
    label_smoothing: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec(Spec):
    """A norm over the last axis."""

    kind: Literal["layernorm", "rmsnorm"]
    width: int
    bias: bool = False
    residual: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotarySpec(Spec):
    """Rotation of queries or keys by position."""

    head_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GluSpec(Spec):
    """act(gate) * up."""

    kind: Literal["swiglu", "geglu"]
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetricProductSpec(Spec):
    """x @ x.T, half of whose entries need no computing; Muon's x has no more rows than columns."""

    rows: int
    columns: int

    @property
    def size(self) -> str:
        """The matrix's size."""
        return f"{self.rows} x {self.columns}"


class Kernel(Protocol):
    """An implementation of one op."""

    name: str

    def why_not(self, spec: Any) -> str | None:
        """Why this kernel cannot serve the spec, in words, or None."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the op."""


# `auto` tries these first, in this order; plug-ins are taken only by name. Of the ops in
# registry.SIZED a run takes a later one where it was timed to be faster (see ops/by_time.py).
AUTO: dict[str, list[str]] = {
    "attention": ["triton_decode", "triton", "by_length", "wide", "sdpa", "reference"],
    "linear": ["wide", "reference"],
    "linear_cross_entropy": ["triton", "wide", "chunked", "reference"],
    "norm": ["triton", "torch", "reference"],
    "rotary": ["triton", "reference"],
    "glu": ["triton", "reference"],
    "symmetric_product": ["reference", "triton"],
}


def register_kernel(op: str, kernel_class: type) -> type:
    """Class decorator body: registers one instance of the class under its `name` for the op.

    Raises UserError for an op that does not exist, for a class that is no kernel, and for a name
    that is taken.
    """
    if op not in OPS:
        near = difflib.get_close_matches(op, OPS, n=1)
        choices = f"did you mean {near[0]}?" if near else f"choose from {', '.join(OPS)}"
        raise UserError(f"@kernel({op!r}): there is no op {op!r}; {choices}")
    kernel = instance(op, kernel_class)
    holder = KERNELS[op].holder(kernel.name)
    if holder is not None:
        taken = type(holder.build())
        raise UserError(
            f"@kernel({op!r}): the name {kernel.name!r} is taken, by {taken.__name__} of "
            f"{taken.__module__}; give {kernel_class.__name__} another"
        )
    KERNELS[op].register(kernel.name)(lambda: kernel)
    return kernel_class


def instance(op: str, kernel_class: type) -> Kernel:
    """An object of the class; raises UserError when it is not what the contract asks for."""
    words = f"@kernel({op!r}): {kernel_class.__name__}"
    try:
        kernel = kernel_class()
    except TypeError as error:
        raise UserError(f"{words} cannot be made without arguments: {error}") from error
    name = getattr(kernel, "name", None)
    if not isinstance(name, str) or not name:
        raise UserError(f"{words} has no `name`, the word that `kernels:` of a config takes")
    if name in ("auto", "fastest"):
        raise UserError(
            f"{words}: {name!r} is what `kernels:` says for any kernel; take another name"
        )
    for method in ("why_not", "run"):
        if not callable(getattr(kernel, method, None)):
            raise UserError(f"{words} {name!r} has no method {method}; see kernels/README.md")
    reasons = getattr(kernel, "varies_on", {})
    if not isinstance(reasons, Mapping) or not all(
        isinstance(word, str) and word.strip() for pair in reasons.items() for word in pair
    ):
        raise UserError(
            f'{words} {name!r}: varies_on is {{"cuda": "why its gradients vary there"}}, a device '
            f"type and a sentence, not {reasons!r}"
        )
    return kernel


def why_it_varies(kernel: Kernel, device: str) -> str | None:
    """Why a kernel's gradients may differ from run to run on a device type, as it says itself; None
    for one that promises the same bits."""
    return getattr(kernel, "varies_on", {}).get(device)


def kernel(op: str) -> Any:
    """Decorator: `@kernel("attention")` registers the class as a kernel of that op."""
    return lambda kernel_class: register_kernel(op, kernel_class)


def candidates(op: str) -> dict[str, Kernel]:
    """All kernels of the op that are registered, the built-in ones imported."""
    return {name: KERNELS[op].get(name).build() for name in KERNELS[op].names()}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel serves a spec, and why the ones before it in `auto` order do not."""

    op: str
    spec: Spec
    kernel: Kernel
    refused: dict[str, str]


def passed_over(kernel: Kernel, spec: Spec) -> str | None:
    """Why `auto` does not take a kernel for the spec, or None."""
    reason = kernel.why_not(spec)
    if reason is None and spec.device in getattr(kernel, "only_by_name_on", ()):
        return f"on {spec.device} it serves only when it is named"
    return reason


def choose(op: str, spec: Spec, requested: str = "auto") -> Choice:
    """The kernel for one layer kind and phase.

    Raises UserError when the named kernel cannot serve the spec, with its reason, or when no
    kernel of `auto` can.
    """
    known = candidates(op)
    if requested != "auto":
        KERNELS[op].get(requested)
        reason = known[requested].why_not(spec)
        if reason is not None:
            raise UserError(f"kernels.{op}={requested} cannot serve this model: {reason}")
        return Choice(op, spec, known[requested], {})
    refused: dict[str, str] = {}
    for name in AUTO[op]:
        if name not in known:
            continue
        reason = passed_over(known[name], spec)
        if reason is None:
            return Choice(op, spec, known[name], refused)
        refused[name] = reason
    raise UserError(f"no kernel for {op} can serve {spec}: {refused}")


class Kernels:
    """Chooses kernels for a model while it is built, and remembers what it chose.

    `requested` maps ops to names ("auto" when absent); dtype, device and phase are the same for
    the whole model. `decide` makes a choice: `choose`, or a method of a run's Chooser. `choices`
    keeps one Choice per distinct spec, for the log and for `nanolm kernels list`.
    """

    def __init__(
        self,
        requested: dict[str, str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        phase: Phase = "train",
        decide: Callable[[str, Spec, str], Choice] = choose,
    ) -> None:
        self.requested, self.decide = requested or {}, decide
        self.common: dict[str, Any] = {"dtype": dtype, "device": device, "phase": phase}
        self.choices: dict[Spec, Choice] = {}

    def chosen(self, op: str) -> list[Kernel]:
        """The kernels that serve this op anywhere in the model."""
        return [choice.kernel for choice in self.choices.values() if choice.op == op]

    @property
    def phase(self) -> Phase:
        """The phase that the model is built for."""
        return self.common["phase"]

    def choose(self, op: str, spec_class: type[Spec], **details: Any) -> Kernel:
        """The kernel of `op` for a layer described by `details`; logged once per spec."""
        spec = spec_class(**self.common | details)
        if spec not in self.choices:
            choice = self.decide(op, spec, self.requested.get(op, "auto"))
            notes = [f"not {name}: {reason}" for name, reason in choice.refused.items()]
            varies = why_it_varies(choice.kernel, spec.device) if spec.phase == "train" else None
            notes += [f"its gradients may differ from run to run: {varies}"] if varies else []
            why = "; ".join(notes)
            log.info("%s: %s%s", op, choice.kernel.name, f" ({why})" if why else "")
            self.choices[spec] = choice
        return self.choices[spec].kernel
