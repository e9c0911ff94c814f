"""Fine-tuning of an encoder-decoder: it writes from a source, and its encoder alone reads."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from nanolm import build
from nanolm.errors import UserError
from nanolm.finetune.generation import search_of
from nanolm.finetune.prepare import prepare, start_weights
from nanolm.finetune.tasks.write import WriteOptions
from nanolm.finetune.tasks.write_from_source import WriteFromSource
from nanolm.inference.beam_search import BeamSearch
from nanolm.model.trunk import Inputs
from nanolm.objectives.base import IGNORED
from nanolm.saved import open_saved
from tests.elastic import command_on_ranks
from tests.finetuned import (
    QUIET,
    assert_two_ranks_equal_one,
    command,
    config,
    finetune,
    questions,
    table,
)
from tests.prepared import trained_run
from tests.test_objectives_tasks import EXTRA, RECORDS

OPPOSITES = {"open": "close", "read": "write", "first": "last", "left": "right"}
SLOWLY = ("--data.row_length=24", "--train.micro_batch=8", "--optim.lr=3e-3")


def pairs(n):
    """Prompts that name words, and their opposites in turn as response."""
    words = list(OPPOSITES)
    found = []
    for i in range(n):
        chosen = [words[i % 4], words[i // 4 % 4]][: 1 + i % 2]
        answer = " ".join(OPPOSITES[word] for word in chosen)
        found.append({"prompt": "opposite of " + " ".join(chosen), "response": answer})
    return found


def turns(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def tables(folder, records):
    """The file to train on; the same records are there to choose by."""
    table(folder, "val", records)
    return table(folder, "train", records)


@pytest.fixture(scope="module")
def base():
    return trained_run("span")


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """A run that has learned opposites, and its records."""
    folder = tmp_path_factory.mktemp("write")
    path = tables(folder, pairs(64))
    words = ("--objective.name=write", "--train.steps=120", "--eval.every=40", *SLOWLY)
    words = (*words, "--train.micro_batch=32")
    summary = finetune(base, path.parent, folder / "run", *words)
    return folder / "run", path, summary


@pytest.mark.slow
def test_it_learns_to_write_what_was_asked(written):
    run, path, summary = written
    assert summary["best_val"] < 1.5  # the perplexity of answers
    out = command("predict", str(run), str(path), "--batch=5")
    answers = [json.loads(line)["text"].strip() for line in out.splitlines()]
    golds = [record["response"] for record in pairs(64)]
    assert np.mean([a == g for a, g in zip(answers, golds, strict=True)]) > 0.9


def test_predictions_do_not_depend_on_what_else_is_in_the_batch(written, tmp_path):
    run, path = written[0], table(tmp_path, "some", pairs(64)[:22])
    one, five = (command("predict", str(run), str(path), f"--batch={n}") for n in (1, 5))
    assert one == five


@pytest.mark.slow
def test_it_learns_to_write_the_name_of_a_class(base, tmp_path):
    """Text-to-text classification: the label's column is the answer."""
    path = tables(tmp_path, questions(24))
    words = ("--objective.template=what is it about? {text}", "--data.columns={response: label}")
    words += ("--objective.name=write", "--train.steps=160", *SLOWLY, "--objective.beams=2")
    finetune(base, path.parent, tmp_path / "run", *words)
    written = command("predict", str(tmp_path / "run"), str(path), "--columns={response: label}")
    answers = [json.loads(line)["text"].strip() for line in written.splitlines()]
    assert answers == [record["label"] for record in questions(24)]


def task_of(base, tmp_path, *words):
    path = tables(tmp_path, pairs(8))
    return prepare(
        config(base, path.parent, tmp_path / "run", "--objective.name=write", *words)
    ).task


def test_an_item_is_a_source_with_its_end_and_an_answer_with_its_end(base, tmp_path):
    task = task_of(base, tmp_path, "--objective.template=Q: {prompt}")
    assert type(task) is WriteFromSource
    eos, pad, encode = task.tokenizer.eos, task.tokenizer.pad, task.tokenizer.encode
    records = [{"prompt": "a b", "response": "close"}, {"prompt": "c", "response": "write last"}]
    items = [item for i, r in enumerate(records) for item in task.items(r, i, with_gold=True)]
    assert items[0].sequences[0].tokens.tolist() == [*encode("Q: a b"), eos]
    assert items[1].target.tolist() == [*encode("write last"), eos]
    batch = task.collate(items)
    assert batch["lengths"].tolist() == [len(item.sequences[0].tokens) for item in items]
    for row, item in enumerate(items):
        n = len(item.target)
        assert batch["labels"][row, :n].tolist() == item.target.tolist()
        assert (batch["labels"][row, n:] == IGNORED).all()
        assert batch["tokens"][row, :n].tolist() == [pad, *item.target[:-1]]
    assert task.counts(batch) == {"write": sum(len(item.target) for item in items)}
    assert task.targets_per_token(items) == sum(len(i.target) for i in items) / sum(
        batch["lengths"]
    )
    assert set(task.collate(task.items(records[0], 0, with_gold=False))) == {"source", "lengths"}


def test_what_is_too_long_loses_the_end_and_a_dialogue_its_beginning(base, tmp_path):
    task = task_of(base, tmp_path, "--data.row_length=8", "--objective.max_new_tokens=3")
    long = " ".join("abcdefghijklmnop")
    ids = task.encode("translate " + long + "\n").tolist()
    (item,) = task.items({"prompt": "translate " + long, "response": long}, 0, with_gold=True)
    assert item.sequences[0].tokens.tolist() == [*ids[:7], task.tokenizer.eos]
    assert item.target.tolist() == [*task.encode(long)[:7], task.tokenizer.eos]
    assert item.cut == len(ids) - 7 + len(task.encode(long)) - 7
    record = turns("one", "two", "three", "four", "five")
    chat = copy.copy(task)
    chat.options = dataclasses.replace(task.options, chat=True)
    first, second = chat.items(record, 0, with_gold=True)
    assert second.target.tolist() == [*chat.encode("four\n"), chat.tokenizer.eos][:8]
    said = "user: one\nassistant: two\nuser: three\nassistant: "
    assert second.sequences[0].tokens.tolist() == [*chat.encode(said)[-7:], chat.tokenizer.eos]
    assert first.sequences[0].tokens.tolist() == [
        *chat.encode("user: one\nassistant: ")[-7:],
        chat.tokenizer.eos,
    ]


def test_a_token_of_the_answer_does_not_see_those_behind_it(base, tmp_path):
    task = task_of(base, tmp_path)
    learner = open_saved(base, phase="train").learner
    items = [
        task.items({"prompt": "open", "response": text}, 0, with_gold=True)[0]
        for text in ("first left right", "first left open")
    ]
    one, other = (
        {name: torch.from_numpy(x) for name, x in task.collate([item]).items()} for item in items
    )
    with torch.no_grad():
        a, b = learner.trunk(task.inputs(one)), learner.trunk(task.inputs(other))
    same = int((one["tokens"][0, : len(b[0])] == other["tokens"][0, : len(a[0])]).cumprod(0).sum())
    assert 1 < same < a.shape[1]
    torch.testing.assert_close(a[:, :same], b[:, :same])
    assert not torch.allclose(a[:, same], b[:, same])


def test_padding_of_a_source_is_not_read_in_training(base, tmp_path):
    task = task_of(base, tmp_path)
    learner = open_saved(base, phase="train").learner
    items = [item for i, r in enumerate(pairs(4)) for item in task.items(r, i, with_gold=True)]

    def loss(*items):
        batch = {name: torch.from_numpy(x) for name, x in task.collate(list(items)).items()}
        with torch.no_grad():
            hidden = learner.trunk(task.inputs(batch))
            return float(task.loss(hidden, learner.heads, batch)["write"].sum)

    assert len({len(item.sequences[0].tokens) for item in items}) > 1
    assert loss(*items) == pytest.approx(sum(map(loss, items)), rel=1e-5)


def test_beams_of_a_task_are_searched_as_it_says():
    options = WriteOptions(beams=3, length_penalty=0.5, max_new_tokens=7)
    assert search_of(options).keywords == {"search": BeamSearch(3, 7, 0.5)}


def test_two_ranks_write_as_one(base, tmp_path):
    path = tables(tmp_path, pairs(24))
    words = ("--objective.name=write", "--train.steps=6", "--optim.name=sgd", "--optim.lr=0.1")
    words += ("--data.row_length=24", "--train.micro_batch=4", "--eval.every=3")
    finetune(base, path.parent, tmp_path / "one", *words)
    argv = [f"--init_from={base}", f"--data.path={path.parent}", f"--run.dir={tmp_path / 'two'}"]
    command_on_ranks(tmp_path / "logs", 2, "finetune", *argv, *QUIET, *words)
    assert_two_ranks_equal_one(tmp_path, 6, "nll")


def test_lora_on_both_stacks(base, tmp_path):
    path = tables(tmp_path, pairs(32))
    summary = finetune(
        base, path.parent, tmp_path / "run", "--objective.name=write", "--peft.name=lora",
        "--train.steps=4", *SLOWLY,
    )  # fmt: skip
    assert 0 < summary["trained_params"] < 100_000
    out = command("predict", str(tmp_path / "run"), str(path))
    assert len(out.splitlines()) == 32


@pytest.mark.parametrize("name", ["classify", "regress", "tag", "read", "choose", "embed"])
def test_tasks_that_read_take_the_encoder_alone(base, tmp_path, name):
    path = tables(tmp_path, RECORDS[name])
    options = [f"--objective.{key}={value}" for key, value in EXTRA.get(name, {}).items()]
    summary = finetune(
        base, path.parent, tmp_path / "run", f"--objective.name={name}", "--train.steps=2",
        "--data.row_length=48", "--train.global_batch=5", *options,
    )  # fmt: skip
    assert summary["metric"] in summary["val"]
    saved = open_saved(tmp_path / "run")
    assert saved.config.model.trunk == "encoder" and "lm" not in saved.learner.heads
    out = command("predict", str(tmp_path / "run"), str(path))
    assert len(out.splitlines()) == len(RECORDS[name])


def test_the_encoder_alone_computes_what_it_does_before_the_decoder(base, tmp_path):
    path = tables(tmp_path, questions(12))
    ready = prepare(
        config(
            base, path.parent, tmp_path / "run", "--objective.name=classify", "--data.row_length=32"
        )
    )
    learner = build.build_learner(ready.config, ready.task, phase="prefill").eval()
    told = start_weights(ready.config, ready.base, learner, None)
    assert "(its encoder)" in told[0] and "fresh heads: heads.classify" in told[0]
    whole = open_saved(base).learner
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        expected = whole.trunk.encode(Inputs(source_tokens_BS=ids))
        found = learner.trunk(Inputs(tokens_BT=ids))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--objective.name=prompt", "--objective.words={list: list, file: file, error: error}"),
            "prompt trains encoder or decoder trunks",
        ),
        (("--objective.name=write", "--objective.max_new_tokens=5000"), "max_new_tokens=5000"),
        (("--objective.name=write", "--objective.beams=0"), "objective.beams=0"),
    ],
)
def test_what_cannot_be_is_one_sentence(base, tmp_path, words, sentence):
    records = pairs(12) if "write" in words[0] else questions(12)
    with pytest.raises(UserError, match=sentence):
        finetune(
            base, tables(tmp_path, records).parent, tmp_path / "run", *words, "--train.steps=1"
        )
