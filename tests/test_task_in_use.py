"""What users do to tasks from the shipped configs: dialogues, odd labels, other data."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from nanolm.config.load import load_config
from nanolm.data.tables import splits as table_splits
from nanolm.errors import UserError
from nanolm.finetune.prepare import describe, prepare
from nanolm.finetune.splits import open_table, training_tables
from nanolm.finetune.tasks import metrics
from nanolm.finetune.tasks.classify import Classify
from nanolm.finetune.tasks.regress import rounded
from nanolm.pretrain import run_train
from tests.finetuned import checkpoint, command, config, finetune, questions, table
from tests.prepared import prepared_corpus
from tests.test_objectives_tasks import RECORDS, build

QUICK = ("--train.steps=1", "--data.row_length=48", "--train.global_batch=6", "--eval.batch=4")
QUICK += ("--schedule.warmup=0",)
TURNS = [{"role": "user", "content": "say set"}, {"role": "assistant", "content": "ok"}]


def distinct(n):
    """Records of which no two have the same text."""
    return [r | {"text": f"{r['text']} {i}"} for i, r in enumerate(questions(n))]


@pytest.fixture(scope="module")
def dollars(tmp_path_factory):
    """(data, run) of a classifier whose labels hold what matplotlib reads as mathematics."""
    folder = tmp_path_factory.mktemp("dollars")
    named = {"list": "cost $%$", "file": "$x_$ up", "error": "plain"}
    for split, n in (("train", 24), ("val", 12), ("test", 9)):
        rows = [r | {"label": named[r["label"]]} for r in questions(n)]
        table(folder / "data", split, rows)
    shipped = ("--config=configs/finetune/classify.yaml", *QUICK)
    finetune(checkpoint("mlm"), folder / "data", folder / "run", *shipped)
    return folder / "data", folder / "run"


def test_labels_with_dollars_are_drawn(dollars):
    _, run = dollars
    command("evaluate", str(run))
    names = {path.name for path in (run / "evaluation").iterdir()}
    assert {"test.json", "test.txt", "test_predictions.jsonl", "test_confusion.png"} <= names


def test_other_data_never_take_the_place_of_the_runs_own_figures(dollars, tmp_path):
    data, run = dollars
    command("evaluate", str(run))
    own = (run / "evaluation" / "test.json").read_text()
    said = json.loads(own)
    assert said["data"] == str(data / "test.jsonl") and len(said["data_hash"]) == 64
    other = table(tmp_path, "test", [json.loads(line) for line in (data / "val.jsonl").open()])
    before = set((run / "evaluation").iterdir())
    printed = command("evaluate", str(run), f"--data={other}")
    assert f"read from {other}" in printed.splitlines()
    assert (run / "evaluation" / "test.json").read_text() == own
    (new,) = [p for p in set((run / "evaluation").iterdir()) - before if p.suffix == ".json"]
    assert json.loads(new.read_text())["rows"] == 12 and new.stem.startswith("test-")


def test_columns_of_other_data_are_named_in_the_command_that_reads_them(dollars, tmp_path):
    data, run = dollars
    rows = [json.loads(line) for line in (data / "val.jsonl").open()]
    other = table(tmp_path, "other", [{"body": r["text"], "kind": r["label"]} for r in rows])
    remedy = r"say which one it is with (--columns) '\{(\w+): NAME\}'$"
    for words in (("evaluate", str(run), f"--data={other}"), ("predict", str(run), str(other))):
        columns = {}
        for field, column in (("text", "body"), ("label", "kind"))[: 2 - (words[0] == "predict")]:
            option = [f"--columns={json.dumps(columns)}"] * bool(columns)
            with pytest.raises(UserError, match=f"no column {field}.*{remedy}"):
                command(*words, *option)
            columns[field] = column
        command(*words, f"--columns={json.dumps(columns)}")
        with pytest.raises(UserError, match=r"says that text stands in column x.*--columns"):
            command(*words, "--columns={text: x}")
    with pytest.raises(UserError, match=r"text is empty; mend it$"):
        command("predict", str(run), str(table(tmp_path, "empty", [{"text": " "}])))
    with pytest.raises(UserError, match=r"no column text; it has x: call it text$"):
        command("explain", str(run), '{"x": "a"}')
    with pytest.raises(UserError, match="--columns is about other data"):
        command("evaluate", str(run), "--columns={text: body}")
    with pytest.raises(UserError, match=r"cannot write --out .*/none/x: No such file"):
        command("predict", str(run), str(data / "val.jsonl"), f"--out={tmp_path / 'none' / 'x'}")


def test_what_is_read_is_said(dollars, tmp_path):
    data, _ = dollars
    shipped = ("--config=configs/finetune/classify.yaml", *QUICK)
    val = table(tmp_path, "mine", distinct(60))
    for words, said in (
        ((), f"train is read from {data / 'train.jsonl'}, val from {data / 'val.jsonl'}"),
        ((f"--data.train={val}", "--data.path=null"), f"train is read from {val}, val is a part"),
    ):
        ready = prepare(config(checkpoint("mlm"), data, tmp_path / "run", *shipped, *words))
        learner = torch.nn.Linear(1, 1)
        assert describe(ready.train, ready.val, learner)[0].startswith(said)


@pytest.mark.parametrize(("batches", "rows"), [(1, 4), (2, 8), (9, 9)])
def test_batches_limit_the_evaluation_of_a_task(dollars, batches, rows, tmp_path):
    _, run = dollars
    out, folder = tmp_path / "out.json", run / "evaluation"
    command("evaluate", str(run))
    own = (folder / "test.json").read_bytes()
    command("evaluate", str(run), f"--batches={batches}", f"--json={out}")
    assert json.loads(out.read_text())["rows"] == rows
    assert (folder / "test.json").read_bytes() == own  # a part never takes the whole's place
    assert json.loads((folder / f"test-{rows}-records.json").read_text())["rows"] == rows


def test_a_single_file_is_not_tested_on_the_source_of_the_shipped_config(tmp_path):
    file = table(tmp_path, "mine", distinct(60))
    found = config(
        checkpoint("mlm"),
        "stdlib:package",
        tmp_path / "run",
        "--config=configs/finetune/classify.yaml",
        f"--data.train={file}",
        "--data.path=stdlib:package",
    )
    train, val, _ = training_tables(found, Classify)
    assert train.path == val.path == str(file)
    assert open_table(found.data, "test") is None


def test_a_dataset_of_the_hub_without_val_is_carved(monkeypatch, tmp_path):
    class Hub:
        @staticmethod
        def get_dataset_split_names(name, subset):
            return ["train"]

        @staticmethod
        def load_dataset(name, subset, split):
            return distinct(60)

    monkeypatch.setattr(table_splits, "_hub", lambda: Hub)
    shipped = ("--config=configs/finetune/classify.yaml", *QUICK)
    found = prepare(config(checkpoint("mlm"), "hf:some/name", tmp_path / "run", *shipped))
    assert len(found.train.table) + len(found.val.table) == 60 and len(found.val.table) > 0


@pytest.mark.parametrize("more", [[], [{"role": "user", "content": "thanks and goodbye"}]])
def test_dialogues_are_recognised(more, tmp_path):
    for split in ("train", "val", "test"):
        table(tmp_path / "data", split, [{"messages": TURNS + more}] * 6)
    words = ("--config=configs/finetune/write.yaml",)
    run = tmp_path / "run"
    limit = "--objective.max_new_tokens=3"
    finetune(checkpoint("clm"), tmp_path / "data", run, *words, *QUICK, limit)
    command("evaluate", str(run), f"--json={tmp_path / 'out.json'}")
    assert "bleu" in json.loads((tmp_path / "out.json").read_text())


def test_several_tasks_may_hold_one_that_writes(tmp_path):
    for split in ("train", "val", "test"):
        table(tmp_path / "kind", split, questions(12))
        table(tmp_path / "text", split, RECORDS["write"])
    parts = {
        "kind": {"objective": {"name": "classify"}, "data": {"path": str(tmp_path / "kind")}},
        "text": {
            "objective": {"name": "write", "max_new_tokens": 3},
            "data": {"path": str(tmp_path / "text")},
        },
    }
    run = tmp_path / "run"
    shipped = ("--config=configs/finetune/multi.yaml", "--data.path=null", *QUICK)
    tasks = f"--objective.tasks={json.dumps(parts)}"
    with pytest.raises(UserError, match="package, tokens has a share") as refused:
        finetune(checkpoint("clm"), tmp_path, run, *shipped, tasks)
    (remedy,) = re.findall(r"--objective.tasks '(.*)'", str(refused.value))
    parts |= dict.fromkeys(re.findall(r"(\w+): null", remedy))
    tasks = f"--objective.tasks={json.dumps(parts)}"
    summary = finetune(checkpoint("clm"), tmp_path, run, *shipped, tasks)
    assert summary["metric"] == "loss" and not summary["higher_is_better"]
    assert {"kind/accuracy", "text/perplexity"} <= set(summary["val"])
    printed = command("evaluate", str(run))
    assert "kind: test split" in printed and "text: test split" in printed
    file = str(tmp_path / "text" / "test.jsonl")
    assert len(command("predict", str(run), file, "--task=text").splitlines()) == len(
        RECORDS["write"]
    )


def test_long_sentences_are_evaluated_whole_in_few_batches(tmp_path):
    long = {"tokens": ["the", "parser"] * 60, "tags": ["B-X", "O"] * 60}
    for split in ("train", "val"):
        table(tmp_path / "data", split, [long] * 6)
    words = ("--config=configs/finetune/tag.yaml", *QUICK, "--eval.batches=1")
    assert "f1" in finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "run", *words)["val"]


@pytest.mark.parametrize("scale", [1e-200, 1e-12, 1e-7, 1e-3, 1.0, 1e6, 2e99])
def test_scores_of_any_scale_are_standardised(scale, tmp_path):
    scores = [scale * (1 + i % 4) for i in range(12)]
    for split in ("train", "val"):
        table(tmp_path / "data", split, [{"text": f"a {s}", "score": s} for s in scores])
    words = ("--config=configs/finetune/regress.yaml", *QUICK)
    found = prepare(config(checkpoint("mlm"), tmp_path / "data", tmp_path / "run", *words))
    targets = np.array([item.target[0] for item in found.train.items])
    assert targets.std() == pytest.approx(1, abs=1e-3) and abs(targets.mean()) < 1e-3
    assert rounded(0.123456789, 0.2) == 0.123457  # as ever where the scale is not small


@pytest.mark.parametrize("offset", [-2e3, 2e3, 4.5e6, 1e9])
def test_scores_far_from_zero_keep_what_sets_them_apart(offset):
    """Predictions stand in the scores' own units, whatever those are counted from."""
    learner, _ = build("regress", "encoder")
    task, at = learner.objective, [[0.0], [0.25], [-1.5], [2.0]]
    task.layout = lambda batch: None
    task.options = dataclasses.replace(task.options, mean=[offset], std=[0.5])
    answers = task.answers(None, {"regress": lambda *_: torch.tensor(at)}, {})
    gold = np.array(at) * 0.5 + offset
    assert answers == gold.tolist()
    figures = metrics.regression(gold, np.array(answers)).figures
    assert figures["pearson"] == pytest.approx(1) and figures["spearman"] == pytest.approx(1)
    noise = np.random.default_rng(0).normal(size=(4, 1)) * 3e-8
    assert metrics.regression(gold, offset + 0.5 * noise).figures["pearson"] == 0


ODD = {"1e300": 1e300, "-1e101": -1e101, "long": 10**400, "inf": "1e999", "nan": float("nan")}
ODD |= {"true": True, "list": [1.0]}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("task", ["regress", "similar"])
def test_what_no_error_can_be_squared_of_is_no_score(task, value, tmp_path):
    rows = [dict(record) for record in RECORDS[task]]
    rows[3]["score"] = value
    for split in ("train", "val"):
        table(tmp_path / "data", split, rows)
    words = (f"--objective.name={task}", *QUICK)
    with pytest.raises(UserError, match=r"row 4: score is .*, not a number \(of at most 1e\+100\)"):
        prepare(config(checkpoint("mlm"), tmp_path / "data", tmp_path / "run", *words))


def test_faults_are_told_before_training(tmp_path):
    for split in ("train", "val"):
        table(tmp_path / "data", split, questions(12))
    shipped = ("--config=configs/finetune/classify.yaml", *QUICK)
    run = tmp_path / "adapter"
    finetune(checkpoint("mlm"), tmp_path / "data", run, *shipped, "--peft.name=lora")
    merge_first = (
        r"holds an adapter, not a whole model: merge it .*`nanolm (merge .* --out FOLDER)`"
    )
    with pytest.raises(UserError, match=merge_first) as refused:
        finetune(run, tmp_path / "data", tmp_path / "next", *shipped)
    pretraining = load_config([f"--data.path={prepared_corpus()}", f"--init_from={run}"])
    with pytest.raises(UserError, match=merge_first):
        run_train(pretraining)
    wrong = {"f2": "is no figure of this task", "roc_auc": "cannot be counted on"}
    for metric, sentence in wrong.items():
        with pytest.raises(UserError, match=f"eval.metric={metric} {sentence}"):
            words = (*shipped, f"--eval.metric={metric}")
            finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "next", *words)
    with pytest.raises(UserError, match=r"schedule.warmup=9 is longer than train.steps=1"):
        words = (*shipped, "--schedule.warmup=9")
        finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "next", *words)
    with pytest.raises(UserError, match="synonyms: there is no file"):
        noise = "--augment.synonyms=/nowhere"
        finetune(checkpoint("mlm"), tmp_path / "data", tmp_path / "next", *shipped, noise)
    assert not (tmp_path / "next").exists()
    merged = tmp_path / "merged"
    words = re.search(r"`nanolm (.*)`", str(refused.value)).group(1)
    command(*words.replace("FOLDER", str(merged)).split())
    finetune(merged, tmp_path / "data", tmp_path / "next", *shipped)


@pytest.mark.parametrize("length", [32, 48, 128])
def test_answers_that_the_model_has_no_room_for_are_refused_before_training(length, tmp_path):
    for split in ("train", "val"):
        table(tmp_path / "data", split, RECORDS["write"])
    words = ("--config=configs/finetune/write.yaml", f"--data.row_length={length}")

    def ready(n_tokens):
        limit = f"--objective.max_new_tokens={n_tokens}"
        return prepare(
            config(checkpoint("clm"), tmp_path / "data", tmp_path / "run", *words, limit)
        )

    most = 128 - length // 2  # model.max_length beside the longest prompt
    with pytest.raises(UserError, match=f"max_new_tokens={most + 1} .* at most {most}$"):
        ready(most + 1)
    longest = ready(most).task.prompt_tokens("word " * 500)
    assert len(longest) + most == 128


def test_explanations_keep_the_dots_of_their_names(dollars, tmp_path):
    for name in ("ex.1", "ex.2", "ex.html"):
        command(
            "explain",
            str(dollars[1]),
            "open a file",
            "--steps=4",
            "--tolerance=0.9",
            f"--out={tmp_path / name}",
        )
    assert {p.name for p in tmp_path.iterdir()} == {"ex.1.html", "ex.2.html", "ex.html"}
