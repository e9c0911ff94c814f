"""Every table that a command prints fits 80 columns, one row a line, numbers on the right."""

import io
import json
import pathlib
import re
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from nanolm import cli
from nanolm.commands.kernels import compile as compile_kernels
from nanolm.commands.runs import show as show_runs
from nanolm.data.prepare.report import _split_tables
from nanolm.data.shards.directory import Manifest
from nanolm.finetune import repeats, report
from nanolm.finetune.study.table import Sheet, grid_of
from nanolm.tables import beside, cells_of, ending, tables
from nanolm.terminal import WIDEST
from nanolm.tools.bench import data as bench_data
from nanolm.tools.bench import figures as bench_figures
from nanolm.tools.bench import finetune_contest
from nanolm.tools.bench import kernels as bench_kernels
from nanolm.tools.bench import prepare as bench_prepare
from nanolm.tools.bench.scaling import tables_of
from nanolm.training.phases import PHASES

ROOT = pathlib.Path(__file__).parent.parent


def console(width=400):
    return Console(file=io.StringIO(), width=width, color_system=None)


def printed(where):
    return where.file.getvalue()


def row_of_a_run(run, **others):
    figures = {"run": run, "trunk": "encoder_decoder", "objective": "choose_dual", "steps": 200_000}
    losses = dict.fromkeys(("train_loss", "val_loss", "bits_per_byte"), 10.123456)
    return figures | losses | {"tokens_per_second": 1_234_567.0, "finished": False} | others


def of_runs():
    where = console()
    long = "runs/study/out/tiny/kinds-pretrained-38c54d9c5d1afe7e"
    empty = dict.fromkeys(("objective", "train_loss", "val_loss", "bits_per_byte"))
    rows = [row_of_a_run("runs/demo"), row_of_a_run(long), row_of_a_run("runs/new", **empty)]
    show_runs(where, rows, "runs")
    return printed(where)


def of_compare(tmp_path, capsys):
    for name in ("demo-finetune", "demo-random"):
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True)
        (folder / "summary.json").write_text('{"metric": "accuracy", "higher_is_better": true}')
        figures = {"accuracy": 0.5, "macro_f1": 0.5, "expected_calibration_error": 0.123}
        text = json.dumps({"rows": 100, "figures": figures})
        (folder / "evaluation" / "test.json").write_text(text)
    cli.run(["compare", *(str(tmp_path / name) for name in ("demo-finetune", "demo-random"))])
    # The sentence below the table names both folders in full.
    return capsys.readouterr().out.partition("accuracy: ")[0]


def of_an_evaluation(capsys):
    table = types.SimpleNamespace(path="data/test.jsonl")
    split = types.SimpleNamespace(table=[0] * 1000, messages=[])
    split.table = type("Table", (), {"__len__": lambda self: 1000, "path": table.path})()
    report.show("test", split, {"loss": 0.5, "expected_calibration_error": 1234567.0}, None)
    return capsys.readouterr().out


def of_repeats(capsys):
    figure = {"values": [0.123456] * 10, "mean": 0.123456, "std": 0.01}
    runs = [f"seed-{seed}" for seed in range(10)]
    repeats.show({"val": {"best accuracy": figure, "macro_f1": figure}, "runs": runs})
    return capsys.readouterr().out


def of_a_study():
    where = console()
    head = ["row", "variant", "metric", "val", "test", "trained parameters", "seconds", "peak MiB"]
    line = ["package of a function", "pretrained", "accuracy", "0.861 ± 0.004", "0.861 ± 0.004"]
    made = Sheet(head, [[*line, "12,345,678", "1,234", "1,234"]], ["Test split."])
    where.print(grid_of(types.SimpleNamespace(name="tasks"), made))
    return printed(where)


def row_of_a_contest(phases):
    return {
        "compile": True,
        "useful": 0.5,
        "step_seconds": 1.2,
        "cpu_seconds": 2.2,
        "waited_seconds": 1.2,
        "host_waits": 12,
        "tokens_per_second": 1_234_567.0,
        "tokens_per_cpu_second": 1_234_567.0,
        "model_tflops": 1234.5,
        "mfu": 0.512,
        "peak_bytes": 12e9,
        "reserved_bytes": 12e9,
        "training_bytes": 11e9,
        "phases": dict.fromkeys(phases, 1.234),
        "losses": [10.5, 10.25],
    }


def of_contests():
    names = ("nanolm", "nanolm, torch's linear_cross_entropy", "transformers, grouped by length")
    rows = {name: row_of_a_contest(bench_figures.PHASES) for name in names}
    for columns in (bench_figures.COLUMNS, finetune_contest.COLUMNS):
        for device in ("cpu", "cuda"):
            yield from bench_figures.aligned(columns[device], rows)


def of_loaders():
    where = console()
    names = ("nanolm", "memmap", "datasets", "nanolm_plain", "memmap_plain", "datasets_plain")
    rates = {name: 123.4e6 for name in names}
    figures = {"tokens_per_second": rates, "spread": {name: (1.2e6, 345.6e6) for name in names}}
    figures |= {"ratios": dict.fromkeys(names, 12.3), "absent": [], "batch": 16, "length": 1024}
    bench_data.print_bench(figures, where)
    return printed(where)


def of_preparation(capsys):
    where = console(WIDEST)  # what the headings mean is prose, and may wrap
    keys = ("alone_one", "alone_all", "encoding", "everything", "peak_bytes", "worker_peak_bytes")
    row = {key: 1_234_567_890 for key in keys}
    row |= {"encoding_over_alone": 0.95, "kind": "unigram", "workers": 16}
    bench_prepare.print_bench([row | {"bytes": 12e6, "load_average": 1.5}], where)
    return printed(where)


def of_scaling():
    where = console()
    row = {"scaling": "strong", "processes": 64, "tokens_per_second": 1_234_567.0, "speed": 12.34}
    row |= {"efficiency": 0.99, "step_seconds": 12.345, "phases": dict.fromkeys(PHASES, 12.345)}
    for table in tables_of([row, row]):
        where.print(table)
    return printed(where)


def of_an_estimate(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    cli.run(["estimate", str(ROOT / "configs/pretrain/t5_small.yaml")])
    return capsys.readouterr().out


def of_prepared_data():
    where, splits = console(), ("train", "val", "test")
    totals = {"tokens": 10**12, "documents": 10**9, "bytes": 4 * 10**12}
    manifest = types.SimpleNamespace(
        vocab_size=32768,
        totals=dict.fromkeys(splits, totals),
        splits={split: [0] for split in splits},
    )
    assert {"vocab_size", "totals", "splits"} <= set(Manifest.__dataclass_fields__)
    where.print(*_split_tables(manifest, "runs/demo-data"))
    return printed(where)


def of_kernels(command, monkeypatch, capsys, *arguments):
    monkeypatch.setenv("COLUMNS", "400")
    cli.run(["kernels", command, *arguments])
    return capsys.readouterr().out


def of_a_kernel_bench():
    where = console()
    row = {"kernel": "triton_tf32x3", "ms": 12345.67, "host_us": 1_234_567, "device_ms": 12345.678}
    row |= {"tflops": 1234.567, "gb_per_s": 12345.67, "peak_mb": 123456.7}
    bench_kernels.show([row, row | {"tflops": None, "device_ms": None}], where)
    return printed(where)


def of_compiled_kernels():
    record = json.loads(compile_kernels.RECORD.read_text(encoding="utf-8"))
    younger = {"products": 1.5, "programs": 32, "seconds": 435.9}
    lines = [compile_kernels.line({**younger, **row, "seconds": 435.9}) for row in record]
    widths = compile_kernels.COLUMNS
    for (
        line
    ) in lines:  # no cell is wider than its column, so that all numbers end where they should
        assert len(line.split()) == len(widths) and len(line) == sum(widths.values()) + 9, line
    return "\n".join([cells_of(list(widths), list(widths.values()), gap=1), *lines])


MADE = {
    "nanolm/commands/kernels/list.py": lambda f: of_kernels("list", f["monkeypatch"], f["capsys"]),
    "nanolm/commands/kernels/roofline.py": lambda f: of_kernels(
        "roofline", f["monkeypatch"], f["capsys"]
    ),
    "nanolm/commands/kernels/compile.py": lambda f: of_compiled_kernels(),
    "nanolm/tools/bench/kernels.py": lambda f: of_a_kernel_bench(),
    "nanolm/commands/runs.py": lambda f: of_runs(),
    "nanolm/commands/compare.py": lambda f: of_compare(f["tmp_path"], f["capsys"]),
    "nanolm/finetune/report.py": lambda f: of_an_evaluation(f["capsys"]),
    "nanolm/finetune/repeats.py": lambda f: of_repeats(f["capsys"]),
    "nanolm/finetune/study/table.py": lambda f: of_a_study(),
    "nanolm/tools/bench/figures.py": lambda f: "\n".join(of_contests()),
    "nanolm/tools/bench/data.py": lambda f: of_loaders(),
    "nanolm/tools/bench/prepare.py": lambda f: of_preparation(f["capsys"]),
    "nanolm/tools/bench/scaling.py": lambda f: of_scaling(),
    "nanolm/commands/estimate.py": lambda f: of_an_estimate(f["capsys"], f["monkeypatch"]),
    "data/prepare/report.py": lambda f: of_prepared_data(),
}
NARROW = {
    "nanolm/tables.py": "makes them",
    "nanolm/commands/kernels/memory.py": "three columns, a kernel's name and two numbers",
    "nanolm/commands/evaluate.py": "two columns, a figure each",
    "nanolm/commands/parity.py": "a name and two numbers; a name, a family and three",
    "nanolm/commands/fill.py": "three columns, a token each",
    "nanolm/commands/doctor.py": "two columns; a list of rows is prose and wraps",
    "nanolm/commands/profile.py": "tests/test_terminal.py runs it at 80 and 60 columns",
    "nanolm/tools/walk/terminal.py": "tests/test_walk.py runs it at 80 columns",
}


@pytest.mark.parametrize("source", MADE)
def test_a_table_fits_80_columns(source, tmp_path, capsys, monkeypatch):
    """Rendered with room for 400, so that what is wider shows."""
    monkeypatch.setenv("COLUMNS", "400")
    fixtures = {"tmp_path": tmp_path, "capsys": capsys, "monkeypatch": monkeypatch}
    lines = MADE[source](fixtures).splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert cell_len(line.rstrip()) <= WIDEST, line


def test_no_table_is_forgotten():
    uses = re.compile(
        r"^from (rich\.table|nanolm\.tables) import (.*\b[Tt]ables?\b|.*blocks|beside|cells)", re.M
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for room in ("nanolm", "data", "kernels")
        for path in (ROOT / room).rglob("*.py")
        if uses.search(path.read_text(encoding="utf-8"))
    }
    assert found == set(MADE) | set(NARROW)


def test_runs_are_a_line_each_and_told_apart_by_their_ends():
    lines = of_runs().splitlines()
    assert len(lines) == 5 and lines[0].split() == list(
        ("run", "objective", "step", "train", "val", "bits/B", "tok/s")
    )
    assert lines[1].startswith("demo ") and lines[2].split()[0].endswith("-38c54d9c5d1afe7e")
    assert lines[3].split() == ["new", "-", "200000…", *"---", "1,234,567"]
    ends = {len(line.rstrip()) for line in lines[:4]}
    assert len(ends) == 1  # the last column stands right


LETTERS = st.characters(categories=("Lu", "Ll", "Nd"), max_codepoint=0x2FF)
WORD = st.text(LETTERS, min_size=1, max_size=12)


@settings(max_examples=20)
@given(data=st.data(), columns=st.integers(1, 14), count=st.integers(1, 5))
def test_tables_of_any_shape_fit_and_hold_every_cell(data, columns, count):
    head = data.draw(st.lists(WORD, min_size=columns, max_size=columns))
    line = st.lists(WORD, min_size=columns, max_size=columns)
    rows = data.draw(st.lists(line, min_size=count, max_size=count))
    made = tables(head, rows)
    assert sum(len(table.columns) - 1 for table in made) == columns - 1
    shown = []
    for table in made:
        where = console(WIDEST)
        where.print(table)
        lines = printed(where).splitlines()
        assert len(lines) == count + 1, lines
        assert all(cell_len(text.rstrip()) <= WIDEST for text in lines)
        shown += [text.split() for text in lines]
    cells = {cell for words in shown for cell in words}
    assert {cell for row in (head, *rows) for cell in row[1:]} <= cells


@given(text=WORD, most=st.integers(2, 30))
def test_a_long_name_keeps_its_end(text, most):
    found = ending(text, most)
    assert cell_len(found) <= most and (found == text or text.endswith(found[1:]))


@given(name=WORD, prose=st.lists(WORD, max_size=40).map(" ".join))
def test_prose_beside_a_name_keeps_its_words_and_the_width(name, prose):
    lines = beside([name], [12], prose).splitlines()
    assert all(len(line) <= WIDEST for line in lines)
    assert " ".join(lines).split() == [name, *prose.split()]
    assert all(line.startswith(" " * 16) for line in lines[1:])
