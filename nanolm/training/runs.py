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
            if line.get("kind") == kind and line.get(key) is not None
        ]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, kind: str, key: str) -> float | None:
        """The newest value of a figure, None when it was never recorded."""
        values = self.curve(kind, key)[1]
        return values[-1] if values else None


def read_run(folder: str | pathlib.Path) -> Run:
    """The run in `folder`; raises UserError when it holds none. A line of its metrics that
    is torn is left out and told in `problems`."""
    from nanolm.config import strict_yaml  # noqa: PLC0415  (keeps `nanolm runs` quick)

    folder = pathlib.Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder} holds no run: there is no metrics.jsonl in it")
    lines, problems = [], []
    for number, raw in enumerate(metrics.read_bytes().split(b"\n"), start=1):
        try:
            line = json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):  # torn by a kill, or by another hand
            problems.append(f"{metrics} line {number} is not JSON and was left out")
        elif line:
            lines.append(line)
    config, summary = folder / "config.yaml", folder / "summary.json"
    return Run(
        folder,
        strict_yaml.read_mapping(config) if config.is_file() else {},
        lines,
        json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        problems,
    )
