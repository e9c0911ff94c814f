"""`nanolm bench finetune`: real tokens per second of fine-tuning beside transformers' padded loop
and beside the same loop on batches of like length, on a CPU or a GPU.

Same model, same examples per step, same environment, a process for each contestant, and turns
A B C A B C …, as in `nanolm bench train`; where it helps a contestant, it is compiled, and one that
cannot take part here is named at the start, with what helps. A turn's rate is the tokens of its
steps over their seconds. The table shows the median turn, a ratio is the median of the quotients of
all rounds; "useful" is the share of computed places that hold a real token.

Data: any table with a text column. The default are short docstring lines of the Python standard
library. Finished measurements are kept in `results`; an interrupted benchmark goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import statistics
from typing import Any

import numpy as np

from nanolm.commands.figures import write_json
from nanolm.config.ranges import Count
from nanolm.data.prepare.tokenizer_training import sentences, train_tokenizer
from nanolm.data.tables.splits import find_split, read_split
from nanolm.data.tokenizer import Tokenizer
from nanolm.distributed.devices import DeviceWord, device_type
from nanolm.errors import UserError, require
from nanolm.tools.bench.admission import (
    Entries,
    announce,
    enter_all,
    missing,
    refusal,
    require_fast,
)
from nanolm.tools.bench.cells import Cells, cpu_name, device_name
from nanolm.tools.bench.contest import play, quiet
from nanolm.tools.bench.figures import COMPILE, MEMORY, ON_CUDA, TOKENS, Column, aligned, on_cuda
from nanolm.tools.bench.finetune import (
    EXAMPLES,
    Examples,
    TuneShape,
    nanolm_config,
    stand_in,
)

PRECISIONS = ("fp32", "bf16", "fp16")
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


def read_examples(arguments: Arguments) -> tuple[Examples, int]:
    """(examples, number of classes): texts in the ids of a vocabulary trained on them, framed.

    Raises UserError for a table without the columns, or with too few texts.
    """
    where = find_split(arguments.data, {}, "train")
    if where is None:
        raise UserError(f"data={arguments.data} has no train split")
    table = read_split(where, "train")
    for column in filter(None, (arguments.column, arguments.label)):
        if column not in table.columns:
            raise UserError(
                f"{table.path} has no column {column}; it has {', '.join(table.columns)}"
            )
    texts = [str(record[arguments.column]) for record in table.records]
    if len(texts) < 2 * arguments.batch:
        raise UserError(f"{table.path} has {len(texts)} texts, fewer than two batches")
    tokenizer = tokenizer_of(texts, arguments.vocab_size)
    room = arguments.row_length - 2
    sequences = [
        np.concatenate([[tokenizer.cls], ids[:room], [tokenizer.sep]])
        for ids in tokenizer.encode_batch(texts)
    ]
    if arguments.label is None:
        keys = [str(hashlib.sha256(text.encode()).digest()[0] % 6) for text in texts]
    else:
        keys = [str(record[arguments.label]) for record in table.records]
    classes = sorted(set(keys))
    return Examples(sequences, np.array([classes.index(key) for key in keys])), len(classes)


def tokenizer_of(texts: list[str], vocab_size: Count) -> Tokenizer:
    """A unigram vocabulary of at most this size; small texts make a smaller one."""
    pieces = [piece for text in texts for piece in sentences(text)]
    size = vocab_size
    while True:
        try:
            return Tokenizer(train_tokenizer(iter(pieces), vocab_size=size, kind="unigram"))
        except UserError:
            if size <= 600:
                raise
            size = size * 3 // 4


def prepared(arguments: Arguments) -> tuple[str, int, dict[str, Any]]:
    """(file of examples, number of classes, facts about lengths); the file's name is its content's
    hash, so cells that were measured on it are found again."""
    examples, n_classes = read_examples(arguments)
    lengths = np.array([len(ids) for ids in examples.sequences])
    digest = hashlib.sha256(np.concatenate(examples.sequences).tobytes())
    digest.update(lengths.tobytes() + examples.labels.tobytes())
    EXAMPLES.mkdir(exist_ok=True)
    name = f"{digest.hexdigest()[:16]}.npz"
    examples.save(EXAMPLES / name)
    facts = {
        "data": arguments.data,
        "texts": len(lengths),
        "mean_tokens": float(lengths.mean()),
        "longest": int(lengths.max()),
    }
    return name, n_classes, facts


def rate(turn: dict[str, Any], key: str = "seconds") -> float:
    """Real tokens per second of one turn."""
    return sum(turn["tokens"]) / sum(turn[key])


def why_not(job: dict[str, Any], device: str) -> str | None:
    """Why the job's contestant cannot take part on cpu or cuda, with what helps, or None."""
    if job["settings"]["model"] != "nanolm":
        return missing("transformers")
    shape = TuneShape(**job["shape"])
    config = nanolm_config(shape, job, "nowhere", device)
    return refusal(config, stand_in(shape), device)


def entries(
    arguments: Arguments, device: str, precision: str, data: str, shape: TuneShape
) -> Entries:
    """Who takes part in the contest in one precision."""
    common = {
        "precision": precision,
        "data": data,
        "shape": dataclasses.asdict(shape),
        "threads": arguments.threads or os.cpu_count(),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
    }
    compiled = [False, True] if arguments.compile else [False]
    return enter_all(
        CONTESTANTS,
        common,
        device,
        why_not=why_not,
        variants=lambda settings: [settings | {"compile": each} for each in compiled],
        only=arguments.only,
    )


def bench(arguments: Arguments, entered: Entries, device: str, cells: Cells) -> dict[str, Any]:
    """All contestants in one precision: figures by name, and nanolm's ratios."""
    contest = cells.get(
        {"jobs": entered.jobs, "rounds": arguments.rounds},
        lambda: play(entered.jobs, arguments.rounds, "nanolm.tools.bench.finetune", rate),
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


def run(arguments: Arguments) -> None:
    """Name who is left out, prepare, measure, print tables, write the figures."""
    device = device_type(arguments.device)
    require_fast(arguments.precisions, device)
    cells = Cells(arguments.results, arguments.fresh)
    enter_each = functools.partial(entries, arguments, device)
    announce([enter_each(each, "none yet", arguments.shape(2)) for each in arguments.precisions])
    data, n_classes, facts = prepared(arguments)
    shape = arguments.shape(n_classes)
    print(
        f"{facts['texts']:,} texts of {facts['mean_tokens']:.1f} tokens, {facts['longest']} at most"
    )
    reports = []
    for precision in arguments.precisions:
        entered = enter_each(precision, data, shape)
        reports.append(bench(arguments, entered, device, cells))
        print(table(reports[-1]) + "\n", flush=True)
    described = {"shape": dataclasses.asdict(shape), "cpu": cpu_name(), "data": facts}
    write_json(arguments.json, described | {"reports": reports})
