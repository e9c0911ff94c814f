"""Reading what runs wrote: metrics.jsonl and summary.json, for tables and plots.

Every line of metrics.jsonl is a JSON object with `step` and `kind` ("train" or "val").
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from nanolm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder, read."""

    folder: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    problems: list[str] = dataclasses.field(default_factory=list)
    """What of it could not be read, a sentence each."""

    def curve(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one figure over the run, where it was recorded."""
        points = [
            (line["step"], line[key])
            for line in self.lines
            if line.get("kind") == kind and "step" in line and is_number(line.get(key))
        ]
        return [step for step, _ in points], [value for _, value in points]

    def setting(self, section: str, key: str) -> Any:
        """A key of the config, None where it has no such section or key."""
        found = self.config.get(section)
        return found.get(key) if isinstance(found, dict) else None

    def last(self, kind: str, key: str) -> float | None:
        """The newest value of a figure, None when it was never recorded."""
        values = self.curve(kind, key)[1]
        return values[-1] if values else None


def read_run(folder: str | pathlib.Path) -> Run:
    """The run in `folder`; raises UserError when it holds none. A line of its metrics that is torn,
    and a summary or a config that is, are left out and told in `problems`."""
    from nanolm.config import strict_yaml  # noqa: PLC0415  (keeps `nanolm runs` quick)

    folder = pathlib.Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder} holds no run: there is no metrics.jsonl in it")
    lines, problems = [], []
    for number, raw in enumerate(metrics.read_bytes().split(b"\n"), start=1):
        line = json_object(raw)
        if line is None or not is_number(line.get("step", 0)):  # torn by a kill, or another hand
            problems.append(f"{metrics} line {number} is not JSON and was left out")
        elif line:
            lines.append(line)
    path, config = folder / "config.yaml", {}
    if path.is_file():
        try:
            config = strict_yaml.read_mapping(path)
        except UserError as error:
            problems.append(f"{error}; it was left out")
    path = folder / "summary.json"
    summary = json_object(path.read_bytes() if path.is_file() else b"")
    if summary is None:
        problems.append(f"{path} is not JSON and was left out")
    return Run(folder, config, lines, summary or {}, problems)


def json_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object that bytes are, an empty one for none; None when they are anything else."""
    try:
        value = json.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_number(value: Any) -> bool:
    """Whether a figure is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
