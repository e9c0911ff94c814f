"""How a run's kernels are chosen: as in its checkpoint, by name, by `auto`, by `fastest`.

    on resume    what the checkpoint was trained with, unless the config names another kernel
    a name       that kernel, or the reason why it cannot serve
    auto         the first of contract.AUTO that can serve; of Muon's products what was timed to be
                 faster than the plain one at that size, if anything was (see by_time.py)
    fastest      attention only: what `nanolm kernels bench --save` found fastest on this device;
                 in inference, which was not timed, as auto

What a user should know of it is told by `notes`, one sentence each.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanolm.errors import UserError
from nanolm.ops.by_time import Ruling, rule, told
from nanolm.ops.contract import Choice, Spec, candidates, choose
from nanolm.ops.kept import Record, kept_record
from nanolm.ops.timings import Timing, device_name, how_to_time, timings_of, untimed
from nanolm.registry import SIZED, TIMED

FASTEST = "fastest"
OPEN = ("auto", FASTEST)
"""What `kernels:` says for a kernel that is not named."""
WORTH_TELLING = 1.1
"""How many times slower than the fastest a kernel is before `auto` speaks of it."""


class Chooser:
    """Chooses for one model; `kept` are records of the checkpoint it goes on from, `timings` those
    of the file that `kernels.timings` names."""

    def __init__(
        self, kept: Sequence[Record] = (), timings: Sequence[Timing] = (), source: str | None = None
    ) -> None:
        self.kept, self.timings, self.source = kept, timings, source
        self._notes: list[str] = []
        self._rulings: dict[str, list[Ruling]] = {}

    @property
    def notes(self) -> list[str]:
        """What to tell the user, of all choices so far."""
        rulings = self._rulings.values()
        return [*self._notes, *(line for found in rulings for line in told(found, self.source))]

    def choose(self, op: str, spec: Spec, requested: str) -> Choice:
        """The kernel for one layer kind; raises UserError as `contract.choose`, and for `fastest`
        without a timing."""
        record = kept_record(self.kept, op, spec)
        if record is None or (requested == FASTEST and op not in TIMED):
            return self._as_requested(op, spec, requested)
        before, layer = record["kernel"], f"{op} of {spec.size}" if spec.size else op
        reason = cannot_go_on(op, spec, record)
        if requested in OPEN and reason is None:
            choice = Choice(op, spec, candidates(op)[before], {})
            if requested == "auto" and (new := self._auto(op, spec).kernel.name) != before:
                everywhere = " for every size" if spec.size else ""
                self._note(
                    f"{layer}: {before}, with which the checkpoint was trained; auto would take "
                    f"{new} now, which --kernels.{op} {new} says{everywhere}"
                )
            return choice
        choice = self._as_requested(op, spec, requested)
        if choice.kernel.name != before:
            why = reason if requested in OPEN else f"kernels.{op}={requested} asks for it"
            self._note(
                f"{layer}: {choice.kernel.name} instead of {before}, with which the checkpoint was "
                f"trained ({why}): agrees to rounding, not bit for bit"
            )
        return choice

    def _as_requested(self, op: str, spec: Spec, requested: str) -> Choice:
        if requested == FASTEST and op in TIMED:
            return self._fastest(op, spec) if spec.phase == "train" else choose(op, spec)
        if requested != "auto":
            return choose(op, spec, requested)
        if op in SIZED:
            ruling = rule(op, spec, self.timings)
            self._rulings.setdefault(op, []).append(ruling)
            return ruling.choice
        choice = choose(op, spec)
        if spec.phase == "train" and op in TIMED:
            self._compare(choice)
        return choice

    def _auto(self, op: str, spec: Spec) -> Choice:
        """What `auto` takes, untold."""
        return rule(op, spec, self.timings).choice if op in SIZED else choose(op, spec)

    def _fastest(self, op: str, spec: Spec) -> Choice:
        refused, serving = self._by_time(op, spec)
        if not serving:
            raise UserError(
                f"kernels.{op}=fastest has no timing of a kernel that can serve this layer on "
                f"{device_name(spec.device)} in {self._place()}: run {how_to_time(spec)}, with "
                f"--batch and --length of your rows, and give this command --kernels.timings FILE"
            )
        times = ", ".join(f"{row['kernel']} {row['ms']:.3g} ms" for row in serving)
        best = serving[0]
        self._note(
            f"{op}: {best['kernel']} is the fastest on {best['device_name']} ({times} forward and "
            f"backward of {best['problem']}, timed in {self.source}{untimed(spec)})"
        )
        return Choice(op, spec, candidates(op)[best["kernel"]], refused)

    def _compare(self, choice: Choice) -> None:
        """Says when `auto` took a kernel although a timing knows a faster one."""
        _, serving = self._by_time(choice.op, choice.spec)
        own = [row["ms"] for row in serving if row["kernel"] == choice.kernel.name]
        if own and own[0] > WORTH_TELLING * serving[0]["ms"]:
            best = serving[0]
            self._note(
                f"{choice.op}: auto takes {choice.kernel.name}, {own[0]:.3g} ms in {self.source}, "
                f"where {best['kernel']} took {best['ms']:.3g} ms for {best['problem']}"
                f"{untimed(choice.spec)}; --kernels.{choice.op} fastest takes that"
            )

    def _by_time(self, op: str, spec: Spec) -> tuple[dict[str, str], list[Timing]]:
        """(reasons of the kernels that cannot serve, timings of those that can, fastest first)."""
        known, refused, serving = candidates(op), {}, []
        for row in sorted(timings_of(self.timings, op, spec), key=lambda row: row["ms"]):
            name = row["kernel"]
            reason = known[name].why_not(spec) if name in known else "it is not registered here"
            if reason is None:
                serving.append(row)
            else:
                refused[name] = reason
        return refused, serving

    def _place(self) -> str:
        return self.source or "a file (kernels.timings=null)"

    def _note(self, words: str) -> None:
        if words not in self._notes:
            self._notes.append(words)


def cannot_go_on(op: str, spec: Spec, record: Record) -> str | None:
    """Why a kernel of the checkpoint cannot serve here, or None."""
    kernel = candidates(op).get(record["kernel"])
    if record["spec"].get("device") != spec.device:
        return f"that was on {record['spec'].get('device')}, this is {spec.device}"
    if kernel is None:
        return "it is not registered here; name its module under plugins:"
    return kernel.why_not(spec)
