"""What makes a figure or a key impossible is told before the first step, with a way out that works.

The figures are not listed here: every figure of every task is asked for on records that decide
nothing, on those that do, and on as few of them as training looks at.
"""

import json
import re

import pytest
import torch

from nanolm.data.tables.files import Table
from nanolm.errors import UserError
from nanolm.finetune.prepare import describe, prepare, watched
from nanolm.finetune.splits import make_split
from nanolm.finetune.tasks import metrics
from tests.finetuned import checkpoint, command, config, finetune, table
from tests.test_objectives_tasks import RECORDS, build
from tests.test_task_directions import EVERY, OPTIONS, QUICK, TASK_OF

CORRELATIONS = {"pearson", "spearman"}
AVERAGES = {f"macro_{name}" for name in metrics.PRECISION_RECALL_F1}
BY_KIND = {metric.name for metric in metrics.READING if "_answer_" in metric.name}
ENTITIES = set(metrics.PRECISION_RECALL_F1)

GONE = {  # (kind, what val is of) -> figures that it cannot give; {} everywhere else
    ("classify", "many"): {"roc_auc"},  # three classes
    ("classify", "equal"): {"roc_auc", "mcc"},
    ("two classes", "equal"): {"roc_auc", "mcc"},
    ("several labels", "many"): {"roc_auc", "mcc"},
    ("several labels", "equal"): {"roc_auc", "mcc"},
    ("prompt", "equal"): {"roc_auc", "mcc"},
    ("regress", "equal"): CORRELATIONS,
    ("similar", "equal"): CORRELATIONS,
    ("tag", "many"): AVERAGES,
    ("tag", "equal"): AVERAGES | ENTITIES,
    ("plain tags", "many"): ENTITIES,
    ("plain tags", "equal"): ENTITIES,
    ("read", "equal"): BY_KIND,
    **{("write", val): {metric.name for metric in metrics.GENERATION} for val in ("many", "equal")},
}
SAME = {
    "regress": {"score": 1.0},
    "similar": {"score": 1.0},
    "classify": {"label": "a"},
    "two classes": {"label": 1},
    "several labels": {"label": ["a"]},
    "prompt": {"label": "yes"},
}


def equal(kind):
    """The kind's records, all with the same gold; of tags none that begins an entity."""
    if kind == "read":
        return [record for record in EVERY[kind] if record["answers"]]
    if kind == "tag":
        return [record | {"tags": ["O"] * len(record["tags"])} for record in EVERY[kind]]
    if kind == "plain tags":
        return [record | {"tags": ["THE"] * len(record["tags"])} for record in EVERY[kind]]
    return [record | SAME.get(kind, {}) for record in EVERY[kind]]


def ready(kind, folder, val, *words):
    """A run of the kind that chooses by these val records, made ready."""
    name = TASK_OF.get(kind, kind)
    for split, records in (("train", EVERY[kind]), ("val", val)):
        table(folder / "data", split, records)
    given = [f"--objective.{k}={json.dumps(v)}" for k, v in OPTIONS.get(kind, {}).items()]
    given = [word.replace('="', "=").removesuffix('"') for word in given]
    base = checkpoint("clm" if name == "write" else "mlm")
    argv = (f"--objective.name={name}", *QUICK, *given, *words)
    return prepare(config(base, folder / "data", folder / "run", *argv))


@pytest.mark.parametrize("val", ["many", "equal"])
@pytest.mark.parametrize("kind", EVERY)
def test_every_figure_is_offered_where_it_can_be_counted_and_refused_elsewhere(kind, val, tmp_path):
    records = EVERY[kind] if val == "many" else equal(kind)
    by_loss = ready(kind, tmp_path, records, "--eval.metric=loss")
    declared = {metric.name for metric in by_loss.task.metrics(by_loss.task.options)}
    gone = GONE.get((kind, val), set())
    assert gone <= declared
    assert set(by_loss.task.offered(by_loss.val.table)) == declared - gone
    if val == "equal":  # a figure that is offered is taken
        for name in declared - gone - {"loss"}:
            ready(kind, tmp_path, records, f"--eval.metric={name}")
    for name in gone:
        with pytest.raises(UserError, match=f"eval.metric={name} cannot be counted on") as refused:
            ready(kind, tmp_path, records, f"--eval.metric={name}")
        (choice,) = re.findall(r"choose by one of (.*)$", str(refused.value))
        assert set(choice.split(", ")) == declared - gone
    assert not (tmp_path / "run").exists()


def test_the_kinds_are_those_of_all_tasks():
    assert {kind for kind, _ in GONE} <= set(EVERY) and set(RECORDS) <= set(EVERY)


@pytest.mark.parametrize("several", [False, True])
def test_a_figure_must_be_counted_on_what_training_looks_at(several, tmp_path):
    """Two classes in val, and one in the records that eval.batches takes of it."""
    rows = [{"text": f"some words {i}", "label": "ab"[i % 12 == 0]} for i in range(24)]
    words = ["--eval.batches=1", "--eval.batch=1"]
    if several:
        for split in ("train", "val"):
            table(tmp_path / "rows", split, rows)
            table(tmp_path / "tags", split, RECORDS["tag"])
        parts = {
            name: {"objective": {"name": task}, "data": {"path": str(tmp_path / place)}}
            for name, task, place in (("kind", "classify", "rows"), ("tags", "tag", "tags"))
        }
        words += ["--objective.name=multi", f"--objective.tasks={json.dumps(parts)}"]
        name = "kind/roc_auc"
    else:
        for split in ("train", "val"):
            table(tmp_path / "data", split, rows)
        words += ["--objective.name=classify"]
        name = "roc_auc"
    data = "null" if several else tmp_path / "data"
    by_loss = config(
        checkpoint("mlm"), data, tmp_path / "run", *QUICK, *words, "--eval.metric=loss"
    )
    found = prepare(by_loss)
    val = found.val.parts["kind"] if several else found.val
    assert len(watched(found.config, val).table) == 1 < len(val.table)
    words.append(f"--eval.metric={name}")
    told = rf"{name} cannot be counted on the 1 records that eval.batches takes of .*val.jsonl"
    with pytest.raises(UserError, match=f"{told}.*(--eval.batches) (null): at all") as refused:
        finetune(checkpoint("mlm"), data, tmp_path / "run", *QUICK, *words)
    assert not (tmp_path / "run").exists()
    remedy = "=".join(re.search(r"(--eval.batches) (null)", str(refused.value)).groups())
    summary = finetune(checkpoint("mlm"), data, tmp_path / "run", *QUICK, *words, remedy)
    assert name in summary["val"]


@pytest.mark.parametrize("length", [32, 64])
def test_positives_that_are_cut_to_the_same_tokens_are_told(length):
    """They begin alike for some forty tokens; two equal texts are one document and no such case."""
    task, _ = build("embed", "encoder", length=length)
    begin = "the parser reads a file and returns the list of all names in it "
    ends = ["list", "file", "names", "names"]
    records = [{"query": f"the {i}", "positive": begin + end} for i, end in enumerate(ends)]
    records += [{"query": "a", "positive": "the file"}] * 2
    rows = Table("t", records, list(range(6)))
    data = config(checkpoint("mlm"), "x", "y", "--objective.name=embed").data
    (item, *_) = task.objective.items(records[0], 0, with_gold=True)
    notes = make_split("val", rows, task.objective, data).messages
    found = [note for note in notes if "positives are read like another" in note]
    assert bool(item.cut) == bool(found) == (length == 32)
    assert not found or found[0].startswith("val: 4 of 6 positives")


@pytest.mark.parametrize("same", [False, True])
def test_a_val_that_is_trained_on_is_told(same, tmp_path):
    rows = [r | {"text": f"{r['text']} {i}"} for i, r in enumerate(RECORDS["classify"] * 4)]
    file = table(tmp_path, "mine", rows)
    words = [f"--data.train={file}", *[f"--data.val={file}"] * same, *QUICK]
    found = prepare(config(checkpoint("mlm"), "null", tmp_path / "run", *words))
    (first, *_) = describe(found.train, found.val, torch.nn.Linear(1, 1))
    ending = "is the same file, so its records are trained on" if same else "is a part of it"
    assert first == f"train is read from {file}, val {ending}"


def test_the_records_of_an_evaluation_are_named_once(tmp_path):
    """(The head of the table said "split" twice.)"""
    for split in ("train", "val", "test"):
        table(tmp_path / "data", split, RECORDS["classify"])
    finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "run", *QUICK)
    assert "test split, 12 records" in command("evaluate", str(tmp_path / "run"))
