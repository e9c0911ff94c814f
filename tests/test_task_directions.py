"""Every figure of every task says which way is better, and whoever chooses goes by that."""

import json

import numpy as np
import pytest

from nanolm.errors import UserError
from nanolm.finetune.prepare import prepare
from nanolm.finetune.study.cells import Cell
from nanolm.finetune.study.run import Group, chosen
from nanolm.finetune.tasks.base import Task
from nanolm.registry import OBJECTIVES
from tests.finetuned import checkpoint, command, config, finetune, table
from tests.test_objectives_tasks import EXTRA, RECORDS

ERRORS = ("loss", "mse", "mae", "nll", "perplexity")
"""What is small for a good model whatever the task; so is a task's own term of the loss."""
PLAIN = [{"tokens": r["tokens"], "tags": list(map(str.upper, r["tokens"]))} for r in RECORDS["tag"]]
EVERY = {
    **RECORDS,
    "two classes": [{"text": r["text"], "label": i % 2} for i, r in enumerate(RECORDS["classify"])],
    "plain tags": PLAIN,
    "several labels": [
        {"text": r["text"], "label": ["a", "b"][: 1 + i % 2]}
        for i, r in enumerate(RECORDS["classify"])
    ],
}
OPTIONS = EXTRA | {"several labels": {"multi_label": True}}
TASK_OF = {"two classes": "classify", "plain tags": "tag", "several labels": "classify"}
QUICK = ("--train.steps=1", "--train.global_batch=5", "--data.row_length=48", "--eval.batch=4")


def run_task(kind, folder, *words):
    """The summary of one step on the records of a kind."""
    name = TASK_OF.get(kind, kind)
    for split in ("train", "val", "test"):
        table(folder / "data", split, EVERY[kind])
    given = [f"--objective.{k}={json.dumps(v)}" for k, v in OPTIONS.get(kind, {}).items()]
    given = [word.replace('="', "=").removesuffix('"') for word in given]
    base = checkpoint("clm" if name == "write" else "mlm")
    every = (f"--objective.name={name}", *QUICK, *given, *words)
    return finetune(base, folder / "data", folder / "run", *every)


def declared(name, **options):
    entry = OBJECTIVES.get(name)
    return dict(entry.build.metrics(entry.options(**options)))


def tasks():
    builds = {name: OBJECTIVES.get(name).build for name in OBJECTIVES.names()}
    return [n for n, b in builds.items() if isinstance(b, type) and issubclass(b, Task)]


def test_no_task_is_left_out():
    assert set(tasks()) - {"multi"} == set(RECORDS)


@pytest.mark.parametrize("kind", EVERY)
def test_every_figure_declares_its_direction_and_no_other_is_offered(kind, tmp_path):
    summary = run_task(kind, tmp_path)
    directions = declared(TASK_OF.get(kind, kind), **OPTIONS.get(kind, {}))
    run, base = tmp_path / "run", checkpoint("clm" if kind == "write" else "mlm")
    ready = prepare(config(base, tmp_path / "data", run, f"--config={run / 'config.yaml'}"))
    assert set(summary["val"]) == set(ready.task.offered(ready.val.table))
    term = ready.task.term
    assert all(directions[name] == (name not in (*ERRORS, term)) for name in summary["val"])
    assert summary["higher_is_better"] == directions[summary["metric"]]
    report = tmp_path / "report.json"
    command("evaluate", str(run), f"--json={report}")
    figures = json.loads(report.read_text())
    assert set(figures) - set(directions) == {"run", "checkpoint", "split", "rows"}


DIRECTED = [
    (m, t) for m in ("own", "loss", "term") for t in ("classify", "regress", "tag", "embed")
]


# Every task with its own figure, and every other figure with one task.
@pytest.mark.parametrize(
    ("metric", "task"),
    [
        (m, t)
        if m == "own" or (m, t) in (("loss", "regress"), ("term", "tag"))
        else pytest.param(m, t, marks=pytest.mark.slow)
        for m, t in DIRECTED
    ],
)
def test_the_best_checkpoint_is_the_best_by_its_direction(task, metric, tmp_path):
    name = {"own": None, "loss": "loss", "term": OBJECTIVES.get(task).build.term}[metric]
    words = ("--train.steps=6", "--eval.every=1", "--optim.lr=3e-2", "--schedule.warmup=0")
    chosen = [] if name is None else [f"--eval.metric={name}"]
    summary = run_task(task, tmp_path, *words, *chosen)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    seen = {line["step"]: line[summary["metric"]] for line in lines if line["kind"] == "val"}
    best = (max if summary["higher_is_better"] else min)(seen.values())
    assert summary["best_val"] == best == seen[summary["best_step"]]
    assert len(set(seen.values())) > 1


def test_a_figure_keeps_its_sign(tmp_path):
    """Val turned against train: the correlation is negative, and is told as such."""
    words = [f"{'good' if i % 2 else 'bad'} {i}" for i in range(24)]
    table(tmp_path / "data", "train", [{"text": w, "score": i % 2} for i, w in enumerate(words)])
    table(tmp_path / "data", "val", [{"text": w, "score": 1 - i % 2} for i, w in enumerate(words)])
    summary = finetune(
        checkpoint("mlm"),
        tmp_path / "data",
        tmp_path / "run",
        "--objective.name=regress",
        "--train.steps=30",
        "--train.global_batch=24",
        "--eval.every=0",
        "--optim.lr=1e-2",
        "--schedule.warmup=0",
    )
    assert summary["best_val"] == summary["val"]["pearson"] < -0.5


@pytest.mark.parametrize("higher", [True, False])
def test_a_study_chooses_by_direction(higher):
    def cell(i):
        return Cell("r", "v", 0, {"k": i}, (), "m", "m", higher, str(i), None)

    tries = [cell(i) for i in range(4)]
    values = [-0.94, 0.1, -0.2, 0.05]
    (best,) = chosen(Group(None, "v", tries, [[c] for c in tries]), [{"val": v} for v in values])
    assert best.setting["k"] == int((np.argmax if higher else np.argmin)(values))


@pytest.mark.parametrize("higher", [True, False])
def test_a_comparison_goes_by_direction(higher, tmp_path):
    for name, value in (("a", -0.9), ("b", 0.1)):
        folder = tmp_path / name / "evaluation"
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps({"rows": 3, "figures": {"m": value}}))
        summary = {"metric": "m", "higher_is_better": higher}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    printed = command("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert printed.split()[-1] == ("worse" if higher else "better")


@pytest.mark.parametrize(
    ("kind", "metric", "sentence"),
    [
        ("classify", "f1", "eval.metric=f1 is no figure of this task; there are loss, classify"),
        ("classify", "roc_auc", "roc_auc cannot be counted on .*val.jsonl"),
        ("several labels", "mcc", "mcc cannot be counted"),
        ("plain tags", "f1", "f1 cannot be counted .* token_accuracy"),
        ("write", "bleu", "bleu cannot be counted .* perplexity"),
    ],
)
def test_a_figure_that_there_will_not_be_is_refused_before_training(
    kind, metric, sentence, tmp_path
):
    with pytest.raises(UserError, match=sentence):
        run_task(kind, tmp_path, f"--eval.metric={metric}")
    assert not (tmp_path / "run").exists()
