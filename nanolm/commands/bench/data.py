"""`nanolm bench data DIR`: tokens per second of the loader, beside loaders as people write them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from nanolm.commands.json_file import write_json
from nanolm.config.ranges import Count, Within
from nanolm.tools.bench.data import bench_data, print_bench

POSITIONAL = ("directory",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the loader."""

    directory: str
    """Folder that `nanolm prepare` wrote."""
    split: str = "train"
    """Split to read."""
    batch: Count = 16
    """Rows per batch."""
    length: Annotated[int, Within(2, 1 << 31)] = 1024
    """Tokens per row."""
    repeats: Count = 5
    """Interleaved repetitions; the median is reported."""
    json: str | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> None:
    """Measure and print."""
    figures = bench_data(
        arguments.directory,
        arguments.split,
        batch=arguments.batch,
        length=arguments.length,
        repeats=arguments.repeats,
    )
    print_bench(figures)
    write_json(arguments.json, figures)
