"""What `nanolm bench train` and `nanolm bench finetune` show of a finished contest: figures of each
contestant, nanolm against the best of the others, a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from nanolm.tables import GAP, blocks
from nanolm.terminal import table_width
from nanolm.tools.bench.contest import quiet
from nanolm.tools.bench.shape import PHASES, Shape, step_flops

Row = dict[str, Any]


def speed(turn: dict[str, Any]) -> float:
    """Steps per second of one turn."""
    return len(turn["seconds"]) / sum(turn["seconds"])


def median(entry: dict[str, Any], key: str) -> float:
    """Median over turns; a turn's list stands for its own median."""
    values = [turn[key] for turn in entry["turns"]]
    return statistics.median(statistics.median(v) if isinstance(v, list) else v for v in values)


def peak_of(contest: dict[str, Any]) -> float | None:
    """FLOP/s that MFU is a share of: the matrix product's median where it took part (on a CPU),
    else the data sheet's, None for a device without one."""
    players = contest["players"]
    if "matmul" in players:
        return median(players["matmul"], "matmul_flops")
    return next(iter(players.values()))["facts"]["peak_flops"]


def figures_of(entry: dict[str, Any], shape: Shape, peak: float | None) -> Row:
    """What the table shows of one contestant."""
    seconds = median(entry, "seconds")
    settings, facts, turns = entry["job"]["settings"], entry["facts"], entry["turns"]
    flops = step_flops(shape, settings["objective"]) / seconds
    phases = {
        phase: statistics.median(turn["phases"][phase] for turn in turns)
        for phase in PHASES
        if phase in turns[0]["phases"]
    }
    peak_bytes = max(turn["peak_bytes"] for turn in turns)
    row = {
        "compile": settings["compile"],
        "step_seconds": seconds,
        "cpu_seconds": median(entry, "cpu_seconds"),
        "tokens_per_second": shape.tokens / seconds,
        "model_tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "peak_bytes": peak_bytes,
        "training_bytes": peak_bytes - facts["before_bytes"],
        "phases": phases,
        "parameters": facts["parameters"],
        "losses": [facts.get("first_loss", turns[0]["loss"][0]), turns[-1]["loss"][-1]],
    }
    return row | {"kernels": facts.get("kernels", {})} | on_cuda(entry)


def on_cuda(entry: dict[str, Any]) -> Row:
    """What there is beside it where a step is queued and not called; nothing on a CPU."""
    if "waited_seconds" not in entry["turns"][0]:
        return {}
    return {
        "waited_seconds": median(entry, "waited_seconds"),
        "reserved_bytes": max(turn["reserved_bytes"] for turn in entry["turns"]),
        "host_waits": entry["facts"]["host_waits"],
    }


def against_best(played: dict[str, dict]) -> dict[str, Any]:
    """nanolm over the fastest of the others: speed (higher is better), memory (lower is better)."""
    others = {name: entry for name, entry in played.items() if not name.startswith("nanolm")}
    if "nanolm" not in played or not others:
        return {}
    name = min(others, key=lambda other: median(others[other], "seconds"))
    ours, best = played["nanolm"], others[name]

    def quotients(key: str) -> list[float]:
        pairs = zip(best["turns"], ours["turns"], strict=True)
        return [sum(theirs[key]) / sum(own[key]) for theirs, own in pairs]

    def memory(entry: dict[str, Any], before: int) -> int:
        return max(turn["peak_bytes"] for turn in entry["turns"]) - before

    speeds = quotients("seconds")
    low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
    before = [entry["facts"]["before_bytes"] for entry in (ours, best)]
    return {
        "best": name,
        "speed": middle,
        "speed_quartiles": [low, high],
        "cpu_time": statistics.median(quotients("cpu_seconds")),
        "peak_memory": memory(ours, 0) / memory(best, 0),
        "training_memory": memory(ours, before[0]) / memory(best, before[1]),
    }


Column = Callable[[Row], str]
COMPILE: dict[str, Column] = {"compile": lambda row: "yes" if row["compile"] else "no"}
TOKENS: dict[str, Column] = {"tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}"}
MEMORY: dict[str, Column] = {"peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}"}
RATES: dict[str, Column] = {
    **COMPILE,
    **TOKENS,
    "TFLOP/s": lambda row: f"{row['model_tflops']:,.3f}",
    "MFU": lambda row: "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
}
ON_CUDA: dict[str, Column] = {
    "step": lambda row: f"{1e3 * row['step_seconds']:.2f} ms",
    "waiting": lambda row: f"{1e3 * row['waited_seconds']:.2f} ms",
    "host waits": lambda row: str(row["host_waits"]),
    **MEMORY,
    "reserved MB": lambda row: f"{row['reserved_bytes'] / 1e6:,.0f}",
}
"""A step running freely, and with a wait after it; how often it waits by itself; memory."""


def phase_columns(digits: int) -> dict[str, Column]:
    """A column for each phase of a step, in milliseconds."""

    def column(phase: str) -> Column:
        def text(row: Row) -> str:
            found = row["phases"].get(phase)
            return "–" if found is None else f"{1e3 * found:.{digits}f} ms"

        return text

    return {phase: column(phase) for phase in PHASES}


COLUMNS: dict[str, dict[str, Column]] = {
    "cpu": {
        **RATES,
        **MEMORY,
        "training MB": lambda row: f"{row['training_bytes'] / 1e6:,.0f}",
        **phase_columns(0),
    },
    "cuda": {
        **RATES,
        **ON_CUDA,
        "losses": lambda row: f"{row['losses'][0]:.2f} to {row['losses'][1]:.2f}",
        **phase_columns(2),
    },
}
"""Device type -> head of a column -> its text."""


def table(report: dict[str, Any]) -> str:
    """One step's contestants, a line each."""
    head = (
        f"{report['objective']} {report['precision']} "
        f"({peak_in_words(report)}; {quiet(report['stolen'])})"
    )
    rows = aligned(COLUMNS[report["device_type"]], report["rows"])
    return "\n".join([head, *rows, *ratio_in_words(report["against_best"])])


def aligned(columns: dict[str, Column], rows: dict[str, Row]) -> list[str]:
    """The lines of a table: heads, then each row after its name; columns that a line has
    no room for stand below, after the names again."""
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(text(row) for text in columns.values())])
    widths = [max(map(len, column)) + GAP for column in zip(*lines, strict=True)]
    return [
        "".join([line[0].ljust(widths[0] - GAP), *(line[i].rjust(widths[i]) for i in block[1:])])
        for block in blocks(widths, widths[0], table_width())
        for line in lines
    ]


def peak_in_words(report: dict[str, Any]) -> str:
    """What MFU is a share of."""
    peak = report["peak_tflops"]
    if report["device_type"] == "cpu":
        return f"matrix product: {peak:.3f} TFLOP/s"
    if peak is None:
        return f"{report['device']}, whose peak is not known"
    return f"{report['device']}: {peak:g} TFLOP/s by its data sheet"


def ratio_in_words(ratio: dict[str, Any]) -> list[str]:
    """nanolm against the best of the others, if both took part."""
    if not ratio:
        return []
    low, high = ratio["speed_quartiles"]
    words = (
        f"nanolm / {ratio['best']}: speed {ratio['speed']:.2f}x (quartiles {low:.2f}–{high:.2f}; "
        f"by CPU time {ratio['cpu_time']:.2f}x), peak memory {ratio['peak_memory']:.2f}x"
    )
    if ratio["training_memory"] != ratio["peak_memory"]:
        bare = f"{ratio['training_memory']:.2f}x"
        words += f" (without what was resident before the model: {bare})"
    return [words]
