"""Sources: where raw text comes from, cut into pieces that separate processes can read.

First stop of a batch's journey. A source is named in `PrepareConfig.sources` by a path (file, glob
or folder), by `stdlib`, by `hf:NAME[:SPLIT[:CONFIG]]`, or by `NAME[:ARGUMENT]` of a plug-in that
registers itself in `SOURCES`. It answers with `pieces()`, in an order that never varies; each piece
is small, can be pickled, and yields its documents in order.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

from nanolm.data.prepare.folders import Walk
from nanolm.data.readers import FilePiece, NoFieldError, file_pieces, format_of, suffixes
from nanolm.data.text_files import AUTO
from nanolm.errors import UserError
from nanolm.registry import Options, Registry

SOURCES = Registry("data source")
# Directories of the standard library that are no library (installed packages and test suites), or
# hold tables and manual pages as modules: code pages and the texts of pydoc's help are 18 % of
# its bytes, and a small model that learns them writes columns of numbers instead of Python.
NOT_STDLIB = {
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib-dynload",
}


class Piece(Protocol):
    """A run of documents that one process reads from beginning to end. Picklable."""

    size: int
    """About how many bytes it holds (balances work and drives the progress bar)."""
    label: str
    """What error messages call it."""

    def documents(self, counts: Counter) -> Iterator[bytes | str]:
        """The documents in order; what is left out is counted as `dropped/REASON` in `counts`."""
        ...

    def identity(self) -> list:
        """What must not change between an interrupted preparation and its continuation."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions(Options):
    """What every source is told; a plug-in's own options dataclass extends it."""

    argument: str = ""
    """What stands after the name and a colon (for files: the path, glob or folder)."""
    text_field: str = "text"
    """Field or column that holds the text (.jsonl, .parquet, Hugging Face data sets)."""
    txt_documents: str = "auto"
    """What a document is in a .txt file: auto, file, line or paragraph."""
    encoding: str = AUTO
    """Encoding of text files without a byte-order mark; auto is UTF-8."""
    exclude: tuple[str, ...] = ()
    """Patterns of names or paths in folders that are passed over."""
    out: str = ""
    """The folder that is being written, which is never input."""


SHARED_KEYS = ("exclude", "text_field", "txt_documents", "encoding")
"""The keys of `PrepareConfig` that every source is told, and not every source has a use for."""
HEEDED_BY_FORMAT = {
    "txt": {"exclude", "txt_documents", "encoding"},
    "file": {"exclude", "encoding"},
    "json": {"exclude", "text_field", "encoding"},
    "parquet": {"exclude", "text_field"},
}


class Source(Protocol):
    """Built from its options dataclass.

    One that leaves files out counts them by kind in a Counter `passed_over`, whole when all its
    pieces have been taken. One that heeds only some of the keys in `SHARED_KEYS` says so in an
    attribute `heeds`, so that the others are refused instead of being ignored.
    """

    def pieces(self) -> Iterable[Piece]:
        """All pieces, in an order that depends on nothing but the source."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesOptions(SourceOptions):
    """Options of the source `files`."""

    name: str = "files"


@SOURCES.register("files", options=FilesOptions)
class Files:
    """A file, a glob pattern or a folder (walked in sorted order, see `folders.py`)."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.passed_over: Counter = Counter()

    @property
    def heeds(self) -> Collection[str]:
        """Of a file that is named, what its format has a use for; of a folder or a glob, which may
        hold any format, everything."""
        argument = self.options.argument
        kind = format_of(argument) if os.path.isfile(argument) else None
        return HEEDED_BY_FORMAT[kind] if kind else SHARED_KEYS

    def pieces(self) -> Iterator[FilePiece]:
        """Pieces of every file found; raises UserError when there is none."""
        paths = self.paths()
        # One stray file of a folder does not stop the others; a file that was named does.
        named = paths == [self.options.argument]
        strays: list[NoFieldError] = []
        for path in paths:
            try:
                yield from self.pieces_of(path)
            except NoFieldError as error:
                if named:
                    raise
                if suffixes(path)[0] != ".json":  # a file of records, and no chance find
                    name = os.path.basename(path)
                    raise NoFieldError(f"{error}, or leave it out with --exclude {name}") from None
                strays.append(error)
        if strays:
            self.passed_over[f".json without {self.options.text_field!r}"] += len(strays)
        if strays and len(strays) == len(paths):
            raise strays[0]

    def pieces_of(self, path: str) -> Iterator[FilePiece]:
        """Pieces of one file."""
        return file_pieces(
            path,
            text_field=self.options.text_field,
            txt_documents=self.options.txt_documents,
            encoding=self.options.encoding,
        )

    def paths(self) -> list[str]:
        """The files, sorted, none where the one that was named is excluded (a shell's own pattern
        names each file); raises UserError when nothing readable is there."""
        argument = self.options.argument
        walk = Walk(self.options.exclude, self.options.out, self.passed_over)
        if os.path.isfile(argument):
            if walk.excluded(argument):
                self.passed_over["excluded"] += 1
                return []
            if format_of(argument) is None:
                raise UserError(f"{argument} is of no format that nanolm reads; {advice(argument)}")
            return [argument]
        if os.path.isdir(argument):
            found = list(walk.folder(argument))
        elif glob.has_magic(argument):
            found = list(walk.matches(sorted(glob.glob(argument, recursive=True))))
        else:
            raise UserError(
                f"there is no file, folder or source {argument!r}; check the path, or choose a "
                f"source from {', '.join(name for name in SOURCES.names() if name != 'files')}"
            )
        if not found:
            over = ", ".join(f"{count} {what}" for what, count in self.passed_over.items())
            told = f" (passed over: {over})" if over else ""
            raise UserError(f"{argument} holds nothing to read{told}; {FORMATS_SENTENCE}")
        return found


FORMATS_SENTENCE = (
    "use .txt, .md, .py, .jsonl, .ndjson or .json (also .gz, .zst, .xz or .bz2), or .parquet files"
)
TABLES = (".csv", ".tsv", ".conll", ".bio", ".iob")


def advice(path: str) -> str:
    """What to do about a file of another format."""
    if suffixes(path)[0] in TABLES:
        return f"for the texts of one of its columns, write table:{path}:COLUMN"
    return FORMATS_SENTENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibraryOptions(SourceOptions):
    """Options of the source `stdlib`."""

    name: str = "stdlib"


@SOURCES.register("stdlib", options=StandardLibraryOptions)
class StandardLibrary:
    """The .py files of the running Python's own standard library, without its test suites, code
    pages and help texts.

    Every installation carries them, so a fresh machine has a corpus (about 10 MB; it differs by
    Python version).
    """

    heeds = ("exclude",)

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.passed_over: Counter = Counter()
        self.walk = Walk(options.exclude, "", self.passed_over)
        self.root = pathlib.Path(sysconfig.get_path("stdlib"))

    def pieces(self) -> Iterator[FilePiece]:
        """One piece a file, sorted by path relative to the library."""
        for path in self.paths():
            yield from file_pieces(
                str(self.root / path),
                text_field=self.options.text_field,
                txt_documents="file",
            )

    def paths(self) -> list[str]:
        """Relative paths; raises UserError when this Python carries no sources, or none is left."""
        found = []
        self.passed_over.clear()
        for root, directories, names in os.walk(self.root):
            inside = pathlib.Path(root).relative_to(self.root)
            # Build records (config-*, _sysconfigdata*) name the machine, not the language.
            directories[:] = self.kept(
                inside,
                (n for n in directories if n not in NOT_STDLIB and not n.startswith("config-")),
            )
            modules = (n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata"))
            found += [(inside / name).as_posix() for name in self.kept(inside, modules)]
        if not found and self.passed_over:
            raise UserError(
                f"--exclude {' '.join(self.options.exclude)} leaves nothing of the standard "
                f"library; exclude less"
            )
        if not found:
            raise UserError(
                f"this Python has no library sources under {self.root}; name files instead of "
                f"`stdlib`"
            )
        return sorted(found)

    def kept(self, inside: pathlib.Path, names: Iterable[str]) -> list[str]:
        """The names in a folder that no pattern excludes; the others are counted."""
        names = list(names)
        left = [name for name in names if not self.walk.excluded((inside / name).as_posix())]
        if len(left) < len(names):
            self.passed_over["excluded"] += len(names) - len(left)
        return left


def name_and_argument(spec: str) -> tuple[str, str]:
    """Which source a `sources` entry means, and what stands after its colon."""
    name, _, argument = spec.partition(":")
    if os.path.exists(spec) or name not in SOURCES.names() or name == "files":
        return "files", spec.removeprefix("files:")
    return name, argument


def build_source(spec: str, common: dict[str, Any], own: dict[str, dict[str, Any]]) -> Source:
    """The source that a `sources` entry names.

    common: fields of `SourceOptions` that hold for all; own: name -> keys of that source's own
    options. Raises UserError for an unknown key, a wrong type or an unknown source.
    """
    name, argument = name_and_argument(spec)
    entry = SOURCES.get(name)
    options = entry.options or SourceOptions
    extra = own.get(name, {})
    kinds = {field.name: field for field in dataclasses.fields(options)}
    for key, value in extra.items():
        if key not in kinds:
            raise UserError(f"source_options.{name}.{key}: the source {name} has no such option")
        default = kinds[key].default
        if default is not dataclasses.MISSING and not _same_kind(value, default):
            raise UserError(
                f"source_options.{name}.{key} must be {type(default).__name__}, not {value!r}"
            )
    return entry.build(options(**{"name": name, "argument": argument, **common, **extra}))


def require_heeded(
    sources: Sequence[tuple[str, Source]], told: Collection[str], own: Collection[str]
) -> None:
    """Refuse what none of the sources has a use for, so that nothing is ignored in silence.

    sources: what `sources` says, and the source that it means; told: the keys of `SHARED_KEYS` that
    are not at their default; own: the names in `source_options`. Raises UserError for the first key
    that no source heeds, and for a name that no source has.
    """
    specs = ", ".join(spec for spec, _ in sources)
    for key in told:
        if not any(key in getattr(source, "heeds", SHARED_KEYS) for _, source in sources):
            raise UserError(f"{key} has no effect on {specs}; leave --{key} out")
    unknown = set(own) - {name_and_argument(spec)[0] for spec, _ in sources}
    for name in sorted(unknown):
        raise UserError(
            f"source_options.{name} is for a source {name}, and sources names {specs}; leave these "
            f"options out"
        )


def _same_kind(value: Any, default: Any) -> bool:
    if default is None or (isinstance(default, float) and isinstance(value, int)):
        return True
    return type(value) is type(default)
