"""Fine-tuning of an encoder-decoder under rules, divided weights and several tasks: it works, or it
is refused in one sentence before the first step."""

import json

import numpy as np
import pytest
import torch

from nanolm.errors import UserError
from nanolm.finetune.prepare import prepare
from nanolm.objectives.base import IGNORED
from nanolm.rules.adversarial import Perturbation
from nanolm.rules.rdrop import symmetric_divergence
from nanolm.saved import open_saved
from nanolm.training.batch import MicroBatch
from tests.finetuned import checkpoint, config, finetune, questions
from tests.prepared import train, trained_run
from tests.test_objectives_tasks import RECORDS
from tests.test_sharding_finetune import tune
from tests.test_t5_tasks import pairs, tables
from tests.tiny_run import in_ranks

STEPS = ("--train.steps=3", "--train.global_batch=4", "--data.row_length=24")
WRITE = ("--objective.name=write", *STEPS)
TWO_STREAM = ("--model.trunk=two_stream", "--model.positions.name=relative", "--train.steps=2")
TWO_STREAM += ("--objective.name=permutation", "--schedule.name=constant")


@pytest.fixture(scope="module")
def base():
    return trained_run("span")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["span", "clm"])
def test_rdrop_compares_the_answers_of_two_passes(kind, tmp_path):
    path = tables(tmp_path, pairs(12))
    words = ("--train.rule.name=rdrop", "--train.rule.alpha=2", "--model.dropout=0.2")
    base = trained_run(kind)
    finetune(base, path.parent, tmp_path / "run", *WRITE, *words, "--run.log_every=1")
    found = [line["write_rdrop"] for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert len(found) == 3 and all(value > 0 for value in found)


@pytest.mark.parametrize("kind", ["span", "clm"])
def test_logits_of_answers_are_those_of_the_loss(kind, tmp_path):
    base = trained_run(kind)
    task = prepare(config(base, tables(tmp_path, pairs(8)).parent, tmp_path / "run", *WRITE)).task
    items = [item for i, r in enumerate(pairs(4)) for item in task.items(r, i, with_gold=True)]
    batch = {name: torch.from_numpy(x) for name, x in task.collate(items).items()}
    learner = open_saved(base, phase="train").learner
    with torch.no_grad():
        hidden = learner.trunk(task.inputs(batch))
        logits = task.logits(hidden, learner.heads, batch)["write"]
        term = task.loss(hidden, learner.heads, batch)["write"]
    labels = batch["labels"][batch["labels"] != IGNORED]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(term.sum, expected, atol=1e-4, rtol=1e-5)
    assert len(logits) == int(term.count) and symmetric_divergence(logits, logits) == 0


@pytest.mark.parametrize("words", [("fgm",), ("freelb",), ("rdrop", "--train.rule.inner.name=pgd")])
def test_a_perturbation_of_two_texts_is_refused_before_the_first_step(base, words, tmp_path):
    name, *more = words
    path = tables(tmp_path, pairs(12))
    with pytest.raises(UserError, match=r"model.trunk=encoder_decoder embeds two") as caught:
        finetune(base, path.parent, tmp_path / "a", *WRITE, f"--train.rule.name={name}", *more)
    assert "\n" not in str(caught.value)
    span = ("--objective.name=span", "--model.trunk=encoder_decoder", "--train.steps=1")
    with pytest.raises(UserError, match=r"set train.rule.name to rdrop or plain"):
        train(tmp_path / "b", *span, f"--train.rule.name={name}", *more)
    for run in ("a", "b"):
        assert not [line for line in lines(tmp_path / run) if line.get("step")]


def test_its_encoder_alone_may_be_perturbed(base, tmp_path):
    path = tables(tmp_path, questions(12))
    words = ("--objective.name=classify", "--train.rule.name=fgm", *STEPS)
    assert finetune(base, path.parent, tmp_path / "run", *words)["steps"] == 3


@pytest.mark.parametrize("memory", [0, 30, 9])
def test_a_memory_is_not_perturbed(memory, tmp_path):
    """Also where it is as long as the row (32 tokens with <sep> and <cls>: 30 of text)."""
    words = (f"--objective.memory={memory}", "--train.rule.name=fgm", "--train.rule.epsilon=0.1")
    assert train(tmp_path / "run", *TWO_STREAM, *words)["steps"] == 2


def test_what_is_read_without_a_gradient_stays_as_it_is():
    embedding = torch.nn.Embedding(4, 3)
    tokens = torch.tensor([[1, 2]])
    batch = MicroBatch({"tokens": tokens}, {}, np.zeros(1, dtype=np.int64))
    with Perturbation(batch, start=0.5).on(embedding):
        read = embedding(tokens)
        with torch.no_grad():
            memory = embedding(tokens)
    assert torch.equal(memory, embedding(tokens)) and not torch.equal(read, memory)


@pytest.mark.slow
def test_divided_weights_write_as_whole_ones(base, tmp_path):
    path, figures = tables(tmp_path, pairs(24)), {}
    words = (*WRITE, "--train.micro_batch=2", "--optim.name=sgd", "--optim.lr=0.1")
    for strategy in ("ddp", "fsdp"):
        settled = config(base, path.parent, tmp_path / strategy, *words)
        figures[strategy] = in_ranks(2, tune, settled, strategy)
    # Relative for the perplexity, which is exp(loss): 100 times the loss's difference at 100.
    assert figures["ddp"][0] == pytest.approx(figures["fsdp"][0], abs=1e-5, rel=1e-6)
    assert figures["fsdp"][0] == figures["fsdp"][1]
    runs = [lines(tmp_path / strategy) for strategy in figures]
    for left, right in zip(*runs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)


def refusal(world, config, strategy):
    """What a run says that is refused."""
    with pytest.raises(UserError) as caught:
        tune(world, config, strategy)
    return str(caught.value)


@pytest.mark.slow
def test_a_rule_with_divided_weights_is_refused_before_the_first_step(base, tmp_path):
    """By both ranks; a single one has all the weights, and trains."""
    words = (*WRITE, "--train.rule.name=rdrop")
    settled = config(base, tables(tmp_path, pairs(12)).parent, tmp_path / "run", *words)
    said, also = in_ranks(2, refusal, settled, "fsdp")
    assert said == also and "\n" not in said
    assert said.startswith("train.rule=rdrop with fsdp") and "strategy to ddp" in said
    assert not [line for line in lines(tmp_path / "run") if line.get("step")]


def parts(folder, **objectives):
    """--objective.tasks of these objectives, each on data of its own."""
    found = {}
    for name, objective in objectives.items():
        records = {"write": pairs(12), "tag": RECORDS["tag"]}.get(objective, questions(12))
        tables(folder / name, records)
        found[name] = {"objective": {"name": objective}, "data": {"path": str(folder / name)}}
    return f"--objective.tasks={json.dumps(found)}"


@pytest.mark.parametrize(
    ("kind", "objectives", "said"),
    [
        ("span", {"a": "classify", "b": "write"}, "tasks.b: objective=write trains"),
        ("mlm", {"a": "classify", "b": "write"}, "tasks.b: objective=write trains"),
        pytest.param(
            "permutation",
            {"a": "tag", "b": "prompt"},
            "tasks.b: objective=prompt trains",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_part_that_the_trunk_cannot_train_is_named(kind, objectives, said, tmp_path):
    for name in objectives:
        (tmp_path / name).mkdir()
    words = ("--objective.name=multi", *STEPS, parts(tmp_path, **objectives))
    base = checkpoint("mlm") if kind == "mlm" else trained_run(kind)
    with pytest.raises(UserError, match=said) as caught:
        finetune(base, tmp_path / "a", tmp_path / "run", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["span", "permutation"])
def test_several_tasks_that_read_train_together(kind, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    words = ("--objective.name=multi", *STEPS, parts(tmp_path, a="classify", b="tag"))
    base = trained_run(kind) if kind == "span" else tmp_path / "base"
    if kind == "permutation":
        train(base, *TWO_STREAM, "--data.row_length=64")
    summary = finetune(base, tmp_path / "a", tmp_path / "run", *words)
    assert {"a/accuracy", "b/f1"} <= set(summary["val"])
    trunk = open_saved(tmp_path / "run").config.model.trunk
    assert trunk == {"span": "encoder", "permutation": "two_stream"}[kind]
