"""Ops of which `auto` takes another kernel than the plain one only where it was timed to be faster.

A symmetric product saves arithmetic and pays for it with tiles of its own; which of the two weighs
more depends on the GPU and on the matrix. So `auto` takes the first kernel of contract.AUTO, the
plain product, unless the timings of this very device have a faster one for a matrix of this size
and dtype. The choice is made when the optimizer is built, size by size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nanolm.ops.contract import AUTO, Choice, Spec, candidates, choose, passed_over
from nanolm.ops.timings import Timing, device_name, how_to_time_sizes, timings_of


@dataclasses.dataclass(frozen=True)
class Ruling:
    """What `auto` takes for one size.

    `usual` is the kernel that it takes without timings, `rivals` are the others that it may take;
    `ms` are their times, fastest first: empty unless the usual one and a rival were timed.
    """

    choice: Choice
    usual: str
    rivals: list[str]
    ms: dict[str, float]

    @property
    def times(self) -> str:
        """All figures in words."""
        return ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.ms.items())


def rule(op: str, spec: Spec, timings: Sequence[Timing]) -> Ruling:
    """What `auto` takes of an op in registry.SIZED."""
    known, plain = candidates(op), choose(op, spec)
    usual = plain.kernel.name
    serving = [name for name in AUTO[op] if passed_over(known[name], spec) is None]
    rivals = [name for name in serving if name != usual]
    rows = timings_of(timings, op, spec)
    found = {row["kernel"]: row["ms"] for row in rows if row["kernel"] in serving}
    if usual not in found or len(found) == 1:
        return Ruling(plain, usual, rivals, {})
    # The usual one comes first among equals: faster is less, not as much.
    ms = {name: found[name] for name in sorted(found, key=lambda n: (found[n], n != usual))}
    best = next(iter(ms))
    slower = {name: f"it took {took:.3g} ms" for name, took in ms.items() if name != best}
    return Ruling(Choice(op, spec, known[best], slower), usual, rivals, ms)


def told(rulings: Sequence[Ruling], source: str | None) -> list[str]:
    """What the log says of one op's rulings: one sentence of the sizes that were timed, one of
    those that were not; nothing where there was no choice."""
    open_to = [ruling for ruling in rulings if ruling.rivals]
    timed = [ruling for ruling in open_to if ruling.ms]
    rest = [ruling for ruling in open_to if not ruling.ms]
    lines = []
    if timed:
        first = timed[0].choice
        each = "; ".join(
            f"{ruling.choice.kernel.name} for {ruling.choice.spec.size} ({ruling.times})"
            for ruling in timed
        )
        where = device_name(first.spec.device)
        lines.append(f"{first.op}, by the timings of {where} in {source}: {each}")
    if rest:
        first, specs = rest[0].choice, [ruling.choice.spec for ruling in rest]
        silent = f"{source} does not say" if source else "no file (kernels.timings=null) says"
        rivals, where = " or ".join(rest[0].rivals), device_name(first.spec.device)
        lines.append(
            f"{first.op}: {rest[0].usual} for {', '.join(spec.size for spec in specs)}, since "
            f"{silent} whether {rivals} is faster on {where}: "
            f"{how_to_time_sizes(first.op, specs)} times them, and with --kernels.timings FILE "
            f"a run takes the faster one"
        )
    return lines
