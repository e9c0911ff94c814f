"""The contest of `nanolm bench finetune`: who takes part, their rates, and the table.

A turn's rate is the tokens of its steps over their seconds. The table shows the median turn, a
ratio is the median of the quotients of all rounds; "useful" is the share of computed places that
hold a real token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from nanolm.tools.bench.admission import Entries, Job, enter_all, missing, refusal
from nanolm.tools.bench.cells import Cells, device_name
from nanolm.tools.bench.contest import play, quiet
from nanolm.tools.bench.figures import COMPILE, MEMORY, ON_CUDA, TOKENS, Column, aligned, on_cuda
from nanolm.tools.bench.finetune import TuneShape, nanolm_config, stand_in

CONTESTANTS: dict[str, dict[str, Any]] = {
    "nanolm": {"model": "nanolm"},
    "nanolm, masked rectangle": {"model": "nanolm", "kernels": {"attention": "sdpa"}},
    "transformers, padded": {"model": "padded"},
    "transformers, grouped by length": {"model": "grouped"},
}

USEFUL: dict[str, Column] = {"useful": lambda row: f"{row['useful']:.0%}"}
COLUMNS: dict[str, dict[str, Column]] = {
    "cpu": {
        **COMPILE,
        **TOKENS,
        "tokens/CPU s": lambda row: f"{row['tokens_per_cpu_second']:,.0f}",
        **USEFUL,
        "step": lambda row: f"{1e3 * row['step_seconds']:.0f} ms",
        **MEMORY,
    },
    "cuda": {**COMPILE, **TOKENS, **USEFUL, **ON_CUDA},
}
"""Device type -> head of a column of the table -> its text."""


def rate(turn: dict[str, Any], key: str = "seconds") -> float:
    """Real tokens per second of one turn."""
    return sum(turn["tokens"]) / sum(turn[key])


def why_not(job: Job, device: str) -> str | None:
    """Why the job's contestant cannot take part on cpu or cuda, with what helps, or None."""
    if job["settings"]["model"] != "nanolm":
        return missing("transformers")
    shape = TuneShape(**job["shape"])
    config = nanolm_config(shape, job, "nowhere", device)
    return refusal(config, stand_in(shape), device)


def entries(common: Job, device: str, *, compiles: bool, only: Sequence[str] | None) -> Entries:
    """Who takes part in a contest whose jobs have `common` in common."""
    compiled = [False, True] if compiles else [False]
    return enter_all(
        CONTESTANTS,
        common,
        device,
        why_not=why_not,
        variants=lambda settings: [settings | {"compile": each} for each in compiled],
        only=only,
    )


def bench(entered: Entries, rounds: int, device: str, cells: Cells) -> dict[str, Any]:
    """All contestants in one precision: figures by name, and nanolm's ratios."""
    contest = cells.get(
        {"jobs": entered.jobs, "rounds": rounds},
        lambda: play(entered.jobs, rounds, "nanolm.tools.bench.finetune", rate),
        device,
    )
    played = contest["players"]
    return {
        "precision": next(iter(entered.jobs.values()))[0]["precision"],
        "device_type": device,
        "device": device_name(device),
        "rows": {name: figures_of(entry) for name, entry in played.items()},
        "left_out": entered.left_out,
        "ratios": ratios(played),
        "stolen": contest["stolen"],
    }


def figures_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one contestant."""
    turns = entry["turns"]
    return {
        "compile": entry["job"]["settings"]["compile"],
        "tokens_per_second": statistics.median(map(rate, turns)),
        "tokens_per_cpu_second": statistics.median(rate(t, "cpu_seconds") for t in turns),
        "useful": sum(sum(t["tokens"]) for t in turns) / sum(sum(t["places"]) for t in turns),
        "step_seconds": statistics.median(s for turn in turns for s in turn["seconds"]),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "parameters": entry["facts"]["parameters"],
        "kernels": entry["facts"].get("kernels", {}),
        **on_cuda(entry),
    }


def ratios(played: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """nanolm's rate over each other's, by wall clock and by CPU time: median over rounds."""
    ours = played.get("nanolm")
    keys = {"tokens_per_second": "seconds", "tokens_per_cpu_second": "cpu_seconds"}
    return {
        name: {
            shown: statistics.median(
                rate(own, key) / rate(theirs, key)
                for own, theirs in zip(ours["turns"], entry["turns"], strict=True)
            )
            for shown, key in keys.items()
        }
        for name, entry in played.items()
        if ours is not None and name != "nanolm"
    }


def table(report: dict[str, Any]) -> str:
    """One precision's contestants, a line each, then the ratios."""
    texts = [
        f"nanolm / {name}: {ratio['tokens_per_second']:.2f}x (by CPU time "
        f"{ratio['tokens_per_cpu_second']:.2f}x)"
        for name, ratio in report["ratios"].items()
    ]
    head = f"{report['precision']} ({report['device']}; {quiet(report['stolen'])})"
    return "\n".join([head, *aligned(COLUMNS[report["device_type"]], report["rows"]), *texts])
