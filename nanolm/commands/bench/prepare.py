"""`nanolm bench prepare SOURCE…`: how near preparation comes to the encoders that it runs."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import Annotated

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count, Within
from nanolm.data.prepare.config import PrepareConfig
from nanolm.tools.bench.corpus import grow
from nanolm.tools.bench.prepare import bench_prepare, print_bench

POSITIONAL = ("sources",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure `nanolm prepare` beside SentencePiece alone."""

    sources: list[str]
    """Text to prepare, as for `nanolm prepare`."""
    tokenizer_types: list[str] = dataclasses.field(default_factory=lambda: ["unigram", "bpe"])
    """Kinds of tokenizer."""
    vocab_size: Count = 8192
    """Pieces of the vocabulary."""
    text_field: str = "text"
    """The field that holds the text in .jsonl and .parquet sources."""
    workers: Count | None = None
    """Processes; null means one for each core."""
    repeats: Count = 3
    """Interleaved repetitions; the median is reported."""
    grow: Annotated[int, Within(1)] | None = None
    """Prepare this many bytes of text, grown from the sources' sentences; null: the sources."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Grow the corpus if asked to, measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        sources = arguments.sources
        if arguments.grow is not None:
            corpus = pathlib.Path(folder) / "corpus"
            sources = [grow(sources, arguments.text_field, arguments.grow, corpus)]
        measure(arguments, sources)


def measure(arguments: Arguments, sources: list[str]) -> None:
    """A row for each kind of tokenizer."""
    workers = PrepareConfig(out="", sources=[], workers=arguments.workers).processes()
    rows = [
        bench_prepare(
            sources,
            kind=kind,
            vocab_size=arguments.vocab_size,
            text_field=arguments.text_field,
            workers=workers,
            repeats=arguments.repeats,
        )
        for kind in arguments.tokenizer_types
    ]
    print_bench(rows)
    write_json(arguments.json, rows)
