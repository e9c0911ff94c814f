"""Several tasks in one run: the composition is exact, and every user-facing part works by name."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanolm.build import build_learner
from nanolm.checkpoint.checkpoints import Checkpoints
from nanolm.data.tables.stream import MixedTaskStream
from nanolm.distributed.world import World
from nanolm.errors import UserError
from nanolm.finetune.prepare import open_stream, prepare
from nanolm.finetune.several import learner_of
from nanolm.training.throughput import TIMING
from tests.elastic import command_on_ranks
from tests.finetuned import (
    QUIET,
    assert_two_ranks_equal_one,
    checkpoint,
    command,
    config,
    finetune,
    questions,
    table,
)
from tests.test_finetune import lines
from tests.test_objectives_tasks import RECORDS, tensors
from tests.test_train_command import ROOT

COMMON = ("--objective.name=multi", "--data.row_length=48", "--optim.lr=3e-3")
OPTIONS = {"head_dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for split, n, start in (("train", 60, 0), ("val", 12, 1000), ("test", 15, 2000)):
        table(folder / "kind", split, questions(n, start))
        table(folder / "words", split, RECORDS["tag"])
        table(folder / "near", split, RECORDS["embed"])
    return folder


def tasks(data, **more):
    parts = {
        "kind": {
            "objective": {"name": "classify", **OPTIONS},
            "data": {"path": str(data / "kind")},
            "share": 2,
        },
        "words": {
            "objective": {"name": "tag", **OPTIONS},
            "data": {"path": str(data / "words")},
            "share": 1,
            "weight": 0.5,
        },
    }
    for name, change in more.items():
        parts[name] = parts.get(name, {}) | change
    return f"--objective.tasks={json.dumps(parts)}"


def the_run(data, run, *words):
    return config(checkpoint("mlm"), data, run, *COMMON, tasks(data), "--data.path=null", *words)


def test_losses_and_gradients_are_those_of_the_parts(data, tmp_path):
    """sum_i w_i L_i, with each task's mean over its own targets; also when one has no example."""
    ready = prepare(the_run(data, tmp_path, "--train.steps=3"))
    stream = open_stream(ready.config, ready.task, ready.train)
    learner = build_learner(ready.config, ready.task).eval()
    items = [row.item for row in stream.rows(0, 9)]
    assert [item.part for item in items].count("kind") == 6
    for chosen in (items, [item for item in items if item.part == "kind"]):
        batch, arrays = tensors(ready.task, chosen)
        counts, terms = ready.task.counts(arrays), learner(batch)
        assert sorted(terms) == ["kind/accuracy", "kind/classify", "words/accuracy", "words/tag"]
        assert {name: int(terms[name].count) for name in counts} == counts
        learner.zero_grad()
        sum(w * terms[n].sum / max(counts[n], 1) for n, w in ready.task.weights.items()).backward()
        found = {name: p.grad for name, p in learner.named_parameters()}
        assert all(gradient is not None for gradient in found.values())  # DDP: nothing unused
        found = {name: gradient.clone() for name, gradient in found.items()}
        learner.zero_grad()
        for name, weight in (("kind", 1.0), ("words", 0.5)):
            own = learner_of(learner, name)
            mine = [item for item in chosen if item.part == name]
            if not mine:
                continue
            alone = own(tensors(own.objective, mine)[0])
            (term,) = own.objective.weights
            joint = terms[f"{name}/{term}"]
            assert alone[term].sum.item() == pytest.approx(joint.sum.item(), abs=1e-4)
            assert int(alone[term].count) == int(joint.count)
            (weight * alone[term].sum / alone[term].count).backward()
        for name, parameter in learner.named_parameters():
            expected = parameter.grad if parameter.grad is not None else torch.zeros(())
            torch.testing.assert_close(
                found[name], expected.expand_as(found[name]), rtol=1e-4, atol=1e-5
            )


def test_one_part_may_mark_the_tokens_that_its_texts_share(data, tmp_path):
    for split in ("train", "val", "test"):
        table(tmp_path / "pairs", split, RECORDS["regress"])

    def segments(mark):
        parts = {
            name: {
                "objective": {"name": "regress", "mark_shared": mark and name == "marked"},
                "data": {"path": str(tmp_path / "pairs")},
            }
            for name in ("marked", "plain")
        }
        words = (f"--objective.tasks={json.dumps(parts)}", "--data.path=null", "--train.steps=3")
        base = checkpoint("mlm", segments=2)
        ready = prepare(config(base, data, tmp_path / "run", *COMMON, *words))
        items = [row.item for row in open_stream(ready.config, ready.task, ready.train).rows(0, 8)]
        batch = ready.task.collate(items)
        flat = batch["segments"].ravel()
        return {name: flat[batch[f"{name}/index"]] for name in parts}

    before, after = segments(False), segments(True)
    assert (after["plain"] == before["plain"]).all() and before["plain"].any()
    assert 0 < (after["marked"] < before["marked"]).sum() < before["marked"].sum()


def test_tasks_are_mixed_by_share_and_every_item_comes_once_an_epoch():
    stream = MixedTaskStream(list(range(15)), [5, 10], [1, 3], seed=3, name="x")
    rows = stream.rows(0, 80)
    kinds = np.array([row.item >= 5 for row in rows])
    assert kinds.sum() == 60 and all(kinds[i : i + 4].sum() in (2, 3, 4) for i in range(76))
    first = [row.item for row in rows if row.item < 5]
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5)) and first[:5] != first[5:10]
    again = stream.rows(37, 44)  # seeks, and the same for every way of cutting
    assert [(r.item, r.epoch) for r in again] == [(r.item, r.epoch) for r in rows[37:44]]


def test_train_evaluate_predict_explain(data, tmp_path):
    run = tmp_path / "run"
    words = (
        *COMMON,
        tasks(data),
        "--data.path=null",
        "--train.steps=24",
        "--train.global_batch=12",
    )
    summary = finetune(checkpoint("mlm"), data, run, *words, "--eval.every=12")
    val = summary["val"]
    assert summary["metric"] == "score"
    assert val["score"] == pytest.approx((val["kind/accuracy"] + val["words/f1"]) / 2)
    assert val["kind/accuracy"] > 0.6  # three classes
    report = tmp_path / "report.json"
    command("evaluate", str(run), f"--json={report}")
    figures = json.loads(report.read_text())
    assert figures["kind"]["rows"] == 15 and figures["words"]["rows"] == 12
    assert (run / "evaluation" / "kind_test.json").is_file()
    card = (run / "MODEL.md").read_text()
    assert "- kind: classify" in card and "kind_test" in card
    label = json.loads(command("predict", str(run), "--task=kind", stdin="open a file\n"))
    assert label["label"] in ("error", "file", "list")
    tags = json.loads(command("predict", str(run), "--task=words", stdin="the parser reads\n"))
    assert len(tags["tags"]) == 3
    with pytest.raises(UserError, match="say which one with --task kind or --task words"):
        command("predict", str(run), str(data / "kind" / "test.jsonl"))
    printed = command("explain", str(run), "open a file", "--task=kind", f"--out={tmp_path / 'x'}")
    assert "logit of label" in printed


@pytest.mark.slow  # one task on two ranks: test_finetune_tasks.py and test_t5_tasks.py
def test_two_ranks_equal_one(data, tmp_path):
    """Five rows a step in pieces of two: micro-batches and a rank without one of the tasks."""
    steps = ("--train.steps=6", "--train.global_batch=5", "--train.micro_batch=2")
    steps += ("--optim.name=sgd", "--optim.lr=0.1", "--eval.every=0")
    words = [*COMMON[:2], tasks(data), "--data.path=null", *steps]
    base = checkpoint("mlm")
    finetune(base, data, tmp_path / "one", *words)
    argv = [f"--init_from={base}", f"--run.dir={tmp_path / 'two'}", *QUIET, *words]
    command_on_ranks(tmp_path / "logs", 2, "finetune", *argv)
    assert_two_ranks_equal_one(tmp_path, 6, "kind/classify", "words/tag")


@pytest.mark.slow
def test_a_task_that_compares_the_rows_of_a_step(data, tmp_path):
    """`embed` beside `classify`: 2 ranks = 1, though a rank often has no pair and its stand-in's
    documents may compete with no other rank's."""
    near = {"objective": {"name": "embed"}, "data": {"path": str(data / "near")}, "share": 1}
    parts = json.loads(tasks(data, near=near).split("=", 1)[1])
    del parts["words"]
    base = checkpoint("mlm")
    words = [*COMMON[:2], f"--objective.tasks={json.dumps(parts)}", "--data.path=null"]
    words += ["--train.steps=8", "--train.global_batch=5", "--optim.name=sgd", "--optim.lr=0.1"]
    summary = finetune(base, data, tmp_path / "one", *words, "--eval.every=8")
    expected = (summary["val"]["kind/accuracy"] + summary["val"]["near/mrr"]) / 2
    assert summary["val"]["score"] == pytest.approx(expected)
    argv = [f"--init_from={base}", f"--run.dir={tmp_path / 'two'}", *QUIET, *words]
    command_on_ranks(tmp_path / "logs", 2, "finetune", *argv, "--eval.every=8")
    assert_two_ranks_equal_one(tmp_path, 8, "kind/classify", "near/embed")
    with pytest.raises(UserError, match="compares all rows of a step"):
        finetune(base, data, tmp_path / "cut", *words, "--train.micro_batch=2")


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(data, tmp_path):
    base = checkpoint("mlm")
    words = (*COMMON, tasks(data), "--data.path=null", "--train.steps=8", "--eval.every=3")
    words += ("--train.global_batch=6", "--train.micro_batch=2")
    finetune(base, data, tmp_path / "whole", *words)
    broken = tmp_path / "broken"
    cut = [
        "import os, signal, sys",
        "from nanolm.training import trainer; from nanolm.finetune.run import *",
        "old = trainer.Trainer.step",
        "def step(self, batches):",
        f"    self.state.done == 5 and os.kill(os.getpid(), {int(signal.SIGKILL)})",
        "    return old(self, batches)",
        "trainer.Trainer.step = step; main(sys.argv[1:])",
    ]
    argv = [f"--init_from={base}", f"--run.dir={broken}", *QUIET, *words]
    job = subprocess.run(
        [sys.executable, "-c", "\n".join(cut), *argv], cwd=ROOT, timeout=90, env=os.environ
    )
    assert job.returncode == -signal.SIGKILL
    assert Checkpoints(broken, World()).steps()[-1] == 3
    finetune(base, data, broken, *words, "--resume=auto")
    plain = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run)]
        for run in (tmp_path / "whole", broken)
    ]
    assert plain[0] == plain[1]
    left, right = (
        load_file(run / "checkpoints/step-00000008/model.safetensors")
        for run in (tmp_path / "whole", broken)
    )
    assert all(torch.equal(left[name], right[name]) for name in left | right)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"kind": {"labels": 3}}, "tasks.kind.labels: there is no such key; there are objective"),
        ({"kind": {"share": None}}, "give every task one, or none of them"),
        ({"kind": {"share": 0}}, "tasks.kind.share=0 must be a positive number"),
        ({"a/b": {}}, "tasks.a/b: a task's name is letters"),
        ({"kind": {"objective": {"name": "clm"}}}, "tasks.kind: objective=clm reads prepared"),
        (
            {"kind": {"objective": {"name": "classify", "labell": 1}}},
            "tasks.kind: objective.labell: there is no such key",
        ),
        ({"kind": {"data": {"path": "/nowhere"}}}, "tasks.kind: data.path /nowhere is neither"),
        ({"kind": {"data": {"pack": False}}}, "tasks.kind.data.pack: all tasks lie in one batch"),
        ({"kind": {"objective": {"name": "multi"}}}, "tasks.kind: several tasks cannot"),
    ],
)
def test_bad_input_is_one_sentence(data, tmp_path, more, sentence):
    words = (*COMMON, tasks(data, **more), "--data.path=null", "--train.steps=1")
    with pytest.raises(UserError, match=sentence):
        finetune(checkpoint("mlm"), data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("swap=0.1", "objective=multi has targets at single tokens, which augment.dropout"),
        ("opposites=opposites.tsv", "objective=multi has targets at single tokens"),
        ("synonyms=/nowhere", "objective=multi has targets at single tokens"),
    ],
)
def test_one_part_whose_tokens_must_stay_keeps_all_in_place(data, tmp_path, more, sentence):
    words = (*COMMON, tasks(data), "--data.path=null", "--train.steps=1", f"--augment.{more}")
    with pytest.raises(UserError, match=sentence):
        finetune(checkpoint("mlm"), data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
