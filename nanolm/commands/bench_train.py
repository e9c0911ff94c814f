"""`nanolm bench train`: one training step of nanolm beside transformers' GPT-2 and BERT and a plain
loop, at one fixed shape.

Each contestant is a fresh process (`bench_step.py`) with the same environment for all. Trial turns
with and without torch.compile keep its faster variant; then the contestants take turns of one step,
A B C A B C … (`bench_contest.py`). The table shows medians over rounds; a ratio is the median of
the quotients of all rounds, and stands beside their quartiles.

Model FLOPs are those that the objective needs (for MLM the vocabulary projection of the masked
positions only), the same figure for every contestant. MFU is their rate over the matrix product's
rate, the median of what was measured in the same rounds.

Finished contests are kept in `results` under a hash of everything that decides them, so an
interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from typing import Any

from nanolm.bench_cells import Cells, cpu_name
from nanolm.bench_contest import play, quiet
from nanolm.bench_shape import PHASES, Shape
from nanolm.commands.figures import write_json
from nanolm.errors import UserError
from nanolm.flops import train_flops_per_token
from nanolm.model_config import ModelConfig

MATMUL = {"model": "matmul"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Shape):
    """Measure one training step of nanolm and of others, each in a process of its own."""

    objectives: list[str] = dataclasses.field(default_factory=lambda: ["clm", "mlm"])
    """Which steps: clm, mlm."""
    precisions: list[str] = dataclasses.field(default_factory=lambda: ["fp32", "bf16"])
    """In which arithmetic: fp32, bf16."""
    rounds: int = 15
    """Turns of every contestant, after the turns that try its variants."""
    steps: int = 1
    """Steps of a turn."""
    warmup: int = 2
    """Steps before all turns."""
    threads: int | None = None
    """Threads of every contestant; null means all cores."""
    compile: bool = True
    """Also try each contestant with torch.compile."""
    only: list[str] | None = None
    """Contestants to measure; null means all."""
    results: str = "docs/bench_train.json"
    """Where finished measurements are kept, and found by the next call."""
    fresh: bool = False
    """Measure everything anew: throw away what `results` holds."""
    json: str | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        for name, known in (("objectives", ("clm", "mlm")), ("precisions", ("fp32", "bf16"))):
            for value in getattr(self, name):
                if value not in known:
                    raise UserError(f"{name}: {value!r} is none of {', '.join(known)}")
        for name in ("rounds", "steps", "warmup", "batch", "row_length", "n_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def shape(self) -> Shape:
        """The shape of model and batch."""
        names = [field.name for field in dataclasses.fields(Shape)]
        return Shape(**{name: getattr(self, name) for name in names})


def contestants(objective: str) -> dict[str, dict[str, Any]]:
    """Name -> settings: nanolm, nanolm with other kernels, and the others."""
    reference = {op: "reference" for op in ("attention", "linear_cross_entropy", "norm")}
    rows: dict[str, dict[str, Any]] = {
        "nanolm": {"model": "nanolm"},
        "nanolm, reference kernels": {"model": "nanolm", "kernels": reference},
        "nanolm, torch's linear_cross_entropy": {
            "model": "nanolm",
            "kernels": {"linear_cross_entropy": "torch"},
        },
    }
    family = "gpt2" if objective == "clm" else "bert"
    rows[f"transformers {family}"] = {"model": f"transformers-{family}"}
    plain = "gpt" if objective == "clm" else "bert"
    rows[f"plain {plain} loop"] = {"model": f"plain-{plain}"}
    return {name: settings | {"objective": objective} for name, settings in rows.items()}


def bench(arguments: Arguments, objective: str, precision: str, cells: Cells) -> dict[str, Any]:
    """All contestants of one step in one precision: figures by name."""
    common = {
        "precision": precision,
        "shape": dataclasses.asdict(arguments.shape),
        "threads": arguments.threads or os.cpu_count(),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
    }
    variants = {
        name: [common | {"settings": variant} for variant in variants_of(settings, arguments)]
        for name, settings in contestants(objective).items()
        if arguments.only is None or name in arguments.only
    }
    jobs = variants | {"matmul": [common | {"settings": MATMUL}]}
    contest = cells.get(
        {"jobs": jobs, "rounds": arguments.rounds},
        lambda: play(jobs, arguments.rounds, "nanolm.bench_step", speed),
    )
    played = {name: entry for name, entry in contest["players"].items() if name != "matmul"}
    products = contest["players"]["matmul"]["turns"]
    peak = statistics.median(turn["matmul_flops"] for turn in products)
    return {
        "objective": objective,
        "precision": precision,
        "matmul_tflops": peak / 1e12,
        "rows": {name: figures_of(entry, arguments.shape, peak) for name, entry in played.items()},
        "against_best": against_best(played),
        "stolen": contest["stolen"],
    }


def variants_of(settings: dict[str, Any], arguments: Arguments) -> list[dict[str, Any]]:
    """A contestant as it is, and compiled; the rows that show other kernels only as they are."""
    tries = arguments.compile and "kernels" not in settings
    return [settings | {"compile": compiled} for compiled in ([False, True] if tries else [False])]


def speed(turn: dict[str, Any]) -> float:
    """Steps per second of one turn."""
    return len(turn["seconds"]) / sum(turn["seconds"])


def median(entry: dict[str, Any], key: str) -> float:
    """Median over turns; a turn's list stands for its own median."""
    values = [turn[key] for turn in entry["turns"]]
    return statistics.median(statistics.median(v) if isinstance(v, list) else v for v in values)


def figures_of(entry: dict[str, Any], shape: Shape, peak: float) -> dict[str, Any]:
    """What the table shows of one contestant."""
    seconds = median(entry, "seconds")
    settings, facts = entry["job"]["settings"], entry["facts"]
    flops = step_flops(shape, settings["objective"]) / seconds
    phases = {
        phase: statistics.median(turn["phases"][phase] for turn in entry["turns"])
        for phase in PHASES
        if phase in entry["turns"][0]["phases"]
    }
    peak_bytes = max(turn["peak_bytes"] for turn in entry["turns"])
    return {
        "compile": settings["compile"],
        "step_seconds": seconds,
        "cpu_seconds": median(entry, "cpu_seconds"),
        "tokens_per_second": shape.tokens / seconds,
        "model_tflops": flops / 1e12,
        "mfu": flops / peak,
        "peak_bytes": peak_bytes,
        "training_bytes": peak_bytes - facts["before_bytes"],
        "phases": phases,
        "parameters": facts["parameters"],
    }


def step_flops(shape: Shape, objective: str) -> float:
    """Model FLOPs of one step, by formula (`flops.py`)."""
    model = ModelConfig(
        trunk="decoder" if objective == "clm" else "encoder",
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        vocab_size=shape.vocab_size,
        max_length=shape.row_length,
    )
    share = 1.0 if objective == "clm" else shape.n_masked / shape.row_length
    return shape.tokens * train_flops_per_token(model, shape.row_length, predicted_share=share)


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


def table(report: dict[str, Any]) -> str:
    """One step's contestants, a line each."""
    head = (
        f"{report['objective']} {report['precision']} "
        f"(matrix product: {report['matmul_tflops']:.3f} TFLOP/s; {quiet(report['stolen'])})"
    )
    columns = ["", "compile", "tokens/s", "TFLOP/s", "MFU", "peak MB", "training MB", *PHASES]
    lines = [columns]
    for name, row in report["rows"].items():
        phases = [
            f"{1e3 * row['phases'][phase]:.0f} ms" if phase in row["phases"] else "–"
            for phase in PHASES
        ]
        lines.append(
            [
                name,
                "yes" if row["compile"] else "no",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['model_tflops']:.3f}",
                f"{row['mfu']:.1%}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{row['training_bytes'] / 1e6:,.0f}",
                *phases,
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    if ratio := report["against_best"]:
        texts.append(
            f"nanolm / {ratio['best']}: speed {ratio['speed']:.2f}x (quartiles "
            f"{ratio['speed_quartiles'][0]:.2f}–{ratio['speed_quartiles'][1]:.2f}; by CPU time "
            f"{ratio['cpu_time']:.2f}x), peak memory {ratio['peak_memory']:.2f}x (without what was "
            f"resident before the model: {ratio['training_memory']:.2f}x)"
        )
    return "\n".join([head, *texts])


def run(arguments: Arguments) -> None:
    """Measure, print tables, write the figures."""
    cells = Cells(arguments.results, arguments.fresh)
    reports = []
    for objective in arguments.objectives:
        for precision in arguments.precisions:
            report = bench(arguments, objective, precision, cells)
            print(table(report) + "\n", flush=True)
            reports.append(report)
    shape = dataclasses.asdict(arguments.shape)
    write_json(arguments.json, {"shape": shape, "cpu": cpu_name(), "reports": reports})
