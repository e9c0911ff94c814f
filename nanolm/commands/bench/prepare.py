"""`nanolm bench prepare SOURCE…`: how near preparation comes to the encoders that it runs."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import Annotated, Any

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count, Within
from nanolm.data.prepare.config import PrepareConfig
from nanolm.tools.bench.corpus import grow
from nanolm.tools.bench.prepare import bench_prepare, print_bench

POSITIONAL = ("sources",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure `nanolm prepare` beside its encoder alone: SentencePiece, or `tokenizers`."""

    sources: list[str]
    """Text to prepare, as for `nanolm prepare`."""
    tokenizer_types: list[str] = dataclasses.field(default_factory=lambda: ["unigram", "bpe"])
    """Kinds of tokenizer."""
    tokenizer: str | None = None
    """A tokenizer that exists, as for `nanolm prepare`, in place of kinds that are trained."""
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
    """A row for each kind of tokenizer, or one for the tokenizer that is given."""
    given = PrepareConfig(
        out="", sources=sources, workers=arguments.workers, text_field=arguments.text_field
    )
    kinds: list[dict[str, Any]] = [
        {"tokenizer_type": kind, "vocab_size": arguments.vocab_size}
        for kind in arguments.tokenizer_types
    ]
    if arguments.tokenizer is not None:
        kinds = [{"tokenizer": arguments.tokenizer}]
    rows = [
        bench_prepare(
            dataclasses.replace(given, **kind),
            workers=given.processes(),
            repeats=arguments.repeats,
        )
        for kind in kinds
    ]
    print_bench(rows)
    write_json(arguments.json, rows)
