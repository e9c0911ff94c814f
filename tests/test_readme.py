"""What the pages say is so: their commands exist with their options, their links lead somewhere,
the README's Python runs, and docs/index.md knows every page."""

import importlib
import pathlib
import re
import shlex

import pytest
import torch

from nanolm import cli
from nanolm.cli import COMMANDS
from nanolm.config.load import leaf_kinds, load_config
from nanolm.registry import OBJECTIVES
from tests.doors import doors
from tests.prepared import prepared_corpus, trained_run

ROOT = pathlib.Path(__file__).parent.parent
TOP = ("README.md", "README.zh.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
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


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(readme().split()) <= 900


def test_the_python_of_the_readme_runs(capsys):
    use, _ = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.M | re.S)
    assert use.count('"runs/demo"') == 1
    names = {}
    exec(use.replace('"runs/demo"', repr(str(trained_run()))), names)
    length = names["tokens"].shape[1]
    assert names["hidden"].shape == (1, length, 32)
    assert names["logits"].shape == (1, length, names["saved"].config.model.vocab_size)
    assert torch.isfinite(names["logits"]).all() and names["texts"][0]


def test_the_plug_in_of_the_readme_has_options_of_its_own(tmp_path, monkeypatch, capsys):
    _, plug_in = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.M | re.S)
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "temperature.py").write_text(plug_in, encoding="utf-8")
    settings = "plugins: [my_pkg.temperature]", "objective: {name: my_clm, temperature: 2.0}"
    for line in settings:
        assert plug_in.count(f"#   {line}\n") == 1
    (tmp_path / "config.yaml").write_text("\n".join(settings))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(OBJECTIVES, "_entries", dict(OBJECTIVES._entries))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        cli.run(["train", "--config=config.yaml", "--print_config"])
    assert leaving.value.code in (0, None)
    assert re.search(r"temperature: 2\.0", capsys.readouterr().out)


def linked(page):
    """The targets of a page's links and pictures outside of code, as the page writes them, but for
    addresses."""
    text = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in linked(page):
        name, _, heading = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name} links {target}"
        if heading:
            text = there.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
            assert heading in {title.lower().replace(" ", "-") for title in titles}


def test_the_index_has_every_page_of_docs_with_a_sentence():
    index = ROOT / "docs" / "index.md"
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    lines = re.findall(
        r"^- \[[^\]]+\]\(([^)]+)\): \S.*\.$", index.read_text(encoding="utf-8"), flags=re.M
    )
    assert sorted(lines) == sorted(pages)


def test_no_page_names_a_folder_outside_of_the_repository():
    for page in [*PAGES, *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("*/README.md")]:
        assert ".." + "/shared" not in page.read_text(encoding="utf-8"), page


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
    assert [heading.split(",")[0] for heading in headings] == ["Ideas", "Machinery"]
    assert next(iter(files)) == "nanolm/ops/masks.py"
    assert f"the {len(files)} files of `docs/reading_order.txt`" in readme()
    assert f"counts {round(sum(lines), -2):,} lines" in readme() and max(lines) < 350


def test_a_step_of_the_demo_opens_few_doors_and_all_are_in_the_reading_order():
    found = doors(prepared_corpus())
    assert found["nanolm/training/trainer.py"] >= {"Trainer.step", "Trainer.step_gradient"}
    assert len(found) <= 21, sorted(found)  # 29 before the move
    assert set(found) <= set(reading_order()[0])
