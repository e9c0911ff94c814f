"""`nanolm COMMAND`: what it prints, and that a user's mistake is one line and exit status 2."""

import os
import subprocess
import sys

import pytest

from nanolm import cli
from nanolm.errors import UserError


def test_usage_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"]):
        cli.main(words)
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "nanolm: there is no command 'trian'; choose from prepare, "),
        (["data"], "nanolm: there is no command 'data'; choose from prepare, "),
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
