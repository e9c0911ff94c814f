"""`make gpu` without a GPU: stages end when they must, the report tells what became of each, and
the measurements find what is wrong. The dry run of all of it is slow."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from nanolm.cli import COMMANDS
from nanolm.config.load import parse
from nanolm.errors import UserError
from nanolm.ops.contract import candidates
from nanolm.ops.masks import KINDS, Mask
from nanolm.ops.reference import ReferenceAttention
from nanolm.registry import OPS
from nanolm.tools.first_contact import __main__ as command
from nanolm.tools.first_contact import (
    attention_speed,
    device_time,
    numerics,
    report,
    resume,
    rows,
    runner,
    training,
)
from nanolm.tools.first_contact.entry import Entry
from nanolm.tools.first_contact.measurement import LEFT_OUT, Figures, read_figures
from nanolm.tools.first_contact.real_sizes import attention_cases, checks
from nanolm.tools.first_contact.report import Report, entry_of
from nanolm.tools.first_contact.runner import marked_processes, run_together
from nanolm.tools.first_contact.stages import PARTS, Stage, Table
from nanolm.tools.kernel_check.attention_cases import SINGLE
from nanolm.tools.kernel_check.attention_trials import make_mask
from nanolm.tools.kernel_check.conformance import check_case
from tests.tiny_run import in_ranks

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = sys.executable


def python(text):
    return [PYTHON, "-S", "-c", text]


def alive(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def together(tmp_path, commands, limit=20.0):
    return run_together(commands, tmp_path, limit, dict(os.environ), tmp_path)


CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(child.pid, flush=True)
time.sleep({seconds})
"""
"""Starts a process in a session of its own, as torchrun does, and leaves it behind."""


def test_at_the_limit_all_that_was_started_is_killed_and_the_others_are_not(tmp_path):
    commands = {
        "quick": python("print('done')"),
        "slow": python(CHILD.format(seconds=600)),
        "wrong": python("raise SystemExit(7)"),
    }
    begin = time.monotonic()
    ended = {end.log.stem: end for end in together(tmp_path, commands, limit=3.0)}
    assert time.monotonic() - begin < 60
    assert {name: end.stopped for name, end in ended.items()} == {
        "quick": False,
        "slow": True,
        "wrong": False,
    }
    assert ended["quick"].status == 0 and ended["slow"].status == -9 and ended["wrong"].status == 7
    assert not alive(int(ended["slow"].log.read_text()))


def test_what_a_stage_leaves_behind_is_killed(tmp_path):
    (ended,) = together(tmp_path, {"leaver": python(CHILD.format(seconds=0))})
    assert (ended.status, ended.stopped) == (0, False)
    assert not alive(int(ended.log.read_text()))


def test_a_signal_to_the_command_ends_its_stage(tmp_path, monkeypatch):
    """The stage's processes go when the command is left by an exception, whatever it is."""

    def interrupted(*arguments):
        job = started(*arguments)
        jobs.append(job)
        if len(jobs) == 2:
            raise SystemExit(143)
        return job

    jobs, started = [], runner.begin
    monkeypatch.setattr(runner, "begin", interrupted)
    sleep = python("import time; time.sleep(600)")
    with pytest.raises(SystemExit):
        together(tmp_path, {"one": sleep, "two": sleep})
    assert [job.wait(20) for job in jobs] == [-9, -9]


def test_processes_are_found_by_their_word_alone():
    assert marked_processes("a word that nobody carries") == []


# The report


def stage(name, *texts, part=1, limit=30.0, **more):
    names = [name] if len(texts) == 1 else [f"{name}-{i}" for i in range(len(texts))]
    return Stage(name, part, limit, dict(zip(names, map(python, texts))), **more)


MACHINE = stage("machine", "print('this is a stand-in')")


@pytest.fixture
def contact(tmp_path, monkeypatch):
    """contact([stages], minutes=…) does them as the command would; the report and the entries."""
    monkeypatch.setattr(command, "LEAST", 0.3)
    monkeypatch.setattr(command, "RESERVE", 0.0)
    monkeypatch.setattr(command, "device_of", lambda entry: contact.device)

    def contact(stages, *, seconds=60.0, fresh=False, order=None):
        logs = tmp_path / f"logs-{time.monotonic_ns()}"
        logs.mkdir()
        kept = Report(tmp_path / "out", logs, fresh)
        order = order or ["machine", *(each.name for each in stages)]
        done = command.do_part([MACHINE, *stages], kept, time.monotonic() + seconds, order)
        kept.pack()
        return kept, {entry.name: entry for entry in done}

    contact.device = "GPU 1"
    contact.text = lambda: (tmp_path / "out" / "report.txt").read_text()
    contact.json = lambda: json.loads((tmp_path / "out" / "report.json").read_text())
    return contact


def test_every_stage_has_its_verdict_and_its_telling_lines(contact):
    lines = "\n".join(f"noise {i}" for i in range(99))
    _, found = contact(
        [
            stage("good", f"print('''{lines}\nok   42 things''')"),
            stage("bad", f"print('''FAIL a thing\n{lines}'''); raise SystemExit(1)"),
            stage("slow", "import time; print('FAIL early', flush=True); time.sleep(99)", limit=1),
            stage("mixed", "print('ok  ')", "import os; os.kill(os.getpid(), 11)"),
            stage("absent", f"print('no such package'); raise SystemExit({LEFT_OUT})"),
            stage("needy", "raise SystemExit(1)", needs="no_such_package_anywhere"),
        ]
    )
    assert {name: entry.verdict for name, entry in found.items()} == {
        "machine": "ok",
        "good": "ok",
        "bad": "FAIL",
        "slow": "FAIL",
        "mixed": "FAIL",
        "absent": "left out",
        "needy": "left out",
    }
    assert found["good"].lines == ["ok   42 things"]
    assert found["bad"].lines[0] == "FAIL a thing" and found["bad"].lines[-1] == "noise 98"
    assert len(found["bad"].lines) == 1 + report.LAST
    assert found["slow"].words == "slow was stopped after 1 s"
    assert found["slow"].lines == ["FAIL early"]
    assert found["mixed"].words == "mixed-1 ended with -11"
    assert found["absent"].lines == ["no such package"]
    assert found["needy"].words == "no_such_package_anywhere is not installed"
    text = contact.text()
    assert re.search(r"^FAIL +\d+ s  slow: slow was stopped after 1 s$", text, re.M)
    assert re.search(r"^ +FAIL a thing$", text, re.M)
    assert [entry["name"] for entry in contact.json()["stages"]] == list(found)
    assert all(entry["device"] == "GPU 1" for entry in contact.json()["stages"])


def test_a_budget_cuts_the_stage_that_runs_and_names_those_that_never_did(contact):
    sleep = "import time; time.sleep(99)"
    begin = time.monotonic()
    _, found = contact([stage("long", sleep), stage("never", "print('ok  ')")], seconds=2.5)
    assert time.monotonic() - begin < 60
    told = re.fullmatch(r"long was stopped after (\d) s", found["long"].words)
    assert found["long"].verdict == "FAIL" and int(told[1]) <= 3  # where the stage had 30
    assert (found["never"].verdict, found["never"].words) == ("not begun", "the budget is spent")
    assert "not begun" in contact.text() and "never: the budget is spent" in contact.text()


def test_a_stage_that_is_not_begun_again_keeps_what_was_seen(contact):
    bad = stage("bad", "print('FAIL a thing'); raise SystemExit(1)")
    contact([bad])
    sleep = stage("long", "import time; time.sleep(99)")
    order = ["machine", "long", "bad"]
    kept, found = contact([sleep, bad], seconds=2.5, order=order)
    assert found["bad"].verdict == "not begun"
    assert kept.entries["bad"].verdict == "FAIL" and "FAIL a thing" in contact.text()


def count(tmp_path, then="pass"):
    """A program that counts its runs in a file."""
    return f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); {then}"


def test_what_is_done_is_kept_and_the_rest_is_done_again(contact, tmp_path):
    def runs():
        return len((tmp_path / "runs").read_text())

    good = stage("good", count(tmp_path, "print('ok   first')"))
    bad = stage("bad", count(tmp_path, "raise SystemExit(1)"), part=2)
    order = ["machine", "good", "bad"]
    contact([bad], order=order)
    report_1, _ = contact([good], order=order)
    assert runs() == 2 and list(report_1.entries) == order
    report_2, found = contact([good, bad], order=order)
    assert runs() == 3 and found["good"].lines == ["ok   first"]
    logs = {path.name for path in report_2.logs.iterdir()}
    assert logs == {"machine.txt", "good.txt", "bad.txt"}  # of earlier calls, too
    contact.device = "GPU 2"
    contact([good], order=order)
    assert runs() == 4
    report_3, _ = contact([good], fresh=True, order=order)
    assert runs() == 5 and list(report_3.entries) == ["machine", "good"]


def test_a_file_that_is_no_report_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "report.json").write_text('{"stages": [{"name": "x"}]}')
    with pytest.raises(UserError, match="no report of an earlier call"):
        Report(tmp_path, tmp_path, False)
    assert Report(tmp_path, tmp_path, True).entries == {}


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


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_of_the_table_is_one_that_exists(device):
    stages = Table(device, 3, pathlib.Path("logs")).stages()
    names = [name for each in stages for name in each.commands]
    assert len(set(names)) == len(names)
    for each in stages:
        assert each.part in PARTS and 0 < each.limit <= 300 * (1 if device == "cuda" else 4)
        re.compile(each.tells)
        for name, (_, dash_m, module, *words) in each.commands.items():
            assert dash_m == "-m"
            if module == "nanolm":
                n_words = 2 if " ".join(words[:2]) in COMMANDS else 1
                module, words = COMMANDS[" ".join(words[:n_words])][0], words[n_words:]
            arguments = parse(importlib.import_module(module).Arguments, words, prog=module)
            assert arguments.device == device
            assert pathlib.Path(arguments.json).stem == name


def test_the_parts_are_in_the_order_in_which_they_tell_most():
    stages = [each.name for each in Table("cuda", 3, pathlib.Path("logs")).stages()]
    wanted = ["machine", "smoke", "numerics", "clm", "clm-compiled", "clm-plain"]
    wanted += ["clm-transformers", "attention", "mlm", "resume", "groups", "two-ranks", "small"]
    wanted += ["trace", "doctor"]
    assert [name for name in stages if name in wanted] == wanted


def test_the_command_line_is_refused_in_one_sentence():
    for words, told in (
        (["--part", "4"], "part=4"),
        (["--device", "tpu"], "device=tpu"),
        (["--minutes", "0"], "minutes=0"),
        (["--jobs", "0"], "jobs=0"),
    ):
        with pytest.raises(UserError, match=told):
            parse(command.Arguments, ["--out", "x", *words], prog="x")
    with pytest.raises(UserError, match="out: a value is required"):
        parse(command.Arguments, [], prog="x")
    stages = Table("cpu", 1, pathlib.Path("logs")).stages()
    arguments = command.Arguments(out="x", only=["clm", "nonsense"])
    with pytest.raises(UserError, match=r"no stage 'nonsense'; there are machine, smoke"):
        command.chosen(arguments, stages)


def test_each_part_begins_with_the_machine():
    stages = Table("cpu", 1, pathlib.Path("logs")).stages()

    def names(**options):
        parts = command.chosen(command.Arguments(out="x", **options), stages)
        return [[each.name for each in part] for part in parts]

    assert names(only=["groups", "clm"]) == [["machine", "clm", "groups"]]
    assert [part[:2] for part in names()] == [
        ["machine", "smoke"],
        ["machine", "mlm"],
        ["machine", "clm-torch"],
    ]
    assert names(part=2) == [names()[1]]
    assert sum(map(len, names())) == len(stages) + 2


def test_without_a_checkout_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    with pytest.raises(UserError, match="is no checkout of nanolm"):
        command.run(command.Arguments(out=str(tmp_path / "out")), 0.0)


def call(*words, cwd=ROOT, **more):
    command = [PYTHON, "-m", "nanolm.tools.first_contact", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence_and_status_2(tmp_path):
    done = call("--out", tmp_path, "--only", "clm")
    assert done.returncode == 2
    assert done.stderr.startswith("nanolm.tools.first_contact: the stage machine failed: machine: ")
    assert "torch sees no CUDA device" in done.stderr and "Traceback" not in done.stderr
    entries = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert [(entry["name"], entry["verdict"]) for entry in entries] == [("machine", "FAIL")]


# The measurements


def test_the_checks_are_of_real_sizes():
    cases = attention_cases()
    lengths = {case.n_queries for case in cases.values() if case.phase == "train"}
    assert min(lengths) >= 70 and {256, 512, 1024, 4096} <= lengths
    assert max(case.n_keys for case in cases.values()) == 4097
    assert {16, 64, 80, 96, 128, 256} <= {case.width for case in cases.values()}
    kinds = {kind for case in cases.values() for kind in make_mask(case).kinds()}
    assert kinds == set(KINDS)
    biases = {case.bias for case in cases.values()}
    assert biases == {
        *("none", "alibi", "bucket", "dense", "dense_all", "dense_by_head", "dense_by_row")
    }
    assert {case.order for case in cases.values()} == {"none", "loose", "strict"}
    assert {case.layout for case in cases.values()} == {"contiguous", "heads_first", "sliced"}
    assert {case.dtype for case in cases.values()} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(case.softcap for case in cases.values() if case.phase == "train")
    assert any(case.n_heads > case.n_kv_heads for case in cases.values() if case.phase == "train")
    names = [check.name for check in checks("cpu", 1)]
    for wanted in ("600 16384", "40000 768", "3000 50257", "dropout in bf16"):
        assert any(wanted in name for name in names), wanted
    assert {check.op for check in checks("cpu", 1)} == set(OPS) - {"linear"}
    assert len(names) == len({(check.op, check.name) for check in checks("cpu", 1)})


class Mine(ReferenceAttention):
    """The reference under a name that promises the same bits."""

    name = "triton_mine"

    def why_not(self, spec):
        return None


class Blind(Mine):
    """Forgets windows."""

    def run(self, q, k, v, mask, **options):
        return super().run(q, k, v, dataclasses.replace(mask, window=None), **options)


class Restless(Mine):
    """Right, but never the same bits."""

    def run(self, q, k, v, mask, **options):
        self.turns = getattr(self, "turns", 0) + 1
        return super().run(q, k, v, mask, **options) * (1 + 1e-7 * self.turns)


class Raising(Mine):
    def run(self, *arguments, **options):
        raise RuntimeError("no such tile")


def found_by_numerics(monkeypatch, tmp_path, kernel, only):
    known = candidates("attention") | {kernel.name: kernel}
    monkeypatch.setattr(numerics, "candidates", lambda op: known)
    path = tmp_path / "figures.jsonl"
    options = {"device": "cpu", "divide": 16, "kernels": [kernel.name], "json": str(path)}
    status = numerics.run(numerics.Arguments(only=only, **options))
    return status, read_figures(path)


def test_a_kernel_that_is_right_passes(monkeypatch, tmp_path):
    status, found = found_by_numerics(monkeypatch, tmp_path, Mine(), "attention a causal window")
    assert status == 0 and [row["ok"] for row in found] == [True]
    assert found[0]["promised"] and found[0]["same_bits"]


@pytest.mark.parametrize(
    ("kernel", "only", "told"),
    [
        (Blind(), "a causal window", "of 3e-02"),
        (Restless(), "GPT-2 in fp32", "not the same bits twice"),
        (Raising(), "GPT-2 in fp32", "it raises RuntimeError: no such tile"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(monkeypatch, tmp_path, capsys, kernel, only, told):
    status, found = found_by_numerics(monkeypatch, tmp_path, kernel, only)
    assert status == 1 and [row["ok"] for row in found] == [False]
    assert told in found[0]["words"]
    assert "FAIL attention" in capsys.readouterr().out


def test_bits_that_nobody_promised_are_told_and_pass(monkeypatch, tmp_path):
    kernel = Restless()
    kernel.name = "theirs"
    status, found = found_by_numerics(monkeypatch, tmp_path, kernel, "GPT-2 in fp32")
    assert status == 0 and not found[0]["same_bits"] and not found[0]["promised"]


def test_a_check_that_cannot_be_made_does_not_end_the_others(monkeypatch, tmp_path):
    def fails():
        raise torch.OutOfMemoryError("no room")

    broken = [dataclasses.replace(c, make=fails) for c in checks("cpu", 16) if c.op == "glu"]
    monkeypatch.setattr(numerics, "checks", lambda *_: broken)
    path = tmp_path / "figures.jsonl"
    status = numerics.run(numerics.Arguments(device="cpu", divide=16, json=str(path)))
    assert status == 1 and len(read_figures(path)) == len(broken) > 1


def test_the_shares_are_all_of_the_checks():
    def names(share, shares):
        options = {"device": "cpu", "share": share, "shares": shares}
        return [check.name for check in numerics.chosen(numerics.Arguments(**options))]

    parts = [names(i, 5) for i in range(5)]
    assert sorted(name for part in parts for name in part) == sorted(names(0, 1))


def test_keyed_dropout_is_checked_against_the_documented_function(monkeypatch, tmp_path):
    path = tmp_path / "figures.jsonl"
    options = {"device": "cpu", "divide": 16, "kernels": ["triton"], "json": str(path)}
    assert numerics.run(numerics.Arguments(only="dropout in fp32", **options)) == 0
    (row,) = read_figures(path)
    assert row["kernel"] == "triton" and row["same_bits"]
    monkeypatch.setattr("nanolm.tools.first_contact.real_sizes.keep_mask", keep_all)
    assert numerics.run(numerics.Arguments(only="dropout in fp32", **options)) == 1


def keep_all(seed, dropout, shape):
    return np.ones(shape, dtype=bool)


class Compiling(ReferenceAttention):
    """Compiles itself for every problem, as FlexAttention does."""

    name = "compiling"

    def why_not(self, spec):
        return None

    def run(self, q, k, v, mask, **options):
        return compiled(q, k, v, mask, options)


def attend(q, k, v, mask, options):
    return ReferenceAttention().run(q, k, v, mask, **options)


compiled = torch.compile(attend, backend="eager", fullgraph=True)


def test_a_kernel_that_compiles_itself_is_not_refused_the_ninth_problem():
    cases = list(SINGLE.items())[:12]
    findings = [check_case(Compiling(), name, case, "cpu") for name, case in cases]
    assert {finding.verdict for finding in findings} == {"pass"}, findings


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 5)])
def test_attentions_pairs_are_those_of_the_mask(causal, window):
    (plain,) = attention_speed.problems("cpu")
    sizes = dataclasses.replace(plain.sizes, length=23, causal=causal)
    problem = dataclasses.replace(plain, sizes=sizes, window=window)
    allowed = Mask(causal=causal, window=window).dense(23, 23)
    assert problem.pairs() == int(allowed.sum())


def test_attention_is_measured_beside_others_and_a_refusal_is_a_row(monkeypatch, tmp_path):
    path = tmp_path / "figures.jsonl"
    arguments = attention_speed.Arguments(device="cpu", repetitions=1, json=str(path))
    assert attention_speed.run(arguments) == 0
    found = {row["kernel"]: row for row in read_figures(path)}
    assert list(found) == ["nanolm sdpa", "SDPA flash", "SDPA math"]
    assert all(row["differs"] < 0.02 and row["both_ms"] > 0 for row in found.values())

    def refused(problem, backend):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(attention_speed, "sdpa_call", refused)
    assert attention_speed.run(arguments) == 0
    assert "no kernel for this" in read_figures(path)[1]["raises"]
    monkeypatch.setattr(attention_speed, "nanolm_call", refused)
    assert attention_speed.run(arguments) == 1


def test_flex_attention_gets_the_mask_of_the_problem(monkeypatch):
    """Not compiled here: that its arguments mean what they should."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (plain,) = attention_speed.problems("cpu")
    sizes = dataclasses.replace(plain.sizes, heads=4, dtype="float32", backward=False, length=130)
    problem = dataclasses.replace(plain, sizes=sizes, window=40)
    q, k, v = (sizes.leaf(1, 130, heads, 16) for heads in (4, 2, 2))
    expected = attention_speed.nanolm_call(problem, "sdpa")(q, k, v)
    assert torch.allclose(attention_speed.flex_call(problem)(q, k, v), expected, atol=1e-5)


def test_device_time_is_taken_with_a_cold_cache_and_a_host_that_is_ahead(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(done)
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, other):
            return other.at - self.at

    class Cache:
        def zero_(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(device_time.torch, "empty", lambda *_, **__: Cache())
    assert device_time.milliseconds(lambda: done.append("call"), "cuda", 2) == 2
    turn = ["flush", "sleep", "record", "call", "record", "wait"]
    assert done == ["call"] * device_time.WARM_UP + turn * 2


def test_a_contestant_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(training, "why_not", lambda job, device: "transformers is not installed")
    arguments = training.Arguments(model="transformers-gpt2", device="cpu", shape="tiny")
    assert training.run(arguments) == LEFT_OUT
    assert capsys.readouterr().out == "transformers is not installed\n"


def test_a_loss_that_is_no_number_fails_the_step(monkeypatch, tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    options = {"device": "cpu", "shape": "tiny", "precision": "fp32", "json": str(path)}
    arguments = training.Arguments(kernels="torch", **options)
    assert arguments.job["settings"]["kernels"]["linear_cross_entropy"] == "chunked"
    row = training.measure(arguments.job)
    monkeypatch.setattr(training, "measure", lambda job: dict(row))
    assert training.run(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("nanolm clm, torch's kernels: ") and " ms a step" in out
    (found,) = read_figures(path)
    assert found["kernels"]["attention"] == "sdpa" and found["size"] == "tiny"
    row["losses"] = [6.2, float("nan")]
    assert training.run(arguments) == 1


def test_the_first_difference_of_a_resumed_run_is_named():
    calm = [{"step": s, "kind": "train", "loss": float(s), "lr": 0.1} for s in range(3)]
    assert resume.difference(calm, [dict(record) for record in calm]) == ""
    hit = [*calm[:2], calm[2] | {"loss": 2.0000001}]
    told = resume.difference(calm, hit)
    assert told == "step 2 (train): loss is 2.0000001 and was 2.0"
    assert resume.difference(calm, calm[:2]) == "2 lines of metrics where 3 were"


def test_a_stage_is_not_ok_because_its_processes_said_so(tmp_path):
    """The exit status counts, not a line that begins with ok."""
    found = entry_of(
        stage("liar", "pass"),
        together(tmp_path, {"liar": python("print('ok   all'); raise SystemExit(1)")}),
        1.0,
        30.0,
    )
    assert found.verdict == "FAIL" and found.words == "liar ended with 1"


def alone_in_a_group(_):
    from nanolm.distributed.world import World
    from nanolm.tools.first_contact.groups import group_of_one, trained

    _, plain = trained(World(), "ddp", "fp32", 2)
    world = group_of_one(torch.device("cpu"))
    found = {name: trained(world, name, "fp32", 2) for name in ("ddp", "fsdp")}
    names = [type(module).__name__ for module, _ in found.values()]
    return [plain, *(figures for _, figures in found.values()), names, world.gather({"a": 1})]


def test_one_rank_with_a_group_goes_the_ways_of_many():
    ((plain, ddp, fsdp, names, gathered),) = in_ranks(1, alone_in_a_group)
    assert names == ["DistributedDataParallel", "FSDPLearner"] and gathered == [{"a": 1}]
    assert len(plain) == 4 and plain[1] > 0  # losses and norms
    assert ddp == pytest.approx(plain, abs=1e-5) and fsdp == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
def test_the_dry_run_in_a_bare_checkout(tmp_path):
    """The whole way, in three calls, without the packages that a GPU machine may lack."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HIDING)
    variables = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    out = tmp_path / "out"
    common = ("--out", out, "--device", "cpu", "--jobs", "2", "--minutes", "20")
    first = ("numerics", "clm", "clm-transformers", "attention")
    second = ("resume", "groups", "two-ranks", "two-ranks-fsdp")
    third = ("ops", "trace")
    for names in (first, second, third):
        done = call(*common, "--only", *names, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((out / "report.json").read_text())["stages"]
    found = {stage["name"]: stage for stage in stages}
    assert set(found) == {"machine", *first, *second, *third}
    left_out = [name for name, stage in found.items() if stage["verdict"] == "left out"]
    assert left_out == ["clm-transformers"]
    text = (out / "report.txt").read_text()
    for told in ("lines of metrics bit-equal", "0 wrong", "FSDPLearner, bf16", "two ranks on one"):
        assert told in text, told
    assert "| FSDP2 | `make gpu ONLY='groups two-ranks-fsdp'` | passed, CPU as stand-in" in text
    assert found["machine"]["figures"]["machine"][0]["packages"]["wandb"] == "missing"
    begin = time.monotonic()
    again = call(*common, "--only", *first, *second, *third, env=variables)
    assert again.returncode == 0 and time.monotonic() - begin < 120
    assert {path.name for path in out.iterdir()} == {"report.txt", "report.json", "logs.tar.gz"}


HIDING = """
import sys
for name in ("jsonargparse", "wandb", "transformers", "pytest", "hypothesis", "datasets", "peft"):
    sys.modules[name] = None  # `import` raises
import importlib.metadata as metadata
known = metadata.version
def version(name):
    if sys.modules.get(name, 0) is None:
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
"""
