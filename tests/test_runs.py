"""Reading runs back: the table and the plot."""

import json
import shutil

import pytest

from nanolm.cli import main
from nanolm.commands.plot import curves
from nanolm.errors import UserError
from nanolm.finetune.pictures import pyplot
from nanolm.training.runs import read_run


@pytest.fixture
def runs(tmp_path):
    for name, losses in (("a", [3.0, 2.0]), ("b", [4.0, 3.5])):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        lines = [
            {"step": step, "kind": "train", "loss": loss, "lr": 1e-3, "tokens_per_second": 10.0}
            for step, loss in enumerate(losses, start=1)
        ]
        lines.append({"step": 2, "kind": "val", "loss": losses[-1], "bits_per_byte": 1.5})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.yaml").write_text("model: {trunk: decoder}\nobjective: {name: clm}\n")
    (tmp_path / "runs" / "a" / "summary.json").write_text('{"steps": 2}')
    return tmp_path / "runs"


def test_curves(runs):
    run = read_run(runs / "a")
    assert run.curve("train", "loss") == ([1, 2], [3.0, 2.0])
    assert run.curve("train", "grad_norm") == ([], [])
    assert run.last("val", "bits_per_byte") == 1.5 and run.last("val", "mfu") is None


def test_table_of_all_runs(runs, tmp_path, capsys):
    out = tmp_path / "table.json"
    main(["runs", str(runs), f"--json={out}"])
    rows = json.loads(out.read_text())
    assert [row["train_loss"] for row in rows] == [2.0, 3.5]
    assert [row["finished"] for row in rows] == [True, False]
    assert "clm" in capsys.readouterr().out


def test_plot_of_two_runs_is_a_png(runs, tmp_path):
    out = tmp_path / "curves.png"
    main(["plot", str(runs / "a"), str(runs / "b"), f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    main(["plot", str(runs / "a")])
    assert (runs / "a" / "plot.png").is_file()


def test_refusals(runs, tmp_path, capsys):
    with pytest.raises(UserError, match="no runs"):
        main_or_raise(["runs", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "torn", ["{half a li", "[1]", "\udcff", "\0\0\0", "nul", "9" * 5000, "[" * 9999]
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_torn_line_is_told_and_stops_no_other_run(runs, tmp_path, capsys, torn, place):
    """The table has all runs, and the torn one without that line."""
    path = runs / "a" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines.insert(place, torn.encode("utf-8", "surrogateescape"))
    path.write_bytes(b"\n".join(lines))
    out = tmp_path / "table.json"
    main(["runs", str(runs), f"--json={out}"])
    assert [row["train_loss"] for row in json.loads(out.read_text())] == [2.0, 3.5]
    told = f"metrics.jsonl line {place + 1} is not JSON and was left out"
    assert told in capsys.readouterr().out
    assert len(read_run(runs / "a").lines) == 3


NONE = ["{half", "[]", "3", "\udcff", "[" * 9999]
ODD = {  # what may stand in the place of a run's own files, whether or not a note tells of it
    ("summary.json", True): NONE,
    ("config.yaml", True): NONE,
    ("config.yaml", False): ["model: 3\nobjective: [a]\n", "objective: {name: 3}\n"],
    ("metrics.jsonl", True): ['{"step": "1", "kind": "train", "loss": 1}', '{"step": null}'],
    ("metrics.jsonl", False): [
        '{"step": 2, "kind": "train", "loss": "1", "lr": [1]}',
        '{"kind": "train", "loss": 1.0}',
        '{"step": 1, "kind": {}}',
    ],
}


def test_a_plot_of_no_runs_is_refused(tmp_path):
    out = tmp_path / "none.png"
    with pytest.raises(UserError, match="runs is empty"):
        main_or_raise(["plot", "--runs", "[]", f"--out={out}"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "told", "content"), [(*file, text) for file, held in ODD.items() for text in held]
)
def test_a_file_of_a_run_that_is_none_stops_no_table(runs, tmp_path, capsys, name, told, content):
    path, out = runs / "b" / name, tmp_path / "table.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    main_or_raise(["runs", str(runs), f"--json={out}"])
    first, second = json.loads(out.read_text())
    assert first["train_loss"] == 2.0 and first["finished"] and not second["finished"]
    assert second["train_loss"] == (None if name == "metrics.jsonl" else 3.5)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == told and all(str(path) in note for note in notes)
    assert all(note.endswith("was left out") for note in notes)


def test_a_file_of_a_run_that_is_none_stops_no_plot(runs):
    """Runs with each of these files, in one picture."""
    read = [read_run(runs / "a")]
    for place, (name, content) in enumerate(
        (name, content) for (name, _), held in ODD.items() for content in held
    ):
        run = shutil.copytree(runs / "b", runs / f"b{place}")
        (run / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        read.append(read_run(run))
    curves(pyplot(), read)


def main_or_raise(argv):
    from nanolm.cli import run

    run(argv)
