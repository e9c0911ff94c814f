"""Kernels that end the process which runs them: every check gets its verdict all the same."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from nanolm import cli
from nanolm.cli import lacked
from nanolm.config.load import import_plugins
from nanolm.errors import UserError
from nanolm.registry import KERNELS
from nanolm.tools.kernel_check import examination, safety
from nanolm.tools.kernel_check.apart import Elsewhere, Here, ProcessEndedError, how_it_ended
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.examination import INTERPRET, Subject, examine
from nanolm.tools.kernel_check.report import Report, Status
from nanolm.tools.kernel_check.safety import NAME, UNSAFE, Seen, verdict_of

ROOT = str(pathlib.Path(cli.__file__).parents[1])
PLUGIN = """
import os
from nanolm.ops import kernel
from nanolm.ops.reference import ReferenceRotary

@kernel("rotary")
class Deadly:
    name = "deadly"

    def why_not(self, spec):
        return None

    def run(self, x, cos, sin):
        if x.shape[-1] == 68:
            {end}
        return ReferenceRotary().run(x, cos, sin)
"""


def test_a_kernel_that_ends_its_process_fails_that_check_alone(tmp_path):
    (tmp_path / "deadly.py").write_text(PLUGIN.format(end="os.abort()"))
    done = command(tmp_path, "--module", "deadly", "--json", "found.json")
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (wrong,) = [row for row in found if row["verdict"] == "FAIL"]
    assert "17 heads of 68" in wrong["check"]
    assert wrong["words"].startswith("the process of this check was ended by SIGABRT (C's abort")
    assert f"{len(found) - 1} passed, 1 failed" in done.stdout and len(found) > 15
    assert "Traceback" not in done.stderr


def command(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "nanolm", "kernels", "check", "--device", "cpu", *words],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": ROOT},
    )  # fmt: skip


@pytest.mark.slow
def test_a_module_that_ends_the_process_on_import_is_told(tmp_path):
    (tmp_path / "ending.py").write_text("import os\nos._exit(0)\n")
    done = command(tmp_path, "--module", "ending")
    assert done.returncode == 2
    assert "the process that imports ending ended with status 0" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_found_before_an_interruption_is_printed_and_written(tmp_path, number):
    (tmp_path / "endless.py").write_text(PLUGIN.format(end="import time; time.sleep(600)"))
    words = ["--module", "endless", "--device", "cpu", "--json", "found.json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanolm", "kernels", "check", *words],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT},
    )  # fmt: skip
    read = []
    for line in process.stdout:
        read.append(line)
        if sum("  pass  " in line for line in read) == 6:  # of two kinds in three dtypes
            break
    time.sleep(1)
    process.send_signal(number)
    read += process.stdout.readlines()
    assert process.wait(60) == 128 + number
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["verdict"] for row in found] == ["pass"] * 6 + ["note"]
    assert found[-1]["check"].endswith("17 heads of 68, 34 pairs torch.float32")
    assert any("6 passed" in line for line in read)


class End:
    """An errand that does not end as errands do."""

    def __init__(self, how):
        self.how = how

    def run(self):
        if self.how == "exit":
            os._exit(7)
        if self.how == "interrupt":
            raise KeyboardInterrupt("by the kernel")
        if self.how == "sleep":
            time.sleep(600)
        return os.getpid()


@pytest.mark.slow
def test_a_worker_tells_how_its_process_ended_and_starts_another():
    worker = Elsewhere("cpu")
    first = worker.ask(End("not at all"))
    assert first == worker.ask(End("not at all")) != os.getpid()
    for how, words in (
        ("exit", "ended with status 7"),
        ("interrupt", "ended with KeyboardInterrupt: by the kernel"),
        ("sleep", "was stopped, as it had not ended after 1 seconds"),
    ):
        worker.patience = 1 if how == "sleep" else 60
        with pytest.raises(ProcessEndedError, match=words):
            if how == "sleep":  # started with time enough
                worker.patience = 60
                worker.ask(End("not at all"))
                worker.patience = 1
            worker.ask(End(how))
    worker.close()


def test_how_a_process_ended_is_told_in_words():
    assert how_it_ended(3) == "ended with status 3"
    assert "SIGSEGV (it touched memory" in how_it_ended(-signal.SIGSEGV)
    assert "where memory runs out" in how_it_ended(-signal.SIGKILL)


class Ending:
    """A worker whose process ends with every errand, or does what the test says."""

    def __init__(self, does=None):
        self.does, self.asked = does, 0

    def ask(self, errand):
        self.asked += 1
        if self.does is None:
            raise ProcessEndedError("was ended by SIGSEGV")
        return self.does(errand)

    def close(self):
        pass


def examined(worker, interpreter=None, *, triton=False, monkeypatch):
    monkeypatch.setattr(examination, "interpreted", lambda: False)
    began = []
    subject = Subject("rotary", "any", triton)
    found = examine(
        subject, "cpu", quick=True, worker=worker, interpreter=lambda: interpreter,
        began=began.append,
    )  # fmt: skip
    return list(found), began


def test_a_kernel_that_ends_every_process_is_not_asked_for_ever(monkeypatch):
    found, began = examined(worker := Ending(), monkeypatch=monkeypatch)
    assert worker.asked == 5 and len(began) == 5
    assert [f.verdict for f in found] == ["FAIL"] * 5 + ["note"]
    assert "checks are left out: it ended 5 processes" in found[-1].words


def test_the_sanitizer_comes_first_and_alone_where_a_kernel_stores_out_of_bounds(monkeypatch):
    said = f"_rotate: store of 3 elements; {UNSAFE}"
    watch = Ending(lambda errand: Seen({}, "FAIL", said))
    found, _ = examined(Ending(), watch, triton=True, monkeypatch=monkeypatch)
    assert [(f.check, f.verdict) for f in found] == [(NAME, "FAIL")]
    right = Ending(lambda errand: Finding(errand.name, "pass"))
    found, began = examined(right, Ending(), triton=True, monkeypatch=monkeypatch)
    assert found[0].verdict == "FAIL" and "was ended by SIGSEGV" in found[0].words
    assert began[0].startswith("sanitizer: ") and found[1].verdict == "pass"


def test_a_load_out_of_bounds_does_not_hide_a_store():
    load, race = Seen({}, "FAIL", "k: load of 1"), Seen({}, "FAIL", "k: race")
    store, right = Seen({}, "FAIL", f"k: store of 2; {UNSAFE}"), Seen({"k": 1})
    trials = [("a", right), ("b", Seen()), ("c", load), ("d", race)]
    assert verdict_of(trials).words == "c: k: load of 1"
    assert verdict_of([*trials, ("e", store)]).words.startswith("e: k: store of 2")
    ended = Seen({}, "FAIL", "it ended", last=True)
    assert verdict_of([*trials[:2], ("e", ended), ("f", store)]).words == "e: it ended"
    assert verdict_of([("a", right)]).verdict == "pass"
    assert verdict_of([("a", Seen({}))]) is None


def test_without_a_gpu_one_line_says_how_to_interpret(monkeypatch):
    driver = "it raises RuntimeError: 0 active drivers ([]). There should only be one."
    worker = Ending(lambda errand: Finding(errand.name, "FAIL", driver))
    found, _ = examined(worker, monkeypatch=monkeypatch)
    assert [f.words for f in found[:-1]] == [INTERPRET] and worker.asked == 1
    assert "they would raise the same" in found[-1].words
    assert "TRITON_INTERPRET=1" in lacked(RuntimeError(driver))
    assert lacked(RuntimeError("another")) is None


def test_equal_sentences_are_told_once_and_counted(capsys):
    report = Report("norm", "mine", Status())
    for n in range(1, 20):
        report.add(Finding(f"{n}x24", "FAIL", f"its out is off by 1.{n}e-02 of the largest value"))
        report.add(Finding(f"{n}x32", "pass"))
        report.add(Finding(f"{n}x8", "refused", "it never serves."))
    assert capsys.readouterr().out.count("FAIL") == 1  # as soon as it is found
    report.close()
    told = capsys.readouterr().out
    assert "FAIL     18 more as 1x24: 2x24, 3x24, 4x24, 5x24 and 14 more" in told
    assert "refused  18 more as 1x8: " in told
    assert "19 passed, 19 failed, 19 refused" in told


@pytest.mark.parametrize("width", [60, 80])
def test_findings_fit_a_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    words = "it ignores key lengths (padding): " + "a long reason " * 20
    report = Report("attention", "outsider", Status())
    for name in ("lengths of keys and documents", "nine rows of odd lengths", "int32 lengths"):
        report.add(Finding(name, "FAIL", words))
    report.add(Finding("memory", "pass", "4096 bytes saved, 4096 for q, k, v, out and lse"))
    report.close()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and len(lines) > 8


class Terminal:
    """What is written to a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_says_what_is_in_progress(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    status = Status()
    status("determinism")
    assert terminal.text == "\r\x1b[K  … determinism"
    report = Report("norm", "mine", status)
    report.add(Finding("determinism", "pass"))
    assert "\r\x1b[Knorm: mine" in terminal.text
    assert terminal.text.endswith("\r\x1b[K  pass     determinism\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\n\nx = torch.zeross(1)\n", "AttributeError: .*, line 3\\)"),
        ("import nanolm\nimport trochh\n", "No module named 'trochh' \\(.*faulty.py, line 2\\)"),
        ("1 / 0\n", "ZeroDivisionError: division by zero \\(.*faulty.py, line 1\\)"),
        ("raise SystemExit('no GPU')\n", "SystemExit: no GPU \\(.*faulty.py, line 1\\)"),
    ],
)
def test_what_a_module_raises_on_import_is_told_with_its_line(tmp_path, monkeypatch, text, words):
    (tmp_path / "faulty.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    with pytest.raises(UserError, match=f"cannot import faulty: {words}"):
        import_plugins(["faulty"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine/norm.py", "a module's name is due, mine.norm$"),
        ("./norm.py", "a module's name is due, norm$"),
        ("../norm.py", "a module's name is due, norm, with its folder in PYTHONPATH"),
        ("a,b", r"write --plugins a b, and in a config plugins: \[a, b\]"),
    ],
)
def test_a_file_or_a_list_is_no_module(name, words):
    with pytest.raises(UserError, match=words):
        import_plugins([name])


def test_a_module_without_kernels_is_told_by_list(tmp_path, monkeypatch, capsys):
    (tmp_path / "kernelless.py").write_text("import torch\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cli.run(["kernels", "list", "--device", "cpu", "--plugins", "kernelless"])
    assert capsys.readouterr().out.startswith("kernelless registers no kernel; decorate a class")


def test_an_outsiders_triton_kernel_is_left_out_of_a_bench_that_would_interpret_it(monkeypatch):
    from nanolm.tools.bench import kernels as bench

    sizes = bench.Sizes(batch=1, length=8, heads=2, width=16, ff_width=24, device="cpu")
    ours = KERNELS["glu"].get("triton").build()
    problem = bench.PROBLEMS["glu"](sizes)

    class Theirs:
        """Ours, under a name that says nothing."""

        def run(self, *given, **options):
            return ours.run(*given, **options)

    if not bench.interpreted():
        pytest.skip("kernels are compiled here")
    assert bench.would_be_interpreted(problem, Theirs(), sizes)
    assert not bench.would_be_interpreted(problem, KERNELS["glu"].get("reference").build(), sizes)


def test_what_is_done_here_needs_no_process():
    assert Here().ask(End("not at all")) == os.getpid()
    assert dataclasses.is_dataclass(safety.Watch)
