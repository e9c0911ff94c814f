"""What every command prints fits the terminal, of 80 columns and of 60.

The commands are those of the command line's own registry, each with a small invocation that works
(`tests/command_walk.py`); of those that measure for long, what measures is replaced.
"""

import contextlib
import functools
import importlib
import json
import re
import types
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from nanolm import cli, terminal
from nanolm.commands.kernels import compile as compile_kernels
from nanolm.tools.bench.data import bench_data
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.survey import Patient
from nanolm.training.phases import PHASES
from tests import test_bench_finetune, test_bench_train
from tests.command_walk import FITTING, ROOT, evaluated, line_of
from tests.kinds_of_run import KINDS, call

WIDE, WIDTHS = 300, (80, 60)
SIZES = ("--batch=1", "--length=16", "--heads=2", "--kv_heads=1", "--width=16", "--ff_width=24")
SHAPE = ("--n_layers=1", "--d_model=32", "--n_heads=2", "--row_length=16", "--batch=4")
CONTEST = ("--rounds=2", "--device=cpu", "--precisions=[fp32]", "--results=cells.json")
MORE = {
    "kernels check": [
        "--op=glu",
        "--name=reference",
        "--quick=true",
        "--device=cpu",
        "--apart=false",
    ],
    "kernels bench": [*SIZES, "--vocab_size=64", "--device=cpu", "--repetitions=1"],
    "kernels memory": ["--tokens=64", "--vocab_size=64", "--device=cpu"],
    "kernels doctor": ["--device=cpu"],
    "bench train": list(CONTEST),
    "bench finetune": ["--column=text", "--vocab_size=600", "--data=texts", *CONTEST],
    "bench scale": [*SHAPE, "--vocab_size=64", "--rounds=1", *CONTEST[1::2]],
    "bench prepare": ["--vocab_size=64", "--repeats=1"],
}
"""What stands on the command lines of commands that the walk reads and does not carry out."""


class InPlace:
    """A process that is a call."""

    def __init__(self, target, args):
        self.target, self.args, self.exitcode = target, args, 0

    def start(self):
        self.target(*self.args)

    def join(self):
        pass


def waiting():
    """A queue of one process."""
    kept = []
    return types.SimpleNamespace(put=kept.append, get=kept.pop)


def ranks(job, module):
    """What one measurement of `bench scale` finds."""
    return {
        "seconds": [0.1],
        "phases": dict.fromkeys(PHASES, 0.01),
        "device": "cpu",
        "load_average": 1.0,
    }


def survey(device, **options):
    """What `kernels doctor` finds: a kernel that is right, and one that is not."""
    wrong = Finding("lengths of keys and documents", "FAIL", "it differs by 0.5 " * 9)
    yield Patient("attention", "sdpa", True), [Finding("memory", "pass")]
    yield Patient("linear_cross_entropy", "triton", False), [wrong]


def prepared(given, *, workers, repeats):
    """What `bench prepare` finds of one kind of tokenizer."""
    keys = ("alone_one", "alone_all", "encoding", "everything", "peak_bytes", "worker_peak_bytes")
    row = dict.fromkeys(keys, 123_456_789) | {"bytes": 12e6, "load_average": 1.5}
    return row | {"encoding_over_alone": 0.95, "kind": given.tokenizer_type, "workers": workers}


@functools.cache
def compiled():
    """A few rows of `kernels compile`, as they are recorded."""
    rows = json.loads(compile_kernels.RECORD.read_text(encoding="utf-8"))[:9]
    return [{"products": 1.5, "programs": 32, **row, "seconds": 435.9} for row in rows]


MEASURES = {
    "profile": {"nanolm.commands.profile.MOST": 10_000},  # not those that were slowest this time
    "parity": {
        "nanolm.commands.parity.CASES": {"gpt2": None, "a long name of a family": None},
        "nanolm.commands.parity.HEAD_CASES": {},
        "nanolm.commands.parity.difference": lambda case, way: 1.2e-7,
    },
    "kernels memory": {
        "multiprocessing.get_context": lambda kind: types.SimpleNamespace(
            SimpleQueue=waiting, Process=InPlace
        )
    },
    "kernels doctor": {"nanolm.commands.kernels.doctor.survey": survey},
    "kernels compile": {
        "nanolm.commands.kernels.compile.compile_elsewhere": lambda *words, **more: compiled()
    },
    "bench data": {
        "nanolm.commands.bench.data.bench_data": functools.partial(bench_data, seconds=0.01)
    },
    "bench train": {"nanolm.tools.bench.contest.Player": test_bench_train.FakePlayer},
    "bench finetune": {"nanolm.tools.bench.contest.Player": test_bench_finetune.FakePlayer},
    "bench scale": {"nanolm.tools.bench.scaling.run_process": ranks},
    "bench prepare": {"nanolm.commands.bench.prepare.bench_prepare": prepared},
}
"""Command -> what takes long in it -> what stands there instead."""
ENDS_WITH_1 = ("kernels doctor",)
"""The survey above finds a kernel that is wrong."""


def printed(command: str, width: int, place) -> str:
    """What the command prints, in a terminal of this width and a new folder."""
    kind = FITTING.get(command, "clm")
    run = evaluated() if kind == "evaluated" else KINDS[kind]()
    words = [*line_of(command, str(run)), *MORE.get(command, [])]
    place.mkdir()
    if command == "bench finetune":
        test_bench_finetune.command(place / "texts")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(place))
        stack.enter_context(mock.patch.dict("os.environ", {"COLUMNS": str(width)}))
        for name, stand_in in MEASURES.get(command, {}).items():
            module, _, attribute = name.rpartition(".")
            stack.enter_context(
                mock.patch.object(importlib.import_module(module), attribute, stand_in)
            )
        answer = call([*command.split(), *words])
    assert answer.status == (1 if command in ENDS_WITH_1 else 0), answer
    return answer.out + answer.err


def for_a_program(line: str) -> bool:
    """Whether a line is JSON, as `predict` writes an answer a line."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def too_wide(text: str, width: int) -> list[str]:
    """Lines that are wider, and no single word, such as a path or a hash."""
    return [
        line
        for line in text.splitlines()
        if cell_len(line.rstrip()) > width and len(line.split()) > 1 and not for_a_program(line)
    ]


SHORT = 20
"""A heading or a number is no longer; what is, is prose or a name."""


def cells(text: str) -> list[list[str]]:
    """Each line in what two spaces, or a line, separate; every number as 0, since times differ from
    call to call."""
    lines = re.sub(r"\d+(,\d+)*", "0", text).splitlines()
    return [[cell.strip() for cell in re.split(r"\s{2,}|[│┃]", line.strip())] for line in lines]


def broken(wide: str, narrow: str) -> set[str]:
    """Headings and numbers of the wide text that the narrow one has not in one piece; sentences may
    be broken."""
    short = {
        cell
        for line in cells(wide)
        for cell in line
        if len(line) > 1 and len(cell) <= SHORT and not cell.endswith((".", ")"))
    }
    have = {cell for line in cells(narrow) for cell in line}
    ends = [cell.removeprefix("…") for cell in have if cell.startswith("…")]  # of long names
    return {cell for cell in short - have if not any(cell.endswith(end) for end in ends if end)}


# A study trains in processes of its own; its table is one like those of `compare` and `runs`.
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) if c == "study" else c for c in cli.COMMANDS],
)
def test_what_a_command_prints_fits_the_terminal(command, tmp_path):
    wide = printed(command, WIDE, tmp_path / "wide")
    for width in WIDTHS:
        text = printed(command, width, tmp_path / str(width))
        assert not too_wide(text, width)
        assert not broken(wide, text)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
@pytest.mark.parametrize("width", WIDTHS)
def test_help_fits_the_terminal(command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    answer = call([*command.split(), "--help"])
    assert answer.status == 0 and answer.out.startswith("usage: nanolm")
    assert not too_wide(answer.out, width)


@pytest.mark.parametrize("width", [1, 3, 19])
def test_help_answers_in_a_terminal_that_is_hardly_one(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    answer = call(["--help"])
    assert answer.status == 0 and not too_wide(answer.out, 40)


WORD = st.text(st.characters(categories=("Lu", "Ll", "Nd", "Lo")), min_size=1, max_size=12)


@given(words=st.lists(WORD, min_size=1), width=st.integers(12, 90), indent=st.integers(0, 4))
def test_a_wrapped_sentence_keeps_its_words_and_the_width(words, width, indent):
    lines = terminal.wrapped(" " * indent + " ".join(words), width)
    assert " ".join(lines).split() == words
    assert all(cell_len(line) <= width or len(line.split()) == 1 for line in lines)
    assert all(line.startswith(" " * (indent + terminal.HANGING)) for line in lines[1:])


@given(figures=st.lists(WORD, min_size=1), width=st.integers(40, 90))
def test_a_name_and_its_figure_stay_on_one_line(figures, width):
    figures = [f"{word} {number}.5" for number, word in enumerate(figures)]
    lines = terminal.wrapped("  ".join(figures), width)
    assert [part for line in lines for part in line.strip().split("  ")] == figures
    assert all(cell_len(line) <= width for line in lines)


def test_a_pipe_gets_whole_lines_and_a_terminal_what_it_has_room_for(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal.say("word " * 40)
    assert capsys.readouterr().out == "word " * 40 + "\n"
    for told in ("0", "x", ""):  # no width
        monkeypatch.setenv("COLUMNS", told)
        assert terminal.columns() is None and terminal.table_width() == terminal.WIDEST
    monkeypatch.setenv("COLUMNS", "50")
    terminal.say("word " * 40)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 50
    assert (terminal.columns(), terminal.table_width()) == (50, 50)
    for told in ("19", "2", "1"):  # where no table could be laid out
        monkeypatch.setenv("COLUMNS", told)
        assert terminal.columns() == terminal.table_width() == terminal.LEAST
    monkeypatch.setenv("COLUMNS", "200")
    assert (terminal.columns(), terminal.table_width()) == (200, terminal.WIDEST)


def test_text_that_a_model_wrote_goes_into_a_pipe_as_it_is(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    prompt = "def " + "a" * 30 + "  b" * 40
    answer = call(["generate", str(KINDS["clm"]()), f"--prompt={prompt}", "--max_tokens=1"])
    assert prompt in answer.out


PLAIN = {
    "nanolm/cli.py": "errors, and the version; the usage is wrapped",
    "nanolm/config/load.py": "help, which is wrapped, and YAML",
    "nanolm/terminal.py": "is what the others use",
    "nanolm/commands/explain.py": "lines that are wrapped",
    "nanolm/commands/generate.py": "what a model writes, piece by piece",
    "nanolm/tools/kernel_check/report.py": "the check in progress, a line that is erased again",
    "nanolm/commands/kernels/list.py": "rows of a table, and an op's name",
    "nanolm/commands/kernels/compile.py": "rows of a table",
    "nanolm/tools/bench/kernels.py": "rows of a table",
    "nanolm/tools/first_contact/training.py": "torch's table of operators, for a log",
}
"""Files that print without `say`, and what."""


def test_who_prints_without_regard_for_the_width_is_known():
    for room in ("nanolm", "data", "kernels"):
        for path in (ROOT / room).rglob("*.py"):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
            for call_of in re.findall(r"(?<![\w.`])print\((?:[^()]|\([^()]*\))*\)", text):
                machine = "json.dumps" in call_of or "file=" in call_of or "read_text" in call_of
                assert machine or name in PLAIN, f"{name}: {call_of}; use nanolm.terminal.say"
