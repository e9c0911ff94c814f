"""A fresh clone can run every config: what it starts from and reads is made by commands that stand
in its first comment, or is named there in CAPITALS as the user's own."""

import pathlib
import re
import shlex

import pytest

from nanolm import cli
from nanolm.config import strict_yaml

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
DEMOS = {
    "make demo": {"runs/demo-data", "runs/demo"},
    "make demo-mlm": {"runs/demo-data", "runs/demo-mlm"},
    "make demo-t5": {"runs/demo-data", "runs/demo-t5"},
}
OWN = re.compile(r"\b[A-Z]{3,}\b")


def comment(path: pathlib.Path) -> str:
    """The comment that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def commands(path: pathlib.Path) -> list[str]:
    """The commands of the first comment, and those of a page of docs/ that it names."""
    found = re.findall(r"^#   ((?:nanolm|make) .*)$", comment(path), re.M)
    for page in re.findall(r"docs/\w+\.md", comment(path)):
        text = (ROOT / page).read_text(encoding="utf-8")
        found += re.findall(r"^((?:nanolm|python train\.py) .*)$", text, re.M)
    return found


def made(found: list[str]) -> set[str]:
    """The folders that these commands write."""
    folders = set()
    for line in found:
        folders |= DEMOS.get(line, set())
        folders |= set(re.findall(r"--(?:out|run\.dir)[ =](\S+)", line))
    return folders


def wanted(config: dict) -> set[str]:
    """The folders and files that a config names and that no installation brings along."""
    data = config.get("data") or {}
    named = {config.get("init_from"), data.get("path") if isinstance(data, dict) else None}
    named |= set((config.get("paths") or {}).values())
    return {path for path in named if path and not path.startswith("stdlib:")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_config_needs_is_made_by_its_first_comment(path):
    found, config = commands(path), strict_yaml.read_mapping(path)
    own = [line for line in found if str(path.relative_to(ROOT)) in line]
    overridden = any(re.search(r"--data(\.path)?[ =][A-Z]{3,}\b", line) for line in own)
    missing = wanted(config) - made(found)
    if overridden:
        missing -= {(config.get("data") or {}).get("path")}
    assert found and not missing, f"{path}: nothing in its first comment makes {missing}"
    for line in found:
        if line.startswith("nanolm prepare"):
            source = shlex.split(line)[2]
            assert source == "stdlib" or OWN.search(source) or "docs/" in comment(path), line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_of_its_first_comment_exist(path):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in re.findall(r"^#   ((?:nanolm|make) .*)$", comment(path), re.M):
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, line
        else:
            assert words[1] in cli.COMMANDS, line
            named = re.findall(r"configs/\S+\.yaml", line)
            assert all((ROOT / name).is_file() for name in named), line
