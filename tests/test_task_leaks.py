"""No text on both sides of a carved split, and no positive among its own negatives."""

import numpy as np
import pytest
import torch

from nanolm.data.tables.splits import carve, fold_out
from nanolm.finetune.prepare import prepare
from nanolm.finetune.tasks.embed import also_right
from nanolm.finetune.tasks.items import Item
from tests.finetuned import checkpoint, config, table
from tests.test_objectives_tasks import EXTRA, RECORDS, build, tensors

READ = {  # what a task reads of a record
    "classify": ("text",),
    "prompt": ("text",),
    "regress": ("text", "text_pair"),
    "similar": ("text", "text_pair"),
    "tag": ("tokens",),
    "read": ("context",),
    "choose": ("question", "choices"),
    "choose_dual": ("question", "choices"),
    "choose_lm": ("question", "choices"),
    "embed": ("query",),
    "write": ("prompt",),
}


def split(task, folder, *words):
    """(train records, val records) as a run carves them out of records that stand there four times
    with ids of their own."""
    records = [r | {"id": f"{copy}-{i}"} for copy in range(4) for i, r in enumerate(RECORDS[task])]
    table(folder / "data", "train", records)
    given = [f"--objective.{k}={v}" for k, v in EXTRA.get(task, {}).items()]
    base = checkpoint("clm" if task == "write" else "mlm")
    argv = (f"--objective.name={task}", *given, "--data.row_length=48", *words)
    found = prepare(config(base, folder / "data", folder / "run", *argv))
    return found.train.table.records, found.val.table.records


@pytest.mark.parametrize("task", READ)
@pytest.mark.parametrize(
    "words", [("--data.val_fraction=0.4",), ("--data.folds=2", "--data.fold=1")]
)
def test_equal_inputs_stay_on_one_side_whatever_their_ids(task, words, tmp_path):
    assert set(READ) == set(RECORDS)
    train, val = (
        {str([record[name] for name in READ[task]]) for record in side}
        for side in split(task, tmp_path, *words)
    )
    assert train and val and not train & val


def test_hashing_whole_records_would_leak():
    from nanolm.data.tables.files import Table

    records = [{"text": str(i % 10), "id": i} for i in range(200)]
    rows = Table("t", records, list(range(200)))
    for function, argument in ((carve, (0.3,)), (fold_out, (2, 0))):
        train, val = function(rows, *argument)
        assert {r["text"] for r in train.records} & {r["text"] for r in val.records}
        train, val = function(rows, *argument, ("text",))
        assert not {r["text"] for r in train.records} & {r["text"] for r in val.records}


@pytest.mark.parametrize("trunk", ["encoder", "decoder"])
def test_a_positive_that_stands_twice_is_no_negative(trunk):
    learner, _ = build("embed", trunk)
    task = learner.objective

    def loss(positives, queries=("the file 0", "the file 1", "the file 2")):
        pairs = zip(queries, positives, strict=True)
        records = [{"query": q, "positive": p} for q, p in pairs]
        items = [item for i, r in enumerate(records) for item in task.items(r, i, with_gold=True)]
        batch, _ = tensors(task, items)
        hidden = learner.trunk(task.inputs(batch))
        vectors = learner.heads["embed"](hidden, task.layout(batch))
        terms = task.loss(hidden, learner.heads, batch)
        return float(terms["embed"].sum), vectors[batch["query"]] @ vectors[batch["document"]].T

    with torch.no_grad():
        found, cosines = loss(["a list", "a list", "all names"])
        scores = (cosines / task.options.temperature).double().numpy()
        expected = 0.0
        for n, negatives in enumerate(([2], [2], [0, 1])):
            others = [scores[n, n], *scores[n, negatives]]
            expected += np.log(np.exp(others).sum()) - scores[n, n]
        assert found == pytest.approx(expected, abs=1e-4)
        found, cosines = loss(["a list", "it", "all names"], ["the file", "a file", "the file"])
        scores = (cosines / task.options.temperature).double().numpy()
        expected = 0.0
        for n, negatives in enumerate(([1], [0, 2], [1])):  # one question, two right answers
            others = [scores[n, n], *scores[n, negatives]]
            expected += np.log(np.exp(others).sum()) - scores[n, n]
        assert found == pytest.approx(expected, abs=1e-4)
        found, cosines = loss(["a list", "it", "all names"])  # nothing is equal: plain InfoNCE
        logits = cosines / task.options.temperature
        plain = torch.nn.functional.cross_entropy(logits, torch.arange(3), reduction="sum")
        assert found == float(plain)


def test_other_positives_of_the_same_query_do_not_count_against_it():
    task = build("embed", "encoder")[0].objective
    eye = np.eye(3)
    vectors = [[eye[0], eye[0]], [eye[0], 0.9 * eye[0] + 0.1 * eye[1]], [eye[2], eye[2]]]
    asked = [("q", "a"), ("q", "b"), ("r", "c")]
    items = [Item(i, [], positive, 0, query) for i, (query, positive) in enumerate(asked)]
    same = task.predictions(None, items, vectors)
    assert [row["rank"] for row in same] == [1, 1, 1]
    for item, query in zip(items, ("q", "s", "r"), strict=True):
        item.extra = query
    other = task.predictions(None, items, vectors)
    assert [row["rank"] for row in other] == [1, 2, 1] and other[1]["loss"] > same[1]["loss"]
    assert also_right(["q", "q", None, "r", "q"], [0, 1, 2, 0, 0]) == [[1], [0], [], [], [1]]
