"""The lines for the column *on a GPU* in docs/evidence.md and docs/benchmarks.md, from what the
stages have measured.

A line stands for the row of their tables that begins with its words, and is made once all its
stages have ended. What the report does not touch stays as it is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nanolm.tools.first_contact.entry import Entry
from nanolm.tools.first_contact.verdict import Verdict

Entries = Mapping[str, Entry]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table by its first words, the stages that stand for it, and what they say."""

    name: str
    stages: tuple[str, ...]
    words: Callable[[Entries], str]


def evidence_lines(entries: Entries) -> list[str]:
    """A line for each row whose stages have all been begun or left out, in the order of ROWS."""
    lines = []
    for row in ROWS:
        found = [entries.get(name) for name in row.stages]
        counted = [entry for entry in found if entry and entry.verdict in ("ok", "FAIL")]
        left_out = [entry for entry in found if entry and entry.verdict == "left out"]
        if not counted or len(counted) + len(left_out) < len(found):
            continue
        passed = all(entry.verdict == "ok" for entry in counted)
        command = f"make gpu ONLY='{' '.join(entry.name for entry in counted)}'"
        day = max(entry.day for entry in counted)
        device = ", ".join(dict.fromkeys(entry.device for entry in counted))
        verdict = Verdict(row.name, command, passed, row.words(entries), day)
        lines.append(verdict.line(device))
    return lines


def figures(entries: Entries, *stages: str) -> list[dict[str, Any]]:
    """All rows of figures of some stages."""
    return [
        row
        for name in stages
        if name in entries
        for rows in entries[name].figures.values()
        for row in rows
    ]


def said(*stages: str) -> Callable[[Entries], str]:
    """What the stages' own rows say in words."""
    return lambda entries: "; ".join(row["words"] for row in figures(entries, *stages))


def numerics_words(entries: Entries) -> str:
    """How many checks, how far from float64 at most in each precision."""
    rows = figures(entries, "numerics")
    wrong = [row for row in rows if not row["ok"]]
    words = f"{len(rows)} checks at real sizes against float64, {len(wrong)} wrong"
    own = [row for row in rows if row["kernel"].startswith("triton") and "error" in row]
    for dtype in ("bfloat16", "float16", "float32"):
        errors = [row["error"] for row in own if row["dtype"] == f"torch.{dtype}"]
        words += f"; {dtype} at most {max(errors):.1e}" if errors else ""
    twice = [row for row in own if row["same_bits"]]
    words += f"; the same bits twice in {len(twice)} of {len(own)}" if own else ""
    names = sorted({f"{row['op']} {row['kernel']}: {row['check']}" for row in wrong})
    return "; ".join([words, *names[:8]])


def tf32x3_words(entries: Entries) -> str:
    """How far the three TF32 products are from float64."""
    rows = [row for row in figures(entries, "numerics") if row["kernel"] == "triton_tf32x3"]
    if not rows:
        return "not there"
    worst = max(row.get("error", float("inf")) for row in rows)
    return f"{len(rows)} checks, at most {worst:.1e} from float64, {rows[0].get('limit')} allowed"


def speed_words(entries: Entries) -> str:
    """Attention's forward and backward pass beside the others, problem by problem."""
    problems: dict[str, dict[str, dict[str, Any]]] = {}
    for row in figures(entries, "attention"):
        problems.setdefault(row["problem"], {})[row["kernel"]] = row
    words = []
    for problem, rows in problems.items():
        times = {name: row["both_ms"] for name, row in rows.items() if "both_ms" in row}
        own = min((ms for name, ms in times.items() if name.startswith("nanolm")), default=None)
        others = {name: ms for name, ms in times.items() if not name.startswith("nanolm")}
        if own is None:
            words.append(f"{problem}: none")
            continue
        best = min(others, key=others.__getitem__, default=None)
        beside = f", {others[best] / own:.2f}x the speed of {best}" if best else ""
        words.append(f"{problem}: {own:.3f} ms{beside}")
    return "; ".join(words)


def step_words(entries: Entries) -> str:
    """nanolm's best step beside the best of the others, for each objective."""
    words = []
    for objective, size in (("clm", "GPT-2 124M"), ("mlm", "BERT")):
        rows = figures(entries, *(name for name in STEPS if name.startswith(objective)))
        own = [row for row in rows if row["contestant"] == "nanolm"]
        others = [row for row in rows if row["contestant"] != "nanolm"]
        if not own or not others:
            words.append(f"{size}: not measured")
            continue
        ours, best = (
            max(found, key=lambda row: row["tokens_per_second"]) for found in (own, others)
        )
        ratio = ours["tokens_per_second"] / best["tokens_per_second"]
        memory = ours["peak_bytes"] / best["peak_bytes"]
        first = [row["losses"][0] for row in own]
        mfu = "" if ours["mfu"] is None else f", MFU {ours['mfu']:.1%}"
        words.append(
            f"{size} {ours['precision']}: {ours['free_step_ms']:.1f} ms, "
            f"{ours['tokens_per_second']:,.0f} tokens/s{mfu}, {ratio:.2f}x the fastest other "
            f"({best['contestant']}{', compiled' * best['compile']}), memory {memory:.2f}x, "
            f"first losses of nanolm's own variants {max(first) - min(first):.1e} apart"
        )
    return "; ".join(words)


def memory_words(entries: Entries) -> str:
    """Shares of the plain loss's memory."""
    rows = figures(entries, "loss-memory")
    return ", ".join(f"{row['kernel']} {row['share']:.3f}" for row in rows if row["share"] != 1)


def doctor_words(entries: Entries) -> str:
    """What each check of the doctor found."""
    return "; ".join(f"{row['name']}: {row['words']}" for row in figures(entries, "doctor"))


STEPS = tuple(
    f"{objective}{who}{how}"
    for objective in ("clm", "mlm")
    for who in ("", "-plain", "-transformers")
    for how in ("", "-compiled")
)
ROWS = (
    Row("`torchrun` with 2 ranks", ("two-ranks",), said("two-ranks")),
    Row("exact resume", ("resume",), said("resume")),
    Row("FSDP2", ("groups", "two-ranks-fsdp"), said("groups", "two-ranks-fsdp")),
    Row("checkpoints written while training goes on", ("resume",), said("resume")),
    Row("first run on a GPU", ("doctor",), doctor_words),
    Row("Triton kernels, interpreted", ("numerics",), numerics_words),
    Row("training in bfloat16", ("bfloat16",), said("bfloat16")),
    Row("every op and all its candidates", ("attention",), speed_words),
    Row("float32 products", ("numerics",), tf32x3_words),
    Row("memory of the projected loss", ("loss-memory",), memory_words),
    Row("step time beside", STEPS, step_words),
)
"""What the report makes lines of."""
