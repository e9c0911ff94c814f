"""`python -m tests.code_lines`: what is a line of code, and what a comment, on a file known by
heart."""

import subprocess
import sys

import pytest

from tests import code_lines

KNOWN = '''"""A docstring
over two lines."""

import os  # code and a comment

# a comment alone

A = """a text
that is a value"""
"""The docstring of a name."""


def f(
    x,  # fmt: skip
):
    """One line."""
    "a text that is a statement"
    return (
        x +
        # a comment between two lines of code

        1
    )  # type: ignore
    # noqa: but told
'''


def test_a_known_file_has_known_counts():
    # import; A's two lines; def's three; return's four that hold a token.
    assert code_lines.count(KNOWN) == (10, 3)


@pytest.mark.parametrize(
    ("source", "code", "comments"),
    [
        ("", 0, 0),
        ("\n\n", 0, 0),
        ("# one\n# two\n", 0, 2),
        ("#noqa\n#  fmt: off\n# pragma: no cover\n", 0, 0),
        ('"""only a docstring"""\n', 0, 0),
        ("x = 1; y = 2\n", 1, 0),
        ("x = 1 + \\\n    2\n", 2, 0),
        ("class A:\n    pass\n\n    # told\n", 2, 1),
        ("x = f'''a\n{1}\nb'''\n", 3, 0),
    ],
)
def test_short_files(source, code, comments):
    assert code_lines.count(source) == (code, comments)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose last commit has less than its files have."""
    monkeypatch.chdir(tmp_path)
    for name in ("nanolm/a/b/deep.py", "kernels/k.py", "data/d.py", "data/not_code.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/t.py").write_text("x = 1\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/reading_order.txt").write_text("Ideas\nnanolm/a/b/deep.py   what it is\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "kernels/k.py").write_text("x = 1\ny = 2  # now\n")
    return tmp_path


def printed(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["code_lines", *words])
    code_lines.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["files", "code", "comments"]
    return {name: tuple(map(int, numbers)) for *numbers, name in lines[1:]}


def test_rooms_are_added_up_now_and_of_a_commit(repository, monkeypatch, capsys):
    old = {"nanolm/a": (1, 1, 0), "kernels": (1, 1, 0), "data": (1, 1, 0), "all": (3, 3, 0)}
    assert printed(monkeypatch, capsys, "--at", "HEAD") == old
    new = old | {"kernels": (1, 2, 1), "all": (3, 4, 1)}
    assert printed(monkeypatch, capsys) == new
    reading = {"nanolm/a/b/deep.py": (1, 1, 0), "all": (1, 1, 0)}
    assert printed(monkeypatch, capsys, "--to_read") == reading
