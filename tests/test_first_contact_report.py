"""What `make gpu` writes: figures of processes, and the lines for the tables of the docs."""

import os
import pathlib
import sys

from nanolm.tools.first_contact import (
    report,
    rows,
)
from nanolm.tools.first_contact.entry import Entry
from nanolm.tools.first_contact.measurement import Figures, read_figures
from nanolm.tools.first_contact.report import Report
from nanolm.tools.first_contact.stages import Table

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = sys.executable


def test_figures_of_a_process_that_was_killed_are_there(tmp_path):
    figures = Figures(str(tmp_path / "x.jsonl"))
    figures.add({"a": 1})
    figures.add({"b": "ü"})
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"c": 3, "d')
    assert read_figures(tmp_path / "x.jsonl") == [{"a": 1}, {"b": "ü"}]
    (tmp_path / "y.json").write_text('[{"e": 5}]')
    (tmp_path / "z.json").write_text('[{"e": 5}')
    logs = [report.figures_of(tmp_path / f"{name}.txt") for name in ("x", "y", "z", "none")]
    assert logs == [[{"a": 1}, {"b": "ü"}], [{"e": 5}], [], []]


def test_a_trace_that_is_too_large_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST", 5000)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.txt").write_text("small")
    (logs / "b.chrome.json").write_bytes(os.urandom(9000))
    kept = Report(tmp_path / "out", logs, False)
    assert kept.pack() == "1 files; too large to be among them: b.chrome.json"
    assert (tmp_path / "out" / "logs.tar.gz").stat().st_size < 5000


def entry(name, verdict="ok", figures=(), **more):
    day, device = "2026-01-31", "NVIDIA H100"
    found = {name: list(figures)}
    return Entry(name=name, part=1, verdict=verdict, day=day, device=device, figures=found, **more)


def test_the_lines_for_the_tables_of_evidence_name_their_rows():
    pages = [ROOT / "docs" / name for name in ("evidence.md", "benchmarks.md")]
    tables = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for row in rows.ROWS:
        assert tables.count(f"\n| {row.name}") == 1, f"no table of evidence has a row {row.name!r}"
    names = {each.name for each in Table("cuda", 2, pathlib.Path("logs")).stages()}
    assert {name for row in rows.ROWS for name in row.stages} <= names


def test_a_line_for_the_readme_needs_all_of_its_stages():
    step = {"contestant": "nanolm", "precision": "bf16", "free_step_ms": 30.0, "mfu": 0.4}
    step |= {"tokens_per_second": 3e5, "peak_bytes": 10, "compile": True, "losses": [9.0, 8.0]}
    other = step | {"contestant": "plain-gpt", "tokens_per_second": 2e5, "peak_bytes": 20}
    found = {
        name: entry(name, figures=[other if "-plain" in name else step]) for name in rows.STEPS
    }
    for name in rows.STEPS:
        if "transformers" in name:
            found[name] = entry(name, "left out")
    (line,) = rows.evidence_lines(found)
    assert line.startswith("| step time beside | `make gpu ONLY='clm clm-compiled clm-plain ")
    assert "| passed, NVIDIA H100, 2026-01-31: GPT-2 124M bf16: 30.0 ms, 300,000 tokens/s" in line
    assert "MFU 40.0%, 1.50x the fastest other (plain-gpt, compiled), memory 0.50x" in line
    found["mlm"] = entry("mlm", "FAIL")
    assert "| FAILED, " in rows.evidence_lines(found)[0]
    found["mlm"] = entry("mlm", "not begun")
    assert rows.evidence_lines(found) == []
    assert rows.evidence_lines({}) == []


def test_the_line_of_the_kernels_says_what_is_wrong():
    good = {"op": "norm", "check": "a", "kernel": "triton", "dtype": "torch.bfloat16", "ok": True}
    good |= {"error": 2e-3, "same_bits": True, "words": "…"}
    bad = good | {"ok": False, "error": 0.7, "check": "wide rows", "same_bits": False}
    raising = {"op": "glu", "check": "b", "kernel": "triton", "dtype": "torch.float16"}
    raising |= {"ok": False, "words": "it raises"}
    stages = {"numerics": entry("numerics", "FAIL", [good, bad, raising])}
    line = next(line for line in rows.evidence_lines(stages) if line.startswith("| Triton"))
    assert "3 checks at real sizes against float64, 2 wrong; bfloat16 at most 7.0e-01" in line
    assert "the same bits twice in 1 of 2; glu triton: b; norm triton: wide rows" in line


# The table of stages
