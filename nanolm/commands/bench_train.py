"""`nanolm bench train`: one training step of nanolm beside transformers' GPT-2 and BERT and a plain
loop, at one fixed shape.

Each measurement is a fresh process (`bench_step.py`) with the same environment for all. A first
round tries every contestant's settings (torch.compile or not) and keeps its fastest; then the
contestants take turns, A B C A B C …, so that whatever else the machine does meets them all. The
table shows medians over rounds; a ratio is a quotient of two medians of one run.

Model FLOPs are those that the objective needs (for MLM the vocabulary projection of the masked
positions only), the same figure for every contestant. MFU is their rate over the best matrix
product rate that was measured between the turns.

Finished measurements are kept in `results` under a hash of everything that decides them, so an
interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from typing import Any

from nanolm.bench_cells import Cells, cpu_name
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
    rounds: int = 5
    """Turns of every contestant, after the round that tries settings."""
    steps: int = 3
    """Measured steps in each turn."""
    warmup: int = 2
    """Steps before them."""
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
        for name in ("rounds", "steps", "batch", "row_length", "n_layers"):
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


@dataclasses.dataclass
class Entry:
    """A contestant with the settings that won its trial, and its results."""

    name: str
    job: dict[str, Any]
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def median(self, key: str) -> float:
        """Median over turns; a list's own median stands for it."""
        values = [result[key] for result in self.results]
        return statistics.median(statistics.median(v) if isinstance(v, list) else v for v in values)


def bench(arguments: Arguments, objective: str, precision: str, cells: Cells) -> dict[str, Any]:
    """All contestants of one step in one precision: figures by name."""
    common = {
        "precision": precision,
        "shape": dataclasses.asdict(arguments.shape),
        "threads": arguments.threads or os.cpu_count(),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
    }
    names = {k: v for k, v in contestants(objective).items() if not skipped(arguments, k)}
    entries = [
        fastest(name, settings, common, cells, arguments.compile)
        for name, settings in names.items()
    ]
    peaks = []
    for turn in range(1, arguments.rounds + 1):
        for entry in entries:
            entry.results.append(cells.measure(entry.job, turn))
        peaks.append(cells.measure(common | {"settings": MATMUL}, turn)["matmul_flops"])
        print(f"{objective} {precision}: turn {turn} of {arguments.rounds}", file=sys.stderr)
    figures = {entry.name: figures_of(entry, arguments.shape, max(peaks)) for entry in entries}
    return {
        "objective": objective,
        "precision": precision,
        "matmul_tflops": max(peaks) / 1e12,
        "rows": figures,
        "against_best": against_best(figures),
    }


def skipped(arguments: Arguments, name: str) -> bool:
    """Whether `--only` leaves this contestant out."""
    return arguments.only is not None and name not in arguments.only


def fastest(
    name: str, settings: dict[str, Any], common: dict[str, Any], cells: Cells, try_compile: bool
) -> Entry:
    """The contestant with those of its settings that were fastest in turn 0.

    The rows that show nanolm with other kernels run without torch.compile.
    """
    variants = [settings | {"compile": False}]
    if try_compile and "kernels" not in settings:
        variants.append(settings | {"compile": True})
    jobs = [common | {"settings": variant} for variant in variants]
    medians = [statistics.median(cells.measure(job, 0)["seconds"]) for job in jobs]
    return Entry(name, jobs[medians.index(min(medians))])


def figures_of(entry: Entry, shape: Shape, peak: float) -> dict[str, Any]:
    """What the table shows of one contestant."""
    seconds = entry.median("seconds")
    settings = entry.job["settings"]
    flops = step_flops(shape, settings["objective"]) / seconds
    phases = {
        phase: statistics.median(result["phases"][phase] for result in entry.results)
        for phase in PHASES
        if phase in entry.results[0]["phases"]
    }
    return {
        "compile": settings["compile"],
        "step_seconds": seconds,
        "cpu_seconds": entry.median("cpu_seconds"),
        "load_average": entry.median("load_average"),
        "tokens_per_second": shape.tokens / seconds,
        "model_tflops": flops / 1e12,
        "mfu": flops / peak,
        "peak_bytes": entry.median("peak_bytes"),
        "training_bytes": entry.median("peak_bytes") - entry.median("before_bytes"),
        "phases": phases,
        "parameters": entry.results[0]["parameters"],
        "turn_seconds": [statistics.median(result["seconds"]) for result in entry.results],
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


def against_best(figures: dict[str, dict]) -> dict[str, Any]:
    """nanolm over the fastest of the others: speed (higher is better), memory (lower is better)."""
    others = {name: row for name, row in figures.items() if not name.startswith("nanolm")}
    if "nanolm" not in figures or not others:
        return {}
    name = min(others, key=lambda other: others[other]["step_seconds"])
    ours, best = figures["nanolm"], others[name]
    return {
        "best": name,
        "speed": best["step_seconds"] / ours["step_seconds"],
        "cpu_time": best["cpu_seconds"] / ours["cpu_seconds"],
        "peak_memory": ours["peak_bytes"] / best["peak_bytes"],
        "training_memory": ours["training_bytes"] / best["training_bytes"],
    }


def table(report: dict[str, Any]) -> str:
    """One step's contestants, a line each."""
    head = (
        f"{report['objective']} {report['precision']} "
        f"(matrix product: {report['matmul_tflops']:.3f} TFLOP/s)"
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
            f"nanolm / {ratio['best']}: speed {ratio['speed']:.2f}x (by CPU time "
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
