"""The report of all calls so far: three files in one folder, which are enough to send home.

report.txt    what a person reads: every stage with its verdict and its telling lines, and at
              the end the lines for the column *on a GPU* of docs/evidence.md
report.json   the same with all figures; a later call finds there what is done
logs.tar.gz   everything that was printed, and the traces, as far as they fit into `MOST`
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import re
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

from nanolm.errors import UserError
from nanolm.files import write_json, write_text
from nanolm.tools.first_contact.entry import Entry
from nanolm.tools.first_contact.measurement import LEFT_OUT, read_figures
from nanolm.tools.first_contact.rows import evidence_lines
from nanolm.tools.first_contact.runner import Ended
from nanolm.tools.first_contact.stages import Stage
from nanolm.tools.first_contact.verdict import today

MOST = 12_000_000
"""Bytes of logs.tar.gz."""
WIDEST, LONGEST = 220, 40
"""Characters of a telling line, lines of a stage."""
LAST = 8
"""Last lines of a log that are shown when something failed."""


def entry_of(stage: Stage, ended: Sequence[Ended], seconds: float, limit: float) -> Entry:
    """The entry of a stage that was begun; without device."""
    words = [
        f"{end.log.stem} was stopped after {limit:.0f} s"
        if end.stopped
        else f"{end.log.stem} ended with {end.status}"
        for end in ended
        if end.stopped or end.status not in (0, LEFT_OUT)
    ]
    missing = all(end.status == LEFT_OUT for end in ended)
    lines = [line for end in ended for line in telling(stage, end)]
    return Entry(
        name=stage.name,
        part=stage.part,
        verdict="FAIL" if words else "left out" if missing else "ok",
        words="; ".join(words),
        seconds=seconds,
        day=today(),
        lines=list(dict.fromkeys(lines))[:LONGEST],
        figures={end.log.stem: found for end in ended if (found := figures_of(end.log))},
    )


def telling(stage: Stage, ended: Ended) -> list[str]:
    """The lines of a log that are worth the report; when it failed, the last ones too."""
    text = ended.log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip()[:WIDEST] for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(stage.tells, line)]
    if ended.status == LEFT_OUT:
        return lines[-1:]
    return found if ended.status == 0 else [*found[: LONGEST - LAST], *lines[-LAST:]]


def figures_of(log: pathlib.Path) -> list[Any]:
    """What a stage's process wrote as figures beside its log."""
    lines, whole = log.with_suffix(".jsonl"), log.with_suffix(".json")
    if lines.is_file():
        return read_figures(lines)
    if not whole.is_file():
        return []
    try:
        return json.loads(whole.read_text(encoding="utf-8"))
    except ValueError:  # the writer was killed in it
        return []


class Report:
    """Entries by stage, on disk after each; made from what an earlier call has left."""

    def __init__(self, folder: pathlib.Path, logs: pathlib.Path, fresh: bool) -> None:
        self.folder, self.logs = folder, logs
        self.entries: dict[str, Entry] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in ("report.txt", "report.json", "logs.tar.gz"):
                (folder / name).unlink(missing_ok=True)
        self._load()

    def _load(self) -> None:
        path = self.folder / "report.json"
        if path.is_file():
            try:
                stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
                self.entries = {stage["name"]: Entry(**stage) for stage in stages}
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path} is no report of an earlier call; move it away, or give --fresh true"
                ) from None
        packed = self.folder / "logs.tar.gz"
        if packed.is_file():
            with tarfile.open(packed) as tar:
                tar.extractall(self.logs, filter="data")

    def done(self, name: str, device: str) -> bool:
        """Whether an earlier call has finished this stage well on a device of this name."""
        entry = self.entries.get(name)
        return entry is not None and entry.verdict == "ok" and entry.device == device

    def add(self, entry: Entry, order: Iterable[str]) -> None:
        """Puts an entry where it belongs, in place of an older one, and writes the report."""
        self.entries[entry.name] = entry
        known = [name for name in order if name in self.entries]
        self.entries = {name: self.entries[name] for name in known}
        self.write()

    def write(self) -> None:
        """Writes report.txt and report.json, each whole or not at all."""
        entries = list(self.entries.values())
        rows = evidence_lines(self.entries)
        stages = [dataclasses.asdict(entry) for entry in entries]
        write_text(self.folder / "report.txt", "\n".join(self.text(rows)) + "\n")
        write_json(self.folder / "report.json", {"stages": stages, "rows": rows})

    def text(self, rows: list[str]) -> list[str]:
        """The lines of report.txt."""
        lines = ["nanolm: first contact with a GPU"]
        for part in sorted({entry.part for entry in self.entries.values()}):
            lines += ["", f"part {part}"]
            for entry in self.entries.values():
                lines += entry.text() if entry.part == part else []
        if rows:
            lines += ["", "for the column *on a GPU* of docs/evidence.md and benchmarks.md:", *rows]
        return lines

    def pack(self) -> str:
        """Writes logs.tar.gz, the smallest logs first; what it holds, in words."""
        paths = [path for path in self.logs.rglob("*") if path.is_file()]
        sizes = {path: len(gzip.compress(path.read_bytes(), 6)) for path in paths}
        kept, total = [], 0
        for path in sorted(paths, key=sizes.__getitem__):
            total += sizes[path]
            if total <= MOST:
                kept.append(path)
        with tarfile.open(self.folder / "logs.tar.gz", "w:gz", compresslevel=6) as tar:
            for path in kept:
                tar.add(path, path.relative_to(self.logs))
        lost = ", ".join(path.name for path in paths if path not in kept)
        return f"{len(kept)} files" + (f"; too large to be among them: {lost}" if lost else "")


def forget(logs: pathlib.Path, names: Iterable[str]) -> None:
    """Removes what an earlier attempt at a stage has left in the folder of logs."""
    for name in names:
        for path in logs.glob(f"{name}.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
