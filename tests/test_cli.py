"""`nanolm COMMAND`: what it prints, and that a user's mistake is one line and exit status 2."""

import os
import pathlib
import subprocess
import sys

import pytest

from nanolm import cli
from nanolm.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def test_usage_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"]):
        cli.main(words)
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["trian"],
            "nanolm: there is no command 'trian'; did you mean train? choose from prepare, ",
        ),
        (["data"], "nanolm: there is no command 'data'; choose from data inspect, data verify"),
        (
            ["kernels", "--help"],
            "nanolm: there is no command 'kernels'; choose from kernels list, ",
        ),
        (
            ["kernels", "chek"],
            "nanolm: there is no command 'kernels chek'; did you mean kernels check?",
        ),
        (["train", "--model.n_heads", "7"], "nanolm: model.n_heads=7 does not divide"),
        (["train"], "nanolm: no data: set data.path"),
        (["prepare", "x.txt"], "nanolm: out: a value is required"),
        (["data", "inspect", "/nowhere"], "nanolm: /nowhere is not a prepared directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.startswith(sentence) and captured.err.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def run(argv):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "run", run)
    with pytest.raises(KeyError):
        cli.main(["train"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_shows_its_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0 and f"usage: nanolm {name}" in capsys.readouterr().out


def test_the_train_script_is_the_train_command():
    words = [sys.executable, "train.py", "--optim.lr", "fast"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nanolm: optim.lr: expected a number, got 'fast'\n"


def test_preparing_data_imports_no_torch():
    code = (
        "import sys, nanolm.cli\n"
        "try: nanolm.cli.main(['prepare'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'nanolm.commands.prepare' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ)


def test_user_error_is_an_exception_of_its_own():
    assert not issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141), (UserError("x"), 2)]
)
def test_exit_status(raised, status, monkeypatch, capfd):
    def run(arguments):
        raise raised

    monkeypatch.setattr("nanolm.commands.runs.run", run)
    with pytest.raises(SystemExit) as caught:
        cli.main(["runs"])
    assert caught.value.code == status


@pytest.mark.parametrize(
    "encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow), "utf-8"]
)
def test_help_is_shown_on_every_terminal_and_into_a_closed_pipe(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nanolm", "prepare", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            command, env=environment, stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 141 and b"Traceback" not in done.stderr
