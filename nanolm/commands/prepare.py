"""`nanolm prepare`: raw text in, tokenizer and token shards out."""

from __future__ import annotations

import dataclasses

from nanolm.commands.json_file import write_json
from nanolm.config.load import import_plugins, parse, read_files, split_words
from nanolm.data.prepare.config import TRAINING, require_one_tokenizer
from nanolm.data.prepare.pipeline import PrepareConfig, prepare
from nanolm.data.prepare.report import figures, render
from nanolm.tables import show

POSITIONAL = ("sources",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(PrepareConfig):
    """From raw text to a tokenizer and token shards."""

    plugins: list[str] = dataclasses.field(default_factory=list)
    """Modules imported first; their data sources can be named in sources."""
    json: str | None = None
    """Also write the summary to this file."""


def main(argv: list[str]) -> None:
    """Reads the command line and prepares; what says how to train a tokenizer is refused beside one
    that is given, also where it says what is usual."""
    arguments = parse(Arguments, argv, prog="nanolm prepare", positional=POSITIONAL)
    words = split_words(argv)
    said = {*words, *read_files(dict(words), {})}
    require_one_tokenizer(arguments.tokenizer, [key for key in TRAINING if key in said])
    run(arguments)


def run(arguments: Arguments) -> None:
    """Prepare and print the summary."""
    import_plugins(arguments.plugins)
    names = [field.name for field in dataclasses.fields(PrepareConfig)]
    keys = {name: getattr(arguments, name) for name in names}
    summary = prepare(PrepareConfig(**keys))
    show(*render(summary))
    write_json(arguments.json, figures(summary))
