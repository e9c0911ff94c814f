"""`python -m tests.matrix`: a row of docs/matrix.md belongs to the commit that its tests ran on."""

import re
import subprocess
import sys

import pytest

from tests import matrix

GIT = ("git", "-c", "user.name=x", "-c", "user.email=x@y")
CELLS = matrix.CELLS[1:3]
VERSIONS = dict.fromkeys(matrix.SHOWN, "1.2") | {"python": "3.12.7"}


def git(folder, *words):
    subprocess.run([*GIT, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two files in the place of ours, and no environments."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / ".matrix")
    monkeypatch.setattr(matrix, "TABLE", tmp_path / "docs" / "matrix.md")
    monkeypatch.setattr(matrix, "CELLS", CELLS)
    monkeypatch.setattr(matrix, "find_python", lambda version: "python")
    monkeypatch.setattr(matrix, "install", lambda cell, python: None)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "matrix.md").write_text("old\n")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text(".matrix/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v1")
    return tmp_path


def head(folder):
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.check_output(words, cwd=folder, text=True)[:7]


def test_a_commit_is_seven_digits_with_a_plus_where_files_differ(repository):
    assert matrix.commit() == head(repository)  # not v1, the name of a tag
    (repository / "a.py").write_text("x = 2\n")
    assert matrix.commit() == f"{head(repository)}+"


def test_sources_are_all_files_but_pages(repository):
    before = matrix.sources()
    (repository / "docs" / "matrix.md").write_text("new\n")
    assert matrix.sources() == before
    (repository / "b.py").write_text("")  # not added yet
    added = matrix.sources()
    assert added != before
    (repository / "b.py").rename(repository / "c.py")
    assert matrix.sources() not in (before, added)
    (repository / "c.py").unlink()
    assert matrix.sources() == before
    (repository / "a.py").write_text("x = 2\n")
    assert matrix.sources() != before


def main(monkeypatch, *words):
    """The command; the names of cells that it ran, each with the commit that it was told."""
    ran = []

    def run(cell, tree, workers):
        ran.append((cell.name, tree["commit"]))
        found = {"versions": VERSIONS, "tests": "not slow", "failed": []}
        return tree | found | {"closing": f"{len(ran)} passed in 1.00s"}

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(sys, "argv", ["matrix", *words])
    with pytest.raises(SystemExit) as end:
        matrix.main()
    assert end.value.code == 0
    return ran


def rows(repository):
    """Python -> the cells of its row in the page."""
    lines = (repository / "docs" / "matrix.md").read_text().splitlines()
    shown = [line.strip("| ").split(" | ") for line in lines if line.startswith("| 3")]
    assert {len(row) for row in shown} == {len(matrix.SHOWN) + 4}
    return shown


def test_each_row_has_the_commit_that_it_ran_on(repository, monkeypatch):
    names, first = [cell.name for cell in CELLS], head(repository)
    # The first cell's row changes docs/matrix.md, and the second still ran on what was committed.
    assert main(monkeypatch) == [(name, first) for name in names]
    assert [row[-3:] for row in rows(repository)] == [
        [first, "not slow", "1 passed in 1.00s"],
        [first, "not slow", "2 passed in 1.00s"],
    ]
    git(repository, "commit", "-qam", "the table")
    assert main(monkeypatch) == []  # pages are no sources
    (repository / "a.py").write_text("x = 2\n")
    git(repository, "commit", "-qam", "two")
    second = head(repository)
    assert main(monkeypatch, "--only", names[1]) == [(names[1], second)]
    assert [row[-3] for row in rows(repository)] == [first, second]
    assert main(monkeypatch, "--only", names[1], "--fresh") == [(names[1], f"{second}+")]


def test_a_cell_that_has_no_result_is_told(repository):
    text = matrix.table(
        {
            CELLS[0].name: {"versions": VERSIONS, "commit": "abc", "tests": "all"}
            | {"closing": "1 passed in 2.00s"}
        }
    )
    head_of, rule, found, missing = (line.strip("| ").split(" | ") for line in text.splitlines())
    assert len(head_of) == len(rule) == len(found) == len(missing)
    assert found[head_of.index("commit")] == "abc" and found[0] == "3.12.7"
    assert missing[0] == CELLS[1].python and missing[-1] == "not run yet"


def test_what_pytest_said_last_is_kept_and_what_failed(repository, monkeypatch):
    endings = ("=== 1 passed in 1.0s ===", "=== 1 failed, 2 passed in 9.5s ===", "make: 1")
    said = "\\n".join(("FAILED tests/a.py::b - x", *endings))

    class Said(matrix.Cell):
        def command(self, workers):
            return [sys.executable, "-c", f"print('{said}')"]

    monkeypatch.setattr(matrix, "versions", lambda cell: VERSIONS)
    (repository / ".matrix").mkdir()
    tree = {"sources": "s", "commit": "c"}
    found = matrix.run(Said("3.12", "2.11.0"), tree, 2)
    assert found["closing"] == "1 failed, 2 passed in 9.5s" and found["tests"] == "not slow"
    assert found["failed"] == ["FAILED tests/a.py::b - x"] and tree.items() <= found.items()
    said = "nothing"
    assert matrix.run(Said("3.12", "2.11.0"), tree, 2)["closing"] == "pytest did not finish"


def test_the_committed_table_is_of_these_cells():
    text = (matrix.ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert text.startswith(matrix.HEAD)
    shown = [line.strip("| ").split(" | ") for line in text.removeprefix(matrix.HEAD).splitlines()]
    assert shown[0][-3:] == ["commit", "tests", "pytest's closing line"]
    for row, cell in zip(shown[2:], matrix.CELLS, strict=True):
        assert row[0].startswith(cell.python)
        assert row[-1] == "not run yet" or re.fullmatch(r"[0-9a-f]{7}\+?", row[-3]), row
