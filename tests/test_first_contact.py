"""`make gpu` without a GPU: the report tells what became of each stage.
The dry run of all of it is slow."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import time

import pytest
import torch

from nanolm.cli import COMMANDS
from nanolm.config.load import parse
from nanolm.errors import UserError
from nanolm.tools.first_contact import __main__ as command
from nanolm.tools.first_contact import report
from nanolm.tools.first_contact.measurement import LEFT_OUT
from nanolm.tools.first_contact.report import Report, entry_of
from nanolm.tools.first_contact.stages import PARTS, Stage, Table
from tests.test_first_contact_processes import PYTHON, python, together

ROOT = pathlib.Path(__file__).parent.parent


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


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_of_the_table_is_one_that_exists(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stages = Table(device, 3, tmp_path).stages()
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
    wanted = ["machine", "smoke", "numerics", "bfloat16", "clm", "clm-compiled", "clm-plain"]
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


def test_a_stage_is_not_ok_because_its_processes_said_so(tmp_path):
    """The exit status counts, not a line that begins with ok."""
    found = entry_of(
        stage("liar", "pass"),
        together(tmp_path, {"liar": python("print('ok   all'); raise SystemExit(1)")}),
        1.0,
        30.0,
    )
    assert found.verdict == "FAIL" and found.words == "liar ended with 1"


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
