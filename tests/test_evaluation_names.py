"""What `nanolm evaluate` writes into a run: the run's own figures are those of its own model on its
own data, and anything else has a name of its own or none."""

import json
import shutil

import pytest

from tests.finetuned import checkpoint, command, finetune, questions, table

OWN = {"test.json", "test.txt", "test_predictions.jsonl", "test_confusion.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose best checkpoint is not its newest, with a moving average of its weights."""
    folder = tmp_path_factory.mktemp("names")
    for split, n in (("train", 24), ("val", 9), ("test", 9)):
        table(folder / "data", split, questions(n, start=n))
    words = ("--objective.name=classify", "--train.steps=6", "--eval.every=2", "--train.ema=0.5")
    words += ("--run.checkpoint_every=2", "--run.keep_last=3", "--train.global_batch=6")
    finetune(checkpoint("mlm"), folder / "data", folder / "run", *words)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, evaluated."""
    copy = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    command("evaluate", str(copy))
    assert {path.name for path in (copy / "evaluation").iterdir()} == OWN
    return copy


def steps(run):
    """{number: checkpoint} of a run."""
    return {int(p.name[5:]): p for p in (run / "checkpoints").glob("step-*")}


def own(run):
    return {name: (run / "evaluation" / name).read_bytes() for name in OWN}


def added(run):
    """What an evaluation wrote beside the run's own files."""
    return {path.name for path in (run / "evaluation").iterdir()} - OWN


def test_other_checkpoints_and_weights_have_names_of_their_own(run):
    before, chosen = own(run), json.loads((run / "summary.json").read_text())["best_step"]
    command("evaluate", str(steps(run)[chosen]))  # which is the run's own model
    assert not added(run) and own(run) == before
    other = next(step for step in sorted(steps(run)) if step != chosen)
    for words, name in (
        ((str(steps(run)[other]),), f"test-step-{other:08d}"),
        ((str(run), "--ema=false"), "test-without-ema"),
        ((str(steps(run)[other]), "--ema=false"), f"test-step-{other:08d}-without-ema"),
    ):
        command("evaluate", *words)
        assert added(run) == {file.replace("test", name, 1) for file in OWN} and own(run) == before
        said = json.loads((run / "evaluation" / f"{name}.json").read_text())
        assert said["checkpoint"] == f"step-{other if 'step' in name else chosen:08d}"
        assert f"| {name} |" in (run / "MODEL.md").read_text()
        for file in added(run):
            (run / "evaluation" / file).unlink()


@pytest.mark.parametrize("whole_run", [True, False])
def test_an_average_of_several_is_nobodys_own(run, trained, whole_run):
    before, chosen = own(run), json.loads((run / "summary.json").read_text())["best_step"]
    first = run if whole_run else steps(run)[chosen]
    others = steps(trained)
    other = next(path for step, path in others.items() if step != chosen)
    command("evaluate", str(first), "--ensemble", str(other))
    assert not added(run) and own(run) == before


STRAY = ["{broken", "[]", "3", '{"figures": 3}', '{"figures": {"a": "b"}}', "[" * 9999, b"\xff", ""]


def test_other_files_among_the_evaluations_are_left_out_of_the_card(run):
    for number, content in enumerate(STRAY):
        stray = run / "evaluation" / f"mine{number}.json"
        stray.write_bytes(content if isinstance(content, bytes) else content.encode())
    command("evaluate", str(run))
    card = (run / "MODEL.md").read_text()
    assert "| test |" in card and "mine0 |" not in card
    left_out = ", ".join(f"mine{number}.json" for number in range(len(STRAY)))
    assert f"Of `evaluation/`, no evaluation and left out: {left_out}." in " ".join(card.split())


def test_figures_that_json_wrote_beside_the_evaluations_are_no_hindrance(run):
    for _ in range(2):
        command("evaluate", str(run), f"--json={run / 'evaluation' / 'mine.json'}")
    assert "left out: mine.json" in (run / "MODEL.md").read_text()
