"""`nanolm study`: cells, their keys, the choice on val, restarts, the table."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import pytest

from nanolm import cli
from nanolm.config import strict_yaml
from nanolm.config.typed import instance
from nanolm.errors import UserError
from nanolm.finetune.study import cells as study_cells
from nanolm.finetune.study.config import StudyConfig
from nanolm.finetune.study.run import plan, settings
from nanolm.finetune.study.table import mean_and_error
from tests.finetuned import QUIET, checkpoint, command, questions, table
from tests.test_train_command import ROOT

STUDY = """
name: tiny
data: null
paths: {encoder: null_path}
seeds: [0, 1]
jobs: 2
overrides: {init_from: "{encoder}", train.steps: 3, train.global_batch: 12}
tune:
  grid: {optim.lr: [1.0e-3, 3.0e-3]}
rows:
  - {name: kinds, overrides: {data.path: "{data}/kinds"}, metric: accuracy, yardstick: 0.5}
variants:
  random: {overrides: {weights: random}}
  pretrained: {}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study's file, its data and its page."""
    folder = tmp_path_factory.mktemp("study")
    for split, n, start in (("train", 60, 0), ("val", 21, 1000), ("test", 21, 2000)):
        table(folder / "data" / "kinds", split, questions(n, start))
    (folder / "study.yaml").write_text(STUDY.replace("null_path", str(checkpoint("mlm"))))
    page = "# Page\n\n<!-- study: tiny -->\nold\n<!-- end of study: tiny -->\n\nend\n"
    (folder / "page.md").write_text(page)
    return folder


def words(place, *more):
    return [
        "study",
        str(place / "study.yaml"),
        f"--data={place / 'data'}",
        f"--out={place / 'out'}",
        f"--results={place / 'results.json'}",
        f"--table={place / 'page.md'}",
        *more,
    ]


def in_this_process(ran):
    """Stands for `run_process`: the same command without a process of its own."""

    def run_process(cell, name, argv):
        ran.append((name, cell.label))
        study_cells.log_of(cell, name).parent.mkdir(parents=True, exist_ok=True)
        command(name, *argv, *(QUIET[2:] if name == "finetune" else []))
        return {"cpu_seconds": 6.0, "peak_mib": 100.0}

    return run_process


def test_a_study_runs_what_is_missing_and_no_more(place, monkeypatch):
    ran: list = []
    monkeypatch.setattr(study_cells, "run_process", in_this_process(ran))
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    printed = command(*words(place, "--jobs=1"))
    # per variant: two settings with seed 0, the better one with seed 1, two looks at test
    assert [name for name, _ in ran].count("finetune") == 6
    assert [name for name, _ in ran].count("evaluate") == 4
    written = json.loads((place / "results.json").read_text())
    cells = written["cells"]
    assert len(cells) == 6
    for variant in ("random", "pretrained"):
        mine = [cell for cell in cells.values() if cell["variant"] == variant]
        tested = [cell for cell in mine if cell["test"]]
        assert {cell["seed"] for cell in tested} == {0, 1} and len(tested) == 2
        best = max(cell["val"] for cell in mine if cell["seed"] == 0)
        (chosen,) = {json.dumps(cell["setting"]) for cell in tested}
        assert next(c["val"] for c in tested if c["seed"] == 0) == best, chosen
        assert all(cell["trained_params"] == cell["params"] > 0 for cell in mine)
    assert not list((place / "out").rglob("*.safetensors"))
    page = (place / "page.md").read_text()
    assert page.startswith("# Page") and page.endswith("end\n") and "old" not in page
    assert "| kinds | accuracy | 0.500 |" in page and "±" in page
    assert "6 cells, 0.7 CPU minutes" not in page  # test counts too: 6 trainings, 4 evaluations
    assert "6 cells, 1.0 CPU minutes in all" in page and "kinds" in printed
    # a second call runs nothing; another path to the same data and weights is the same study
    ran.clear()
    command(*words(place, "--jobs=1"))
    (place / "moved").symlink_to(place / "data")
    command(*words(place, f"--data={place / 'moved'}"))
    assert ran == [] and (place / "page.md").read_text() == page
    # what is gone from the results is run again, and nothing else
    key = next(key for key, cell in cells.items() if cell["test"] and cell["seed"] == 1)
    left = {k: cell for k, cell in cells.items() if k != key}
    (place / "results.json").write_text(json.dumps(written | {"cells": left}))
    command(*words(place))
    assert [name for name, _ in ran] == ["finetune", "evaluate"]
    again = json.loads((place / "results.json").read_text())["cells"][key]
    assert again["test"] == cells[key]["test"]


def test_a_row_may_have_a_grid_of_its_own_and_a_word_table_counts_by_its_content(place, tmp_path):
    def groups(line, rate=0.25):
        path = tmp_path / "own.yaml"
        row = f"augment.synonyms: {line}, augment.synonym_rate: {rate}, data.path:"
        text = (place / "study.yaml").read_text().replace("data.path:", row)
        path.write_text(text.replace("yardstick: 0.5", "tune: {grid: {optim.lr: [2.0e-3]}}"))
        study = instance(StudyConfig, strict_yaml.read_mapping(path))
        paths = {"encoder": str(checkpoint("mlm"))}
        return plan(dataclasses.replace(study, data=str(place / "data"), paths=paths), {})

    one, same, other = (tmp_path / name for name in ("one.tsv", "same.tsv", "other.tsv"))
    for path, words_ in ((one, "a\tb"), (same, "a\tb"), (other, "a\tc")):
        path.write_text(words_)
    keys = {}
    for path in (one, same, other):
        found = groups(path)
        assert [len(group.tries) for group in found] == [0, 0], "one setting is not tried first"
        assert all(len(group.finals) == 1 for group in found)
        assert found[0].finals[0][0].setting == {"optim.lr": 2.0e-3}
        keys[path] = [cell.key for group in found for final in group.finals for cell in final]
    assert keys[one] == keys[same] and not set(keys[one]) & set(keys[other])


@pytest.mark.slow
def test_a_cell_in_a_process_of_its_own(place, tmp_path):
    text = (place / "study.yaml").read_text().split("variants:")[0]
    text = text.replace("metric: accuracy", "metric: accuracy, reported: mcc")
    (tmp_path / "one.yaml").write_text(text.replace("[1.0e-3, 3.0e-3]", "[1.0e-3]"))
    argv = [*words(place, f"--out={tmp_path / 'out'}", "--seeds=[3]"), "--costs", "--keep_weights"]
    argv[1], argv[4] = str(tmp_path / "one.yaml"), f"--results={tmp_path / 'r.json'}"
    printed = command(*argv, "--table=null")
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cells"].values()
    assert cell["peak_mib"] > 50 and cell["cpu_seconds"] > 0.5 and cell["test"]["rows"] == 21
    assert "trained" in printed and list((tmp_path / "out").rglob("model.safetensors"))


def test_a_cell_that_fails_is_named_and_the_rest_is_kept(place, tmp_path, monkeypatch):
    inner = in_this_process([])

    def run_process(cell, name, argv):
        if cell.variant == "random":
            raise UserError(f"cell {cell.label} failed: out of memory")
        return inner(cell, name, argv)

    monkeypatch.setattr(study_cells, "run_process", run_process)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    argv = words(place, f"--results={tmp_path / 'r.json'}", "--seeds=[0]")
    argv = [word for word in argv if not word.startswith("--table")]
    with pytest.raises(UserError, match=r"1 of 2 groups are not finished: cell kinds, random, op"):
        cli.run(argv)
    cells = json.loads((tmp_path / "r.json").read_text())["cells"].values()
    assert {cell["variant"] for cell in cells} == {"pretrained"}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seeds:", "seed:", "seed: there is no such key"),
        ("train.steps: 3", "train.stepz: 3", "train.stepz: there is no such key"),
        ("name: kinds", "nome: kinds", r"rows\[0\].nome: there is no such key"),
        ("metric: accuracy", "reported: chrf", "kinds: reported=chrf is no figure of this task"),
        ("[1.0e-3, 3.0e-3]", "[]", "tune.grid.optim.lr is empty"),
        ("init_from: ", "run.log_every: 1, data.limit: ", "cannot|expected|has no init_from"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_run(place, tmp_path, old, new, sentence):
    path = tmp_path / "bad.yaml"
    path.write_text((place / "study.yaml").read_text().replace(old, new))
    argv = words(place)
    argv[1] = str(path)
    with pytest.raises(UserError, match=sentence):
        cli.run(argv)
    with pytest.raises(UserError, match=r"say where \{data\} is with --data FOLDER"):
        cli.run(["study", str(place / "study.yaml")])
    with pytest.raises(UserError, match=r"needs one line <!-- study: tiny -->"):
        cli.run([*words(place), f"--table={place / 'study.yaml'}"])


def test_a_figure_that_the_test_split_does_not_give_is_told_and_nothing_is_kept(
    tmp_path, monkeypatch
):
    cell = study_cells.Cell("a", "b", 0, {}, (), "roc_auc", "roc_auc", True, "key", tmp_path)
    answer = {"run": "r", "split": "test", "rows": 3, "accuracy": 1.0}

    def run_process(cell, command, words):
        (tmp_path / "test.json").write_text(json.dumps(answer))
        return {"cpu_seconds": 1.0, "peak_mib": 1.0}

    monkeypatch.setattr(study_cells, "run_process", run_process)
    record = {"metric": "roc_auc", "cpu_seconds": 2.0, "test": None}
    with pytest.raises(UserError, match=r"cell a, b, seed 0: its test split gives no roc_auc"):
        study_cells.test(cell, record)
    answer["roc_auc"] = 0.5
    assert study_cells.test(cell, record)["test"] == {"rows": 3, "accuracy": 1.0, "roc_auc": 0.5}


@pytest.mark.slow
def test_a_study_that_is_told_to_end_takes_its_cells_along(place, tmp_path):
    argv = words(place, f"--out={tmp_path}", f"--results={tmp_path / 'r.json'}")
    more = ["--table=null", "--overrides={train.steps: 100000}"]
    job = subprocess.Popen(
        [sys.executable, "-m", "nanolm", *argv, *more],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.rglob("metrics.jsonl")):
        assert job.poll() is None
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=600)
    assert job.returncode == 2 and said.startswith("nanolm: interrupted; finished cells are kept")
    alive = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False)
    assert alive.stdout == b""


def test_grid_and_standard_error():
    assert settings({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    assert settings({}) == [{}]
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2 and error == pytest.approx(math.sqrt(1 / 3))
    assert mean_and_error([0.5]) == (0.5, None)
    with pytest.raises(UserError, match="stands twice"):
        instance(StudyConfig, {"name": "x", "rows": [{"name": "a"}, {"name": "a"}]})
