"""What a command is told to write: never what it reads, and of a kind that its name says."""

import dataclasses
import importlib
import json

import pytest

from nanolm import cli
from nanolm.commands.plot import FORMATS
from nanolm.config.load import leaf_kinds
from nanolm.config.typed import members
from nanolm.config.written import BESIDE, WRITTEN, require_other_files
from nanolm.errors import UserError
from tests.kinds_of_run import call, data_of, tuned
from tests.prepared import trained_run


def pairs():
    """(command, option that is written, option that is text) of the whole command line."""
    for command, (name, _) in cli.COMMANDS.items():
        module = importlib.import_module(name)
        if not hasattr(module, "Arguments"):
            continue
        kinds = leaf_kinds(module.Arguments)
        for written in set(WRITTEN) & set(kinds):
            for other, kind in kinds.items():
                if other != written and {str, list[str]} & set(members(kind)):
                    yield command, written, other


PAIRS = sorted(pairs())


BESIDE_THEM = sorted({(command, written) for command, written, _ in PAIRS if written in BESIDE})


def test_the_commands_that_write_are_known():
    found = {(command, written) for command, written, _ in PAIRS}
    assert {("predict", "out"), ("evaluate", "json"), ("estimate", "json")} <= found
    assert ("explain", "json", "out") in PAIRS and ("prepare", "json", "sources") in PAIRS


def needed(module, *named):
    """What a command wants beside these options: all of it is called x."""
    wanted = {
        field.name
        for field in dataclasses.fields(module.Arguments)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    wanted = (wanted | set(getattr(module, "POSITIONAL", ()))) - set(named)
    kinds = leaf_kinds(module.Arguments)
    texts = {name for name in wanted if {str, list[str]} & set(members(kinds[name]))}
    return [f"--{name}=x" for name in sorted(texts)]


@pytest.mark.parametrize(("command", "written", "other"), PAIRS, ids=map(" ".join, PAIRS))
def test_no_option_names_the_file_that_another_one_writes(command, written, other, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    (tmp_path / "link").symlink_to(path)
    module = importlib.import_module(cli.COMMANDS[command][0])
    words = [f"--{written}={tmp_path / 'link'}", f"--{other}={path}"]
    said = call([*command.split(), *words, *needed(module, written, other)])
    named = other in (
        "only",
        "precisions",
        "objectives",
        "encoding",
        "plugins",
    )  # checked as names before
    assert said.status == 2 and (named or "would be written over" in said.err)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("command", "written"), BESIDE_THEM, ids=map(" ".join, BESIDE_THEM))
def test_a_place_that_is_none_is_told_before_any_work(command, written, tmp_path):
    """Nothing else on the line is there, and yet the place is what is told."""
    module = importlib.import_module(cli.COMMANDS[command][0])
    for path, words in ((tmp_path / "none" / "x", "there is no folder"), (tmp_path, "is a folder")):
        said = call([*command.split(), *needed(module, written), f"--{written}={path}"])
        assert said.status == 2 and f"--{written} {path}" in said.err and words in said.err
    assert list(tmp_path.iterdir()) == []


def test_other_files_may_be_written_again(tmp_path):
    @dataclasses.dataclass
    class Arguments:
        sources: list[str]
        json: str | None = None

    table, out = tmp_path / "a.csv", tmp_path / "out.json"
    table.write_text("text\n")
    out.write_text("{}")
    for named in ([str(table)], [f"table:{table}:text"], []):
        require_other_files(Arguments(named, str(out)))
    require_other_files(Arguments([str(tmp_path / "none")], str(tmp_path / "none")))
    require_other_files(Arguments(["/dev/null"], "/dev/null"))
    with pytest.raises(UserError, match=r"--json .*a\.csv is the file that is given as sources"):
        require_other_files(Arguments([f"table:{table}:text"], str(table)))


def test_predictions_never_take_the_place_of_the_records(tmp_path, monkeypatch):
    run, records = tuned("classify"), (data_of("classify") / "test.jsonl").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(records)
    words = ["predict", str(run), "test.jsonl"]
    said = call([*words, "--out", str(tmp_path / "test.jsonl")])
    assert said.status == 2 and (tmp_path / "test.jsonl").read_bytes() == records
    assert call([*words, "--out", "found.jsonl"]).status == 0
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    assert len(lines) == len(records.splitlines()) and "label" in json.loads(lines[0])


@pytest.mark.parametrize(
    "name", ["curve", "curve.jsonl", "curve.", ".png", "curve.tar.gz", "a.gif"]
)
def test_a_picture_says_of_which_kind_it_is(name, tmp_path):
    said = call(["plot", str(trained_run()), f"--out={tmp_path / name}"])
    assert said.status == 2 and f"end it in {', '.join(FORMATS)}" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*FORMATS, ".SVG"])
def test_a_picture_of_each_kind_is_written(suffix, tmp_path):
    out = tmp_path / f"curve{suffix}"
    said = call(["plot", str(trained_run()), f"--out={out}"])
    assert said.status == 0 and f"wrote {out}" in said.out.replace("\n", " ")
    begins = {".png": b"\x89PNG", ".pdf": b"%PDF"}.get(suffix, b"<?xml")
    assert out.read_bytes().startswith(begins) and list(tmp_path.iterdir()) == [out]
