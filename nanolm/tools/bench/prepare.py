"""How near `nanolm prepare` comes to the encoder that it is built on, and what memory it takes.

Encoding is what a preparation cannot do without: SentencePiece, or the package `tokenizers` where
the tokenizer is a tokenizer.json, turns text into ids, one process a core. So the yardstick is that
package alone: as many processes as `prepare` has workers encode the same documents at the same
time, and their rates are added up. Beside that stand the rates of
`prepare`: of its encoding phase (which also reads its spool, drops duplicates, splits and writes
arrays) and of the whole run. Repetitions are interleaved; the figures are medians, MB = 10^6 bytes
of text.

    alone, one process      rate of one encoder while nothing else runs
    alone, w processes      the sum over w of them at once
    prepare: encoding       text bytes over seconds of its encoding phase
    prepare: everything     the same over all phases, training of the tokenizer included
    peak memory             highest resident set of the command and of its largest worker
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import sentencepiece
from rich.console import Console

from nanolm.data.json_pieces import is_json, published
from nanolm.data.prepare.config import PrepareConfig
from nanolm.data.shards.directory import open_split
from nanolm.data.tokenizer import MODEL_FILE, Tokenizer
from nanolm.errors import UserError, require
from nanolm.tables import open_console, tables
from nanolm.terminal import say

MB, MIB = 1e6, 1 << 20
CHILD = r"""
import json, re, resource, sys, time
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.progress import Silent
begin = time.perf_counter()
summary = prepare(PrepareConfig(**json.loads(sys.argv[1])), Silent())
whole = time.perf_counter() - begin
own = re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
peak = [int(own) * 1024, workers * 1024]
print(json.dumps({"seconds": summary.seconds, "whole": whole, "bytes": summary.encoded_bytes,
                  "peak_bytes": peak}))
"""


def prepare_once(config: PrepareConfig) -> dict[str, Any]:
    """One preparation in a process of its own: seconds by phase, text bytes, peaks of memory."""
    names = ("out", "sources", "tokenizer", "vocab_size", "tokenizer_type", "text_field", "workers")
    keys = {name: getattr(config, name) for name in names}
    command = [sys.executable, "-c", CHILD, json.dumps(keys)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    told = said.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    require(done.returncode == 0, f"prepare failed: {told}")
    return json.loads(done.stdout.splitlines()[-1])


def documents_of(folder: str, limit: int) -> list[str]:
    """Texts of the first documents of the train split, up to `limit` bytes."""
    tokenizer = Tokenizer.load(folder)
    shard = open_split(folder, "train")[1][0]
    texts: list[str] = []
    size = 0
    for number in range(len(shard)):
        text = tokenizer.decode(shard.document(number))
        texts.append(text)
        size += len(text.encode())
        if size > limit:
            break
    return texts


def sentencepiece_encoder(model: str) -> Callable[[list[str]], Any]:
    """What encodes a batch of texts with plain SentencePiece."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    return functools.partial(processor.encode, num_threads=1)


def json_encoder(model: str) -> Callable[[list[str]], Any]:
    """What encodes a batch of texts with the package `tokenizers`, in one thread."""
    import tokenizers  # noqa: PLC0415  (only who has such a file needs it)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    content = pathlib.Path(model).read_bytes()
    plain = tokenizers.Tokenizer.from_str(published(content).decode())
    return functools.partial(plain.encode_batch, add_special_tokens=False)


def encoder_alone(model: str) -> Callable[[list[str]], Any]:
    """What encodes a batch of texts by a prepared folder's file, which has one name for both."""
    described = is_json(pathlib.Path(model).read_bytes())
    return json_encoder(model) if described else sentencepiece_encoder(model)


def encode_alone(model: str, texts: list[str], barrier: Any, rates: Any) -> None:
    """A process that encodes all texts with the encoder alone; puts its bytes per second."""
    try:
        encode = encoder_alone(model)
        size = sum(len(text.encode()) for text in texts)
        encode(texts[:10])
    except BaseException:
        barrier.abort()  # or the other processes would wait for this one
        raise
    barrier.wait()
    begin = time.perf_counter()
    for first in range(0, len(texts), 64):
        encode(texts[first : first + 64])
    rates.put(size / (time.perf_counter() - begin))


def sum_of_encoders(model: str, texts: list[str], processes: int) -> float:
    """Bytes per second of so many encoders that start at the same moment."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(processes), context.Queue()
    arguments = (model, texts, barrier, rates)
    workers = [context.Process(target=encode_alone, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [worker.exitcode for worker in workers if worker.exitcode != 0]
    require(not failed, f"{model} cannot be encoded with alone; what its library said stands above")
    return sum(rates.get() for _ in workers)


def bench_prepare(given: PrepareConfig, *, workers: int, repeats: int) -> dict[str, Any]:
    """Medians of the rates, in bytes a second, the highest peaks of memory in bytes, and the
    seconds of the last run's phases; `given` says all of a preparation but where it goes."""
    rows: list[dict[str, float]] = []
    peaks = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            out = str(pathlib.Path(folder) / f"out-{number}")
            found = prepare_once(dataclasses.replace(given, out=out, workers=workers))
            texts = documents_of(out, 20_000_000)
            model = str(pathlib.Path(out) / MODEL_FILE)
            rows.append(
                {
                    "alone_one": sum_of_encoders(model, texts, 1),
                    "alone_all": sum_of_encoders(model, texts, workers),
                    "encoding": found["bytes"] / found["seconds"]["encoding"],
                    "everything": found["bytes"] / found["whole"],
                }
            )
            peaks = [max(pair) for pair in zip(peaks, found["peak_bytes"], strict=True)]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    ratio = statistics.median(row["encoding"] / row["alone_all"] for row in rows)
    return {
        "kind": given.tokenizer or given.tokenizer_type,
        "bytes": found["bytes"],
        "workers": workers,
        **medians,
        "encoding_over_alone": ratio,
        "peak_bytes": peaks[0],
        "worker_peak_bytes": peaks[1],
        "seconds": found["seconds"],
        "load_average": os.getloadavg()[0],
    }


def print_bench(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Show the figures of `bench_prepare`, a line for each kind of tokenizer."""
    workers = rows[0]["workers"]
    head = ("tokenizer", "alone, 1", f"alone, {workers}", "encoding", "/ alone", "whole", "MiB")
    lines = [
        [
            pathlib.Path(row["kind"]).name,
            f"{row['alone_one'] / MB:.1f}",
            f"{row['alone_all'] / MB:.1f}",
            f"{row['encoding'] / MB:.1f}",
            f"{row['encoding_over_alone']:.2f}",
            f"{row['everything'] / MB:.1f}",
            f"{row['peak_bytes'] / MIB:.0f} + {row['worker_peak_bytes'] / MIB:.0f}",
        ]
        for row in rows
    ]
    console = console or open_console()
    title = f"prepare with {workers} workers, MB of text a second (medians)"
    console.print(title, highlight=False)
    for table in tables(head, lines):
        console.print(table)
    console.print(
        f"alone: the encoder in 1 and in {workers} processes; / alone: encoding over that;\n"
        "MiB: peak memory, + that of each worker",
        highlight=False,
    )
    say(f"{rows[0]['bytes'] / MB:.1f} MB of text; load average {rows[-1]['load_average']:.1f}")
