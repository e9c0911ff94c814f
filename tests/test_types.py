"""What mypy is told to overlook has its reason beside it and stays little, and the hooks before a
commit are what `make lint` checks."""

import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parent.parent
MOST = 20
IGNORE = re.compile(r"# type: ignore(\[[a-z-]+\])?(.*)$")


def overlooked():
    """(place, its error code, the reason) of every `type: ignore` in what mypy reads."""
    for folder in ("nanolm", "data", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                if found := IGNORE.search(line):
                    beside = found[2].strip().removeprefix("#").strip()
                    above = lines[number - 1].strip().removeprefix("#").strip()
                    is_comment = lines[number - 1].strip().startswith("# ")
                    reason = beside or (above if is_comment else "")
                    yield f"{path.relative_to(ROOT)}:{number + 1}", found[1], reason


def test_every_ignore_has_its_code_and_its_reason():
    found = list(overlooked())
    assert 0 < len(found) <= MOST
    bare = [place for place, code, reason in found if not code or len(reason.split()) < 3]
    assert not bare, f"without a code or a reason: {bare}"


def test_nothing_switches_the_check_off_for_a_whole_file():
    for folder in ("nanolm", "data", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert not re.search(r"^# mypy:|no_type_check", path.read_text(encoding="utf-8"), re.M)


def test_kernels_and_data_stand_where_mypy_looks():
    for name in ("kernels", "data"):
        link = ROOT / "typings" / "nanolm" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_the_hooks_are_those_of_make_lint():
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    checked = [line.strip().removeprefix("$(BIN)/") for line in rule.splitlines()]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    wanted = ["ruff check", "ruff format", "mypy"]
    assert [" ".join(line.split()[:2]) for line in hooks] == wanted
    assert [" ".join(line.split()[:2]) for line in checked] == wanted
