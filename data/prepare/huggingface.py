"""The source `hf:NAME[:SPLIT[:CONFIG]]`: a data set of the Hugging Face library `datasets`.

NAME may be a local directory. The library is an extra; it keeps data sets in its own cache on disk,
from which every process reads its range of rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nanolm.data.prepare.sources import SOURCES, SourceOptions
from nanolm.data.readers import no_field
from nanolm.errors import UserError

ROWS_PER_PIECE = 4096


@functools.lru_cache(maxsize=2)
def open_dataset(name: str, split: str, config: str | None) -> Any:
    """The data set; raises UserError when `datasets` is missing or does not find it."""
    try:
        import datasets  # noqa: PLC0415 (an extra, and slow to import)
    except ImportError as error:
        raise UserError(
            f"the source hf:{name} needs the library datasets; install nanolm[hf]"
        ) from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, of which none is ours to list
        raise UserError(f"cannot load hf:{name}:{split} ({error})") from error


@dataclasses.dataclass(frozen=True)
class RowsPiece:
    """Rows [begin, end) of a data set."""

    name: str
    split: str
    config: str | None
    begin: int
    end: int
    size: int
    text_field: str
    version: str

    @property
    def label(self) -> str:
        """What error messages call it."""
        return f"hf:{self.name}:{self.split}"

    def identity(self) -> list:
        """The range, and the library's fingerprint of the data."""
        return [self.label, self.config, self.begin, self.end, self.version]

    def documents(self, counts: Counter) -> Iterator[str]:
        """The texts of the rows, in order."""
        column = open_dataset(self.name, self.split, self.config).select_columns(self.text_field)
        for begin in range(self.begin, self.end, 256):
            for text in column[begin : min(self.end, begin + 256)][self.text_field]:
                if isinstance(text, str):
                    yield text
                else:
                    counts[f"dropped/no text in field {self.text_field}"] += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions(SourceOptions):
    """Options of the source `hf`."""

    name: str = "hf"


@SOURCES.register("hf", options=HuggingFaceOptions)
class HuggingFace:
    """A data set by name, split (default train) and configuration."""

    heeds = ("text_field",)

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        name, _, rest = options.argument.partition(":")
        split, _, config = rest.partition(":")
        self.name, self.split, self.config = name, split or "train", config or None

    def pieces(self) -> Iterator[RowsPiece]:
        """Ranges of 4,096 rows."""
        rows = open_dataset(self.name, self.split, self.config)
        if self.options.text_field not in rows.column_names:
            label = f"hf:{self.name}:{self.split}"
            raise UserError(no_field(label, self.options.text_field, rows.column_names))
        share = rows.data.nbytes / max(1, len(rows))
        for begin in range(0, len(rows), ROWS_PER_PIECE):
            end = min(len(rows), begin + ROWS_PER_PIECE)
            yield RowsPiece(
                self.name,
                self.split,
                self.config,
                begin,
                end,
                int(share * (end - begin)),
                self.options.text_field,
                rows._fingerprint,
            )
