"""Walking folders for input: sorted, each file once, and nothing is left out without a count.

What nanolm wrote (prepared data, runs, checkpoints) is never input, so that `--out` may stand
inside the folder that is read. Links are followed, each folder and file is taken once.
"""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from nanolm.data.readers import format_of, suffixes
from nanolm.errors import UserError

# Names that stand together in a folder only where nanolm wrote it.
OURS = (
    {"manifest.json", "tokenizer.model"},
    {"manifest.json", "unigram.npy"},
    {"config.yaml", "metrics.jsonl"},
    {"config.yaml", "checkpoints"},
    {"index.json", "config.yaml"},
)


def written_by_nanolm(folder: str, names: Sequence[str]) -> bool:
    """Whether a folder that holds these names is prepared data, a preparation under way, a run or
    a checkpoint."""
    under_way = ".work" in names and os.path.isfile(os.path.join(folder, ".work", "lock"))
    return under_way or any(group <= set(names) for group in OURS)


class Walk:
    """Finds files below folders and among matches; what it passes over is added to a Counter.

    exclude: patterns as of a shell, matched against a name and against the path from the folder
    that is walked; out: a folder that is passed over without a count, since whether it exists
    already must not change the result.
    """

    def __init__(self, exclude: Sequence[str], out: str, passed_over: Counter) -> None:
        self.exclude = exclude
        self.out = os.path.realpath(out) if out else None
        self.passed_over = passed_over
        self.seen: set[str] = set()

    def matches(self, paths: Iterable[str]) -> Iterator[str]:
        """The files among what a glob found, and those in the folders among it."""
        paths = list(paths)
        for path in paths:
            if os.path.isdir(path):
                yield from self.entered(path, os.path.basename(path))
            else:
                yield from self.file(path, os.path.basename(path))

    def folder(self, root: str) -> Iterator[str]:
        """The files below a folder."""
        yield from self.entered(root, "")

    def entered(self, folder: str, inside: str) -> Iterator[str]:
        """The files of a folder, `inside` being its path from where the walk began."""
        real = os.path.realpath(folder)
        if real in self.seen or (inside and real == self.out):
            return
        if inside and self.excluded(inside):
            self.passed_over["excluded"] += 1
            return
        self.seen.add(real)
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
        if written_by_nanolm(folder, names):
            self.passed_over["folder that nanolm wrote"] += 1
            return
        inner = [name for name in names if os.path.isdir(os.path.join(folder, name))]
        for name in [*(name for name in names if name not in inner), *inner]:
            path, place = os.path.join(folder, name), f"{inside}/{name}".lstrip("/")
            if name == "__pycache__" or (name.startswith(".") and name != "."):
                self.passed_over["hidden"] += 1
            elif name in inner:
                yield from self.entered(path, place)
            else:
                yield from self.file(path, place)

    def file(self, path: str, inside: str) -> Iterator[str]:
        """The file, unless it was taken already, is excluded or of a format that is not read."""
        real = os.path.realpath(path)
        if real in self.seen:
            return
        self.seen.add(real)
        if self.excluded(inside):
            self.passed_over["excluded"] += 1
        elif not os.path.exists(path):
            self.passed_over["broken link"] += 1
        elif not os.path.isfile(path):
            self.passed_over["no regular file"] += 1
        elif format_of(path) is None:
            self.passed_over["".join(suffixes(path)) or "no extension"] += 1
        else:
            yield path

    def excluded(self, inside: str) -> bool:
        """Whether a pattern names it, by its name or its path from where the walk began."""
        name = os.path.basename(inside)
        return any(
            fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(inside, pattern)
            for pattern in (pattern.rstrip("/") for pattern in self.exclude)
        )
