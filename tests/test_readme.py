"""Every command that README.md and docs/ name exists, with the options they name."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from nanolm.cli import COMMANDS
from nanolm.config.load import leaf_kinds, load_config
from tests.doors import doors
from tests.prepared import prepared_corpus

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAIN = re.compile(r"^(torchrun .*?|python )train\.py ")
FINETUNE = re.compile(r"^torchrun .*?-m nanolm\.finetune ")


def commands():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.M | re.S)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in [*lines, *inline]:
            line = FINETUNE.sub("nanolm finetune ", TRAIN.sub("nanolm train ", line.strip()))
            line = re.split(r"\s#|[>…]|\s[\[|]", line)[0] if "<mask>" not in line else line
            if re.match(r"nanolm [a-z]", line):
                yield f"{page.name}: {line}"


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_command_exists(line):
    words = shlex.split(line.partition(": ")[2])[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if not any(command.startswith(name) for command in COMMANDS):
        pytest.fail(f"there is no command {name}")
    if name not in COMMANDS:
        return  # a family, such as `nanolm kernels`
    module = importlib.import_module(COMMANDS[name][0])
    configs = [word for word in words if word.endswith(".yaml") and not word[:-5].isupper()]
    for config in configs:
        assert (ROOT / config).is_file(), f"there is no {config}"
    options = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    if hasattr(module, "Arguments"):
        known = set(leaf_kinds(module.Arguments)) | {"config", "help", "print_config"}
        assert options <= known, f"{name} has no {options - known}"
    elif name == "train":
        config = load_config([f"--config={path}" for path in configs])
        for option in options - {"config", "help", "print_config"}:
            value = config
            for part in option.split("."):
                value = getattr(value, part)


@pytest.mark.slow
def test_the_walk_of_one_batch_prints_the_shapes_of_the_table():
    words = [sys.executable, str(ROOT / "docs" / "one_batch.py"), str(prepared_corpus())]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for shape in ("[257]", "[16, 256]", "[16, 256, 384]", "/ 4096"):
        assert shape in printed


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make ([a-z0-9-]+)", page.read_text(encoding="utf-8")):
            assert f"\n{target}:" in makefile, f"{page.name} names make {target}"


def reading_order():
    """{file: what it teaches} of the two lists, and their two headings."""
    lines = (ROOT / "docs" / "reading_order.txt").read_text(encoding="utf-8").splitlines()
    files = dict(line.split(maxsplit=1) for line in lines if re.match(r"[a-z]+/", line))
    return files, [line for line in lines if line and not re.match(r"[a-z]+/", line)]


def test_the_evenings_reading_is_short_enough_for_one():
    files, headings = reading_order()
    lines = [len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [heading.split(",")[0] for heading in headings] == ["Ideas", "Machinery"]
    assert next(iter(files)) == "nanolm/ops/masks.py"
    assert f"the {len(files)} files of `docs/reading_order.txt`" in readme
    assert f"counts {round(sum(lines), -2):,} lines" in readme and max(lines) < 345


def test_a_step_of_the_demo_opens_few_doors_and_all_are_in_the_reading_order():
    found = doors(prepared_corpus())
    assert found["nanolm/training/trainer.py"] >= {"Trainer.step", "Trainer.gradient"}
    assert len(found) <= 21, sorted(found)  # 29 before the move
    assert set(found) <= set(reading_order()[0])
