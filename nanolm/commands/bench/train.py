"""`nanolm bench train`: one training step of nanolm beside transformers' GPT-2 and BERT and a plain
loop, at one fixed shape, on a CPU or a GPU.

Each contestant is a fresh process (`bench/step.py`) with the same environment for all; one that
cannot take part here is named at the start, with what helps (`admission.py`). Trial turns
with and without torch.compile keep its faster variant; then the contestants take turns,
A B C A B C … (`bench/contest.py`). The table shows medians over rounds; a ratio is the median of
the quotients of all rounds, and stands beside their quartiles.

On a GPU the steps of a turn run freely and their end is waited for; what they take with a wait
after each stands beside it, and phases are the device's time (`clock.py`). The default shape
is for a CPU; GPT-2's small model is `--n_layers 12 --d_model 768 --n_heads 12 --row_length 1024
--vocab_size 50304`.

Model FLOPs are those that the objective needs (for MLM the vocabulary projection of the masked
positions only), the same figure for every contestant. MFU is their rate over the matrix product's
rate: on a CPU the median of what was measured in the same rounds, on a GPU its data sheet's.

Finished contests are kept in `results` under a hash of everything that decides them, so an
interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.distributed.devices import DeviceWord, device_type
from nanolm.errors import require
from nanolm.terminal import say
from nanolm.tools.bench.admission import announce, job_of, require_fast
from nanolm.tools.bench.cells import Cells, cpu_name
from nanolm.tools.bench.figures import table
from nanolm.tools.bench.shape import Shape
from nanolm.tools.bench.train_contest import bench, contestants, entries

OBJECTIVES = ("clm", "mlm")
PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = {"cpu": 1, "cuda": 10}
"""Steps of a turn: on a GPU as many as make the start and the end of their queue a trifle."""
WARMUP = {"cpu": 2, "cuda": 8}
"""Steps before all turns: a GPU's clock and its allocator take some to settle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Shape):
    """Measure one training step of nanolm and of others, each in a process of its own."""

    device: DeviceWord = "auto"
    """auto takes CUDA when there is any."""
    objectives: list[str] = dataclasses.field(default_factory=lambda: ["clm", "mlm"])
    """Which steps: clm, mlm."""
    precisions: list[str] = dataclasses.field(default_factory=lambda: ["fp32", "bf16"])
    """In which arithmetic: fp32, bf16, on CUDA also fp16."""
    rounds: Count = 15
    """Turns of every contestant, after the turns that try its variants."""
    steps: Count | None = None
    """Steps of a turn; null means 1 on a CPU, 10 on CUDA."""
    warmup: Count | None = None
    """Steps before all turns; null means 2 on a CPU, 8 on CUDA."""
    threads: Count | None = None
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
        known = [name for objective in OBJECTIVES for name in contestants(objective)]
        choices = {
            "objectives": OBJECTIVES,
            "precisions": PRECISIONS,
            "only": [*dict.fromkeys(known)],
        }
        for key, valid in choices.items():
            for value in getattr(self, key) or []:
                require(value in valid, f"--{key}: {value!r} is none of {'; '.join(valid)}")

    @property
    def shape(self) -> Shape:
        """The shape of model and batch."""
        names = [field.name for field in dataclasses.fields(Shape)]
        return Shape(**{name: getattr(self, name) for name in names})


def run(arguments: Arguments) -> None:
    """Name who is left out, measure, print tables, write the figures."""
    device = device_type(arguments.device)
    require_fast(arguments.precisions, device)
    cells = Cells(arguments.results, arguments.fresh)
    warmup, steps = arguments.warmup or WARMUP[device], arguments.steps or STEPS[device]
    contests = [
        entries(
            job_of(arguments.shape, precision, arguments.threads, warmup, steps),
            device,
            objective,
            compiles=arguments.compile,
            only=arguments.only,
        )
        for objective in arguments.objectives
        for precision in arguments.precisions
    ]
    announce(contests)
    reports = []
    for entered in contests:
        if entered.jobs:  # `only` may name none of this objective
            reports.append(bench(entered, arguments.rounds, device, cells))
            say(table(reports[-1]) + "\n")
    shape = dataclasses.asdict(arguments.shape)
    write_json(arguments.json, {"shape": shape, "cpu": cpu_name(), "reports": reports})
