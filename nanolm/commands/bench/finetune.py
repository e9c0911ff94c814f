"""`nanolm bench finetune`: real tokens per second of fine-tuning beside transformers' padded loop
and beside the same loop on batches of like length, on a CPU or a GPU.

Same model, same examples per step, same environment, a process for each contestant, and turns
A B C A B C …, as in `nanolm bench train`; where it helps a contestant, it is compiled, and one that
cannot take part here is named at the start, with what helps. What the table shows is told in
nanolm/tools/bench/finetune_contest.py.

Data: any table with a text column. The default are short docstring lines of the Python standard
library. Finished measurements are kept in `results`; an interrupted benchmark goes on.
"""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count
from nanolm.distributed.devices import DeviceWord, device_type
from nanolm.errors import require
from nanolm.terminal import say
from nanolm.tools.bench.admission import Entries, announce, job_of, require_fast
from nanolm.tools.bench.cells import Cells, cpu_name
from nanolm.tools.bench.finetune import TuneShape
from nanolm.tools.bench.finetune_contest import CONTESTANTS, bench, entries, table
from nanolm.tools.bench.texts import prepared

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure fine-tuning steps of nanolm and of transformers, each in a process of its own."""

    data: str = "stdlib:docstring"
    """Folder or file of texts, or a table made from the standard library."""
    column: str = "query"
    """Column that holds the text."""
    label: str | None = None
    """Column that holds the class; null: classes are drawn by the text's hash (the speed is the
    same)."""
    device: DeviceWord = "auto"
    """auto takes CUDA when there is any."""
    precisions: list[str] = dataclasses.field(default_factory=lambda: ["fp32", "bf16"])
    """In which arithmetic: fp32, bf16, on CUDA also fp16."""
    rounds: Count = 15
    """Turns of every contestant, after the turns that try its variants."""
    steps: Count = 10
    """Steps of a turn."""
    warmup: Count = 5
    """Steps before all turns."""
    threads: Count | None = None
    """Threads of every contestant; null means all cores."""
    compile: bool = True
    """Also try each contestant with torch.compile."""
    only: list[str] | None = None
    """Contestants to measure; null means all."""
    n_layers: Count = 4
    """Blocks."""
    d_model: Count = 256
    """Width."""
    n_heads: Count = 4
    """Heads."""
    batch: Count = 32
    """Examples of a step."""
    vocab_size: Count = 8192
    """Tokens of the vocabulary."""
    row_length: Count = 128
    """Longest sequence."""
    results: str = "docs/bench_finetune.json"
    """Where finished measurements are kept, and found by the next call."""
    fresh: bool = False
    """Measure everything anew: throw away what `results` holds."""
    json: str | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        for key, valid in {"precisions": PRECISIONS, "only": CONTESTANTS}.items():
            for value in getattr(self, key) or []:
                require(value in valid, f"--{key}: {value!r} is none of {'; '.join(valid)}")

    def shape(self, n_classes: int) -> TuneShape:
        """The shape of model and batch."""
        names = [f.name for f in dataclasses.fields(TuneShape) if f.name != "n_classes"]
        return TuneShape(n_classes=n_classes, **{name: getattr(self, name) for name in names})


def run(arguments: Arguments) -> None:
    """Name who is left out, prepare, measure, print tables, write the figures."""
    device = device_type(arguments.device)
    require_fast(arguments.precisions, device)
    cells = Cells(arguments.results, arguments.fresh)

    def enter_each(data: str, shape: TuneShape) -> list[Entries]:
        """One contest a precision."""
        times = (arguments.threads, arguments.warmup, arguments.steps)
        jobs = [job_of(shape, each, *times) | {"data": data} for each in arguments.precisions]
        only = arguments.only
        return [entries(job, device, compiles=arguments.compile, only=only) for job in jobs]

    announce(enter_each("none yet", arguments.shape(2)))
    given = (arguments.data, arguments.column, arguments.label, arguments.shape(2))
    data, n_classes, facts = prepared(*given)
    shape = arguments.shape(n_classes)
    say(
        f"{facts['texts']:,} texts of {facts['mean_tokens']:.1f} tokens, {facts['longest']} at most"
    )
    reports = []
    for entered in enter_each(data, shape):
        reports.append(bench(entered, arguments.rounds, device, cells))
        say(table(reports[-1]) + "\n")
    described = {"shape": dataclasses.asdict(shape), "cpu": cpu_name(), "data": facts}
    write_json(arguments.json, described | {"reports": reports})
